"""The embedded model warns before it repaints a photograph, and says what became of a part of one."""

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from mcp import Client
from PIL import Image

from engine.contract import Rgb8
from engine.nano.training.prompts import PromptSampler
from engine.nano.training.score import draw
from klein_mcp.images.detail import is_detailed
from klein_mcp.jobs import installed
from klein_mcp.settings import Settings
from tests.embedded import SIDE
from tests.fakes import FakeExecutor
from tests.images import file, noise, scene
from tests.real_server import RealServer
from tests.tool_calls import call, refused

pytestmark = pytest.mark.anyio


def photograph(width: int = 256, height: int = 192) -> Rgb8:
    """Texture at every scale, as photographs have it."""
    total = np.zeros((height, width, 3))
    for scale in (2, 4, 8, 16, 32):
        coarse = Image.fromarray(noise(width // scale, height // scale, seed=scale))
        total += scale * np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    return (total / 62).astype(np.uint8)


def test_scenes_of_the_embedded_model_are_flat() -> None:
    sampler = PromptSampler(5)
    assert not any(map(is_detailed, draw(*(sampler.world.scene() for _ in range(60)))))


@pytest.mark.parametrize("size", [(128, 96), (256, 192), (1024, 768)])
def test_photographs_are_detailed_and_smooth_images_are_not(size: tuple[int, int]) -> None:
    assert is_detailed(photograph(*size))
    assert not is_detailed(scene(*size))


@pytest.fixture
async def agent(server: RealServer, tmp_path: Path) -> AsyncIterator[Client]:
    """A client of a stdio server of its own, beside a photograph."""
    (tmp_path / "photo.png").write_bytes(file(photograph()))
    async with Client(server.stdio(KLEIN_WRITE_ROOTS=str(tmp_path), KLEIN_READ_ROOTS=str(tmp_path))) as client:
        yield client


async def test_whole_photograph_is_not_repainted_unasked(agent: Client) -> None:
    edit = {"image": "photo.png", "prompt": "make the background green", "seed": 1}
    message = await refused(agent, "edit_image", **edit)
    assert message == (
        f"nano, a demo, paints flat scenes of {SIDE} pixels: it would repaint all of this photograph and lose "
        "its detail. Give a region around what may change, or preserve: off to do it all the same."
    )
    facts = await call(agent, "edit_image", **edit, preserve="off")
    assert any(warning.startswith("nano knows no image such as this") for warning in facts["warnings"])


async def test_part_of_a_photograph_is_edited_and_the_rest_stays_guarded(agent: Client) -> None:
    facts = await call(agent, "edit_image", image="photo.png", prompt="add a cat", region=[64, 48, 96, 96], seed=1)
    assert any("what it painted is hardly recognisable" in warning for warning in facts["warnings"])
    # Most of its pixels are still the photograph's.
    again = {"image": facts["image"], "prompt": "make the background green"}
    assert "it would repaint all of this photograph" in await refused(agent, "edit_image", **again)


async def test_plain_background_of_a_photograph_is_removed_without_painting(agent: Client, tmp_path: Path) -> None:
    rows, columns = np.indices((192, 256))
    thing = ((columns - 128) / 1.2) ** 2 + (rows - 96) ** 2 < 80**2
    product = np.where(thing[..., None], photograph(), np.uint8(250))
    assert is_detailed(product)
    (tmp_path / "product.png").write_bytes(file(product))
    for prompt in ({}, {"prompt": "remove the background"}):
        facts = await call(agent, "edit_image", image="product.png", background="transparent", **prompt)
        assert facts["alpha"]["subject"] == pytest.approx(thing.mean(), abs=0.01)
    repaint = {"image": facts["image"], "prompt": "make it red", "background": "transparent"}
    assert "it would repaint all of this photograph" in await refused(agent, "edit_image", **repaint)
    # In a list only the last step cuts out, so the first one paints.
    steps = {"image": "product.png", "prompt": ["remove the background", "make it red"], "background": "transparent"}
    assert "it would repaint all of this photograph" in await refused(agent, "edit_image", **steps)


async def test_only_what_the_embedded_model_painted_whole_is_no_photograph(
    client: Client, painter: FakeExecutor, tmp_path: Path
) -> None:
    (tmp_path / "photo.png").write_bytes(file(photograph()))
    refusal = "it would repaint all of this photograph"
    whole = {"prompt": "make it red", "seed": 1}
    part = {**whole, "region": [64, 48, 96, 96]}
    painter.paint = lambda job: photograph()[::-1]
    own = await call(client, "generate_image", prompt="a cat")
    edited = await call(client, "edit_image", image=own["image"], **part)
    await call(client, "edit_image", image=edited["image"], **whole)
    opened = await call(client, "edit_image", image=str(tmp_path / "photo.png"), **part)
    assert refusal in await refused(client, "edit_image", image=opened["image"], **whole)
    repainted = await call(client, "edit_image", image=opened["image"], **whole, preserve="off")
    await call(client, "edit_image", image=repainted["image"], **whole)
    painter.model = "klein-4b"
    other = await call(client, "generate_image", prompt="a cat")
    assert refusal in await refused(client, "edit_image", image=other["image"], **whole)


async def test_usual_edit_searches_for_no_models(
    client: Client, painter: FakeExecutor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "photo.png").write_bytes(file(photograph()))
    painter.paint = lambda job: photograph()[::-1]
    own = await call(client, "generate_image", prompt="a cat")
    searches: list[Settings] = []

    def counted(settings: Settings) -> installed.InstalledModels:
        searches.append(settings)
        return find(settings)

    find = installed.find
    monkeypatch.setattr(installed, "find", counted)
    await call(client, "edit_image", image=own["image"], prompt=["make it red", "make it blue"])
    painter.model = "klein-4b"
    await call(client, "edit_image", image=str(tmp_path / "photo.png"), prompt="make it red", model="klein-4b")
    painter.paint = lambda job: scene(64, 64)
    flat = await call(client, "generate_image", prompt="a cat", model="klein-4b")
    await call(client, "edit_image", image=flat["image"], prompt="make it red")
    assert not searches
    await refused(client, "edit_image", image=str(tmp_path / "photo.png"), prompt="make it red")
    assert len(searches) == 1
    monkeypatch.setattr(installed, "find", lambda _: installed.InstalledModels.of(["nano", "klein-4b"]))
    await call(client, "edit_image", image=str(tmp_path / "photo.png"), prompt="make it red")


async def test_recipe_of_a_photograph_is_not_repeated_by_the_embedded_model(
    client: Client, painter: FakeExecutor, tmp_path: Path
) -> None:
    (tmp_path / "photo.png").write_bytes(file(photograph()))
    painter.model = "klein-4b"
    edit = {"image": str(tmp_path / "photo.png"), "prompt": "make it red", "model": "klein-4b"}
    edited = await call(client, "edit_image", **edit)
    message = await refused(client, "generate_image", again=edited["image"], model="nano")
    assert "it would repaint all of this photograph" in message
    await call(client, "generate_image", again=edited["image"])


async def test_replay_stops_before_it_repaints_a_photograph(
    client: Client, painter: FakeExecutor, tmp_path: Path
) -> None:
    (tmp_path / "photo.png").write_bytes(file(photograph()))
    start = await call(client, "generate_image", prompt="a cat")
    edited = await call(client, "edit_image", image=start["image"], prompt="add a hat", region=[0, 0, 64, 64])
    edited = await call(client, "edit_image", image=edited["image"], prompt="make it red")
    facts = await call(client, "edit_image", image=str(tmp_path / "photo.png"), again=edited["image"])
    assert len(facts["steps"]) == 1
    assert facts["warnings"][0].startswith("stopped before step 2 of 2: nano, a demo, paints flat scenes")


async def test_flat_images_are_edited_without_a_word(agent: Client, tmp_path: Path) -> None:
    flat = np.full((128, 128, 3), (250, 220, 50), np.uint8)
    (tmp_path / "flat.png").write_bytes(file(flat))
    facts = await call(agent, "edit_image", image="flat.png", prompt="add a cat in the middle", seed=1)
    assert facts["changed"]["share"] > 0.01, "observed 0.019"
    assert not [warning for warning in facts.get("warnings", []) if "knows no image" in warning]
