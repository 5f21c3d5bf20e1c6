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
from tests.embedded import SIDE
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


async def test_part_of_a_photograph_says_that_nothing_can_be_recognised(agent: Client) -> None:
    facts = await call(agent, "edit_image", image="photo.png", prompt="add a cat", region=[64, 48, 96, 96], seed=1)
    assert any("what it painted is hardly recognisable" in warning for warning in facts["warnings"])


async def test_flat_images_are_edited_without_a_word(agent: Client, tmp_path: Path) -> None:
    flat = np.full((128, 128, 3), (250, 220, 50), np.uint8)
    (tmp_path / "flat.png").write_bytes(file(flat))
    facts = await call(agent, "edit_image", image="flat.png", prompt="add a cat in the middle", seed=1)
    assert facts["changed"]["share"] > 0.01, "observed 0.019"
    assert not [warning for warning in facts.get("warnings", []) if "knows no image" in warning]
