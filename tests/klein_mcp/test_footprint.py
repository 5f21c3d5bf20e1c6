"""Memory of many front ends: one process with torch in it, all others small."""

from contextlib import AsyncExitStack
from pathlib import Path

import anyio
import pytest
from mcp import Client

from tests.real_server import real_server
from tests.soak.test_soak import resident
from tests.tool_calls import call

pytestmark = pytest.mark.anyio

MOST = 120_000_000 // 1024
"""KiB, as Linux counts them: a front end with numpy and Pillow in it has about 95 MB."""


def of(home: Path) -> dict[int, bool]:
    """Processes of this home: whether each has torch in it."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"KLEIN_HOME={home}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = "libtorch" in (folder / "maps").read_text()
        except OSError:
            continue
    return found


@pytest.mark.slow
async def test_eight_front_ends_share_one_torch_and_each_stays_small(tmp_path: Path):
    with real_server(tmp_path / "home") as place:
        async with AsyncExitStack() as stack:
            # However slow the machine: what is handed over is not yet the client's last.
            server = place.stdio(KLEIN_WAIT_BUDGET="600")
            clients = [await stack.enter_async_context(Client(server)) for _ in range(8)]

            async def work(number: int) -> None:
                await call(clients[number], "generate_image", prompt="a cat on red", seed=number)
                await call(clients[number], "edit_image", image="last", prompt="make it green", seed=number)

            async with anyio.create_task_group() as tasks:
                for number in range(8):
                    tasks.start_soon(work, number)
            found = of(place.home)
            assert list(found.values()).count(True) == 1
            front_ends = {pid: resident(pid) for pid, torch in found.items() if not torch}
        assert len(front_ends) == 8
        assert max(front_ends.values()) < MOST, front_ends
