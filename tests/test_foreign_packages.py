"""A project with its own `engine` and `prompts` packages on PYTHONPATH does not break the program."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from mcp import Client

from tests.embedded import SIDE
from tests.real_server import RealServer, real_server
from tests.tool_calls import call

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose packages are named like ours, and fail when they are imported."""
    folder = tmp_path_factory.mktemp("game")
    for name in ("engine", "prompts"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise RuntimeError('the package of the game was imported')\n")
    return folder


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    """A home without a daemon: the one that this file starts must inherit PYTHONPATH."""
    with real_server(tmp_path_factory.mktemp("home")) as server:
        yield server


async def test_server_and_daemon_use_their_own_packages(own_server: RealServer, project: Path):
    command = own_server.stdio(PYTHONPATH=".").model_copy(update={"cwd": project})
    async with Client(command) as client:
        assert (await call(client, "generate_image", prompt="a red circle", seed=1))["size"] == [SIDE, SIDE]
        assert (await client.get_prompt("iterate", {"idea": "a red circle"})).messages


@pytest.mark.parametrize("command", ["doctor", "models", "status"])
@pytest.mark.slow
def test_commands_use_their_own_packages(own_server: RealServer, project: Path, command: str):
    done = own_server.run("-m", "klein_mcp", command, "--json", cwd=project, PYTHONPATH=".")
    assert "Traceback" not in done.stderr
    assert json.loads(done.stdout)


def test_other_programs_keep_their_packages(own_server: RealServer, project: Path):
    """Only names that klein_mcp ships are claimed: a script that imports it finds its other modules as before."""
    (project / "levels.py").write_text("NAME = 'level 1'\n")
    done = own_server.run("-c", "import klein_mcp, levels, engine; print(levels.NAME, engine.__file__)", cwd=project)
    assert done.stdout.startswith("level 1")
    assert str(project) not in done.stdout
