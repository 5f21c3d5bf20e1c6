"""Images of any shape through the real server: stripes and dots are edited and cut out. On the embedded model."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from mcp import Client
from PIL import Image

from tests.real_server import RealServer
from tests.tool_calls import call

pytestmark = pytest.mark.anyio

NARROW = [(32, 2000), (2, 2000), (1000, 8), (1, 300), (2, 2), (1, 1)]


@pytest.fixture
async def agent(server: RealServer, tmp_path: Path) -> AsyncIterator[Client]:
    async with Client(server.stdio(KLEIN_WRITE_ROOTS=str(tmp_path), KLEIN_READ_ROOTS=str(tmp_path))) as client:
        yield client


async def test_images_of_any_shape_are_edited(agent: Client, tmp_path: Path) -> None:
    for size in NARROW:
        for mode, colour in (("RGB", (200, 40, 40)), ("RGBA", (200, 40, 40, 120))):
            Image.new(mode, size, colour).save(tmp_path / "narrow.png")
            for more in ({"prompt": "make the background green"}, {"background": "transparent"}):
                facts = await call(agent, "edit_image", image=str(tmp_path / "narrow.png"), seed=3, **more)
                assert facts["size"] == list(size)


async def test_edits_are_replayed_on_a_stripe(agent: Client, tmp_path: Path) -> None:
    await call(agent, "generate_image", prompt="a cat on a white background", seed=3)
    edit = await call(agent, "edit_image", image="last", prompt="make the background green", seed=3)
    Image.new("RGB", (32, 2000), (200, 40, 40)).save(tmp_path / "stripe.png")
    facts = await call(agent, "edit_image", image=str(tmp_path / "stripe.png"), again=edit["image"])
    assert facts["size"] == [32, 2000]
