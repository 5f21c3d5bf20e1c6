"""One question to this user's daemon, asked from a command."""

from typing import Any

from klein_mcp.settings import Settings


def ask_daemon(settings: Settings, method: str) -> Any:
    """Call a method of the daemon's client that takes no arguments."""
    import anyio

    from klein_mcp.daemon.client import DaemonClient

    async def ask() -> Any:
        daemon = DaemonClient(settings)
        try:
            return await getattr(daemon, method)()
        finally:
            await daemon.aclose()

    return anyio.run(ask)
