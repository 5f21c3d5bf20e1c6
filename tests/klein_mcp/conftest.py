"""A front end of a daemon with a fake engine."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from klein_mcp.daemon.client import DaemonClient
from tests.klein_mcp.daemons import connection, gone


@pytest.fixture
async def front_end(tmp_path: Path) -> AsyncIterator[DaemonClient]:
    async with connection(tmp_path) as front_end:
        yield front_end
        await front_end.stop()
        await gone(tmp_path)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a busy machine time to connect to engines, and let no test wait for an engine to come back."""
    from klein_mcp.daemon.executors import remote as remotes

    monkeypatch.setattr(remotes, "CONNECT", 60.0)
    monkeypatch.setattr(remotes, "PAUSES", (0.0, 0.0, 0.0))
