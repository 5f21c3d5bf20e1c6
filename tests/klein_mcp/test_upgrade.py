"""A data folder as 0.1 wrote it opens, lists, edits and finishes its detached job.

tests/data/home-0.1 was made by commit 058030b, the last of 0.1: two images, an edit, a composition, a config file and a
job whose daemon was killed before it began.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from mcp.client import Client
from mcp.client.stdio import stdio_client

from tests.real_server import RealServer, real_server
from tests.tool_calls import call

DATA = Path(__file__).parents[1] / "data" / "home-0.1"
JOB = "j0123456789ab"

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    home = tmp_path_factory.mktemp("old") / "home"
    shutil.copytree(DATA, home)
    home.chmod(0o700)
    with real_server(home) as server:
        yield server


def test_old_library_is_listed_with_its_lineage(old: RealServer) -> None:
    listed = old.run("-m", "klein_mcp", "list", "--json")
    assert listed.returncode == 0, listed.stderr
    images = {entry["image"]: entry for entry in json.loads(listed.stdout)}
    assert set(images) >= {"vc86nq", "hd9k3x", "ev8bs7", "cp5fwk"}
    shown = old.run("-m", "klein_mcp", "info", "cp5fwk", "--json")
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["parents"] == ["vc86nq", "hd9k3x"]


async def test_detached_job_of_0_1_is_finished(old: RealServer) -> None:
    async with Client(stdio_client(old.stdio())) as client:
        result = await call(client, "wait_for_job", job=JOB)
        assert result["seed"] == "11"


async def test_old_image_is_edited_and_replayed(old: RealServer) -> None:
    async with Client(stdio_client(old.stdio())) as client:
        edit = await call(client, "edit_image", image="vc86nq", prompt="make the background blue", seed=3)
        assert edit["image"] not in ("vc86nq", "ev8bs7")
    replayed = old.run("-m", "klein_mcp", "replay", "ev8bs7", "--json")
    assert replayed.returncode == 0, replayed.stderr
