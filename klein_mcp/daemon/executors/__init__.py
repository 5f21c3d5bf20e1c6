"""Executors: the engine of this process, and engines elsewhere."""

from klein_mcp.jobs.executor import Executor
from klein_mcp.settings import Settings


def make_executor(settings: Settings) -> Executor:
    """Make the executor that the settings name."""
    if settings.engine:
        from klein_mcp.daemon.executors.remote import RemoteExecutor

        return RemoteExecutor.from_settings(settings)
    from klein_mcp.daemon.executors.local import make_local

    return make_local(settings)
