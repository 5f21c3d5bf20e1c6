"""Installed models as a front end tells of them, before any engine runs."""

import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import anyio
import pytest
from mcp import Client
from mcp.client.stdio import StdioServerParameters
from safetensors.torch import load_file, save_file

from engine.contract import Job, Result
from engine.families.klein.variants import VARIANTS
from klein_mcp.jobs.installed import InstalledModels, find
from klein_mcp.jobs.service import Service
from klein_mcp.jobs.timing import HISTORY, TimingHistory
from klein_mcp.mcp_server import server
from klein_mcp.settings import Settings
from tests.embedded import MAX_REFERENCES, SIDE
from tests.engine import published
from tests.images import noise
from tests.klein_mcp.front_ends import through
from tests.klein_mcp.test_http import serving
from tests.real_server import PATIENCE, RealServer, real_server
from tests.tool_calls import call, refused

pytestmark = pytest.mark.anyio

NANO = f"Installed: nano. auto takes nano: {SIDE}×{SIDE} by default, at most {MAX_REFERENCES} references"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model of klein-4b's layout and name."""
    folder = tmp_path_factory.mktemp("models")
    published.toy(folder / "klein-4b")
    return folder


def settings(home: Path, *models: Path, **more: Any) -> Settings:
    return Settings(home=home, hub=home / "hub", models=models, **more)


def test_embedded_model_alone_is_what_auto_takes(tmp_path: Path) -> None:
    found = find(settings(tmp_path))
    assert (found.names, found.auto, found.max_references) == (("nano",), "nano", MAX_REFERENCES)
    assert found.summary().startswith(f"{NANO}, a demo")


def test_choice_between_models_is_open_until_the_first_image(tmp_path: Path, folder: Path) -> None:
    own = settings(tmp_path, folder)
    assert find(own).names == ("nano", "klein-4b")
    assert find(own).auto == ""
    assert "the first image decides" in find(own).summary()
    history = TimingHistory(tmp_path / HISTORY)
    history.note(Job("a cat"), Result(noise(64, 64), 0, "klein-4b", "", 4, 1.0), 1.5)
    assert find(own).auto == "klein-4b"
    assert "auto takes klein-4b: 1024×1024 by default, at most 4 references." in find(own).summary()
    assert TimingHistory(tmp_path / HISTORY).tables().keys() == {"klein-4b"}


def test_model_that_was_removed_since_is_not_promised(tmp_path: Path) -> None:
    (tmp_path / HISTORY).write_text('{"seconds": {}, "native": {}, "auto": "klein-9b"}')
    assert find(settings(tmp_path)).auto == "nano"


def test_model_setting_is_named_in_place_of_auto(tmp_path: Path, folder: Path) -> None:
    assert f"A call uses nano: {SIDE}×{SIDE}" in find(settings(tmp_path, folder, model="nano")).summary()
    assert "A call uses /a/model unless it names a model" in find(settings(tmp_path, model="/a/model")).summary()


def test_models_of_another_machine_are_not_invented(tmp_path: Path) -> None:
    found = find(settings(tmp_path, engine=("http://far:1",)))
    assert (found.names, found.default, found.limit("auto")) == ((), "", None)
    assert "another machine" in found.summary()


@pytest.mark.parametrize("name", VARIANTS)
def test_reference_limit_of_a_named_model_is_known(name: str) -> None:
    assert InstalledModels.of(["nano", name]).limit(name) == (name, VARIANTS[name].max_references)


