"""Questions to this user's daemon, asked from a command."""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from klein_mcp.jobs.status import DaemonStatus
from klein_mcp.settings import Settings

if TYPE_CHECKING:
    from klein_mcp.daemon.client import DaemonClient

T = TypeVar("T")


def daemon_status(settings: Settings) -> DaemonStatus:
    """Describe the daemon. Starts none."""
    return _ask(settings, lambda daemon: daemon.status())


def stop_daemon(settings: Settings) -> bool:
    """End the daemon, and return whether there was one. Raises EngineFailed."""
    return _ask(settings, lambda daemon: daemon.stop())


def _ask(settings: Settings, question: "Callable[[DaemonClient], Awaitable[T]]") -> T:
    import anyio

    from klein_mcp.daemon.client import DaemonClient

    async def ask() -> T:
        daemon = DaemonClient(settings)
        try:
            return await question(daemon)
        finally:
            await daemon.aclose()

    return anyio.run(ask)
