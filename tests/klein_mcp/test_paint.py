"""`klein-mcp paint` with references, on a fake engine: one is edited as `edit_image` does, several are composed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mcp import Client
from PIL import Image

from engine.contract import EngineConfig, Exact, KeepSource, Native
from klein_mcp.cli.main import main
from klein_mcp.images import provenance
from klein_mcp.settings import Settings
from tests.fakes import FakeExecutor
from tests.images import file, pixels, scene
from tests.klein_mcp.test_photographs import photograph
from tests.tool_calls import call

pytestmark = pytest.mark.anyio


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeExecutor:
    """The engine of `paint`, which runs in an empty folder with a data folder of its own."""
    engine = FakeExecutor()
    monkeypatch.setattr("klein_mcp.daemon.executors.make_executor", lambda settings: engine)
    monkeypatch.setenv("KLEIN_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KLEIN_MODEL", "nano")
    monkeypatch.chdir(tmp_path)
    return engine


def paint(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["paint", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def recipe(name: str) -> dict[str, Any]:
    with Image.open(name) as image:
        found = provenance.read(image)
    assert found is not None
    return found


def test_one_reference_is_edited_at_its_own_size(engine: FakeExecutor, capsys: pytest.CaptureFixture[str]) -> None:
    Path("flat.png").write_bytes(file(scene(68, 90)))
    facts = paint(capsys, "make it red", "--ref", "flat.png", "-o", "red.png")
    assert (facts["width"], facts["height"]) == (68, 90)
    assert facts["changed"]["share"] > 0
    assert (engine.jobs[0].size, engine.jobs[0].find_change) == (KeepSource(), True)
    assert recipe("red.png")["request"]["tool"] == "edit_image"
    paint(capsys, "make it red", "--ref", "flat.png", "--preserve", "off", "--size", "68x90", "-o", "red.png")
    assert (engine.jobs[1].size, engine.jobs[1].find_change) == (KeepSource(), False)


def test_other_size_is_painted_anew_and_several_references_composed(
    engine: FakeExecutor, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("flat.png").write_bytes(file(scene(64, 96)))
    paint(capsys, "make it red", "--ref", "flat.png", "--size", "64x64", "-o", "red.png")
    assert recipe("red.png")["request"]["tool"] == "edit_image"
    paint(capsys, "both", "--ref", "flat.png", "--ref", "red.png", "-o", "both.png")
    assert [job.size for job in engine.jobs] == [Exact(64, 64), Native()]
    assert recipe("both.png")["request"]["images"] == ["flat.png", "red.png"]


def test_edit_that_changes_nothing_says_so(engine: FakeExecutor, capsys: pytest.CaptureFixture[str]) -> None:
    engine.paint = lambda job: job.references[0]
    Path("flat.png").write_bytes(file(scene(64, 64)))
    assert main(["paint", "make it red", "--ref", "flat.png", "-o", "red.png"]) == 0
    assert "klein-mcp: nothing visible changed" in capsys.readouterr().err.splitlines()


def test_variant_that_is_given_is_that_of_the_model_that_is_given(
    engine: FakeExecutor, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    configs: list[EngineConfig] = []

    def made(settings: Settings) -> FakeExecutor:
        configs.append(settings.engine_config())
        return engine

    monkeypatch.setattr("klein_mcp.daemon.executors.make_executor", made)
    paint(capsys, "a cat", "-o", "one.png")
    paint(capsys, "a cat", "--model", "mine", "--variant", "klein-base-4b", "-o", "two.png")
    assert [(config.model, config.variant) for config in configs] == [("nano", None), ("mine", "klein-base-4b")]


def test_photograph_is_refused_before_the_engine_starts(
    engine: FakeExecutor, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("photo.png").write_bytes(file(photograph()))
    assert main(["paint", "make it red", "--ref", "photo.png"]) == 1
    error = capsys.readouterr().err
    assert "it would repaint all of this photograph" in error
    assert "Say --preserve off" in error
    assert not engine.jobs
    paint(capsys, "make it red", "--ref", "photo.png", "--preserve", "off")


def test_transparent_reference_stays_transparent(engine: FakeExecutor, capsys: pytest.CaptureFixture[str]) -> None:
    engine.paint = lambda job: job.references[0]
    disc = np.dstack([scene(64, 64), np.zeros((64, 64), np.uint8)])
    disc[16:48, 16:48, 3] = 255
    Path("disc.png").write_bytes(file(disc))
    paint(capsys, "make it red", "--ref", "disc.png", "-o", "red.png")
    with Image.open("red.png") as image:
        assert image.mode == "RGBA"
    facts = paint(capsys, "make it red", "--ref", "disc.png", "-o", "red.jpg")
    assert "JPEG has no transparency: the image is on white" in facts["warnings"]


def test_seed_of_minus_one_is_random_and_another_negative_one_wrong(
    engine: FakeExecutor, capsys: pytest.CaptureFixture[str]
) -> None:
    assert int(paint(capsys, "a dot", "--seed", "-1")["seed"]) >= 0
    with pytest.raises(SystemExit):
        main(["paint", "a dot", "--seed", "-2"])
    assert "'-2' is not a seed, 0 to 9223372036854775807" in capsys.readouterr().err


async def test_handle_of_the_library_is_a_reference(
    client: Client, engine: FakeExecutor, settings: Any, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    made = await call(client, "generate_image", prompt="a dot", seed=1)
    monkeypatch.setenv("KLEIN_HOME", str(settings.home))
    paint(capsys, "make it red", "--ref", made["image"], "-o", "red.png")
    assert np.array_equal(engine.jobs[0].references[0], pixels(Path(made["path"]).read_bytes()))
    assert recipe("red.png")["parents"] == [made["image"]]
    assert main(["paint", "make it red", "--ref", "zzzzzz"]) == 1
    assert 'There is no image "zzzzzz". klein-mcp list shows all.' in capsys.readouterr().err


def test_size_that_a_format_cannot_store_is_refused_at_once(
    engine: FakeExecutor, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("wide.png").write_bytes(file(scene(16_384, 8)))
    assert main(["paint", "make it red", "--ref", "wide.png", "-o", "wide.webp"]) == 1
    assert "webp cannot store it: a side has 16384 pixels" in capsys.readouterr().err
    assert not engine.jobs