def test_search_imports_no_torch(tmp_path: Path, folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from klein_mcp.settings import Settings;"
        "from klein_mcp.jobs.installed import find;"
        f"print(find(Settings(home=Path({str(tmp_path)!r}), hub=None, models=(Path({str(folder)!r}),))).names,"
        "'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "('nano', 'klein-4b') False"


def without_engine(home: Path, **more: str) -> StdioServerParameters:
    """Return the real server in a home of its own, whose engine nothing starts."""
    return RealServer(home).stdio(KLEIN_MODEL="auto", KLEIN_HUB=str(home / "hub"), **more)


async def test_server_tells_its_models_without_an_engine(tmp_path: Path, folder: Path) -> None:
    async with Client(without_engine(tmp_path)) as client:
        assert NANO in (client.instructions or "")
        status = await call(client, "engine_status")
        assert status["running"] is False
        nano = {"name": "nano", "licence": "Apache-2.0", "size": SIDE, "max_references": MAX_REFERENCES}
        assert status["models"] == {"installed": [nano], "auto": "nano"}
        schemas = {tool.name: tool.input_schema["properties"] for tool in (await client.list_tools()).tools}
        assert schemas["generate_image"]["model"]["enum"] == ["auto", "nano"]
        assert schemas["compose_references"]["images"]["maxItems"] == MAX_REFERENCES
        many = ["k7f3q2"] * (MAX_REFERENCES + 1)
        message = await refused(client, "compose_references", images=many, prompt="all of them")
        # A model of klein's own limit is refused by the tool's schema, a smaller one by its name.
        assert re.search(f"(nano takes at most|a list of 1 to) {MAX_REFERENCES}", message)
        assert (await call(client, "engine_status"))["running"] is False
    async with Client(without_engine(tmp_path, KLEIN_MODELS=str(folder))) as client:
        schemas = {tool.name: tool.input_schema["properties"] for tool in (await client.list_tools()).tools}
        assert schemas["edit_image"]["model"]["enum"] == ["auto", "nano", "klein-4b"]
        assert schemas["compose_references"]["images"]["maxItems"] == 4
        assert "Installed: nano, klein-4b." in (client.instructions or "")


async def test_instructions_over_http_follow_what_is_installed(service: Service, folder: Path) -> None:
    home = service.settings.home
    async with serving(service) as url:
        for installed in ("Installed: nano.", "Installed: nano, klein-4b."):
            for front_end in ("http", "http legacy", "sse"):
                async with through(front_end, RealServer(home), url) as client:
                    assert installed in (client.instructions or ""), front_end
            shutil.copytree(folder, home / "models", dirs_exist_ok=True)


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_search_for_models_holds_up_no_other_client(
    connect: Any, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, others_ran, in_time = threading.Event(), threading.Event(), []

    def slow(settings: Settings) -> InstalledModels:
        begun.set()
        in_time.append(others_ran.wait(5))
        return find(settings)

    async def another_client() -> None:
        while not begun.is_set():
            await anyio.sleep(0.01)
        others_ran.set()

    monkeypatch.setattr(server, "find", slow)
    monkeypatch.setattr(server, "SEARCH_WAIT", PATIENCE)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(another_client)
        async with connect(mode=mode) as client:
            assert NANO in client.instructions
    assert all(in_time)


async def prompt(client: Client) -> str:
    got = await client.get_prompt("iterate", {"idea": "an apple on a yellow background"})
    return got.messages[0].content.text  # type: ignore[union-attr] - our prompts hold text alone


async def test_later_sessions_hear_what_auto_took(tmp_path: Path, folder: Path) -> None:
    (tmp_path / HISTORY).write_text(json.dumps({"seconds": {}, "native": {}, "auto": "klein-4b"}))
    (tmp_path / HISTORY).chmod(0o600)
    async with Client(without_engine(tmp_path, KLEIN_MODELS=str(folder))) as client:
        assert (await call(client, "engine_status"))["models"]["auto"] == "klein-4b"
        assert "nano" not in await prompt(client)
    async with Client(without_engine(tmp_path)) as client:
        assert "The model here is `nano`" in await prompt(client)


async def test_installed_model_that_does_not_load_is_not_called_missing(tmp_path: Path, folder: Path) -> None:
    shutil.copytree(folder, tmp_path / "models")
    (file,) = (tmp_path / "models" / "klein-4b" / "vae").glob("*.safetensors")
    tensors = load_file(file)
    del tensors["decoder.conv_in.weight"]
    save_file(tensors, file)
    reason = "does not load: The autoencoder lacks the tensor decoder.conv_in.weight."
    more = {"KLEIN_MODELS": str(tmp_path / "models"), "KLEIN_MODEL": "auto", "KLEIN_HUB": str(tmp_path / "hub")}
    with real_server(tmp_path / "home") as place:
        async with Client(place.stdio(**more)) as client:
            result = await call(client, "generate_image", prompt="a red ball", width=64, height=64)
            (warning,) = (each for each in result["warnings"] if f"klein-4b is installed but {reason}" in each)
            assert warning.endswith("; klein-mcp doctor has the next step")
            _, klein = (await call(client, "engine_status"))["models"]["installed"]
            assert klein["obstacle"].startswith(reason)
        assert f"klein-4b (Apache-2.0, {reason}" in place.run("-m", "klein_mcp", "status", cwd=tmp_path, **more).stdout
        async with Client(place.stdio(**more)) as client:
            assert "; klein-4b is installed but was not used; klein-mcp models says why." in (client.instructions or "")
        painted = place.run("-m", "klein_mcp", "paint", "a red ball", "--size", "64x64", cwd=tmp_path, **more)
        assert f"klein-4b is installed but {reason}" in painted.stderr
