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
