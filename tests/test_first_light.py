"""The main job, as a user's client has it: a real server, a real engine, the embedded model, images one can check."""

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mcp.client import Client
from PIL import Image

from engine.nano.training.compositor import BACKGROUNDS
from engine.nano.training.scenes import MIDDLE, NORMAL, Scene, Thing
from engine.nano.training.score import composed
from engine.nano.training.sprites import KINDS
from engine.registry import NANO
from tests.embedded import in_units
from tests.images import file, noise
from tests.real_server import RealServer
from tests.tool_calls import call, refused

pytestmark = pytest.mark.anyio

# The world's colours; source: engine/nano/README.md.
YELLOW, ORANGE, PINK, BLUE = (250, 220, 50), (245, 140, 30), (250, 150, 190), (45, 90, 220)


def background(path: Path) -> np.ndarray:
    """The colour of the four corners, where no demo puts anything."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    corners = [pixels[y : y + 12, x : x + 12] for y in (4, -16) for x in (4, -16)]
    return np.median(np.concatenate([corner.reshape(-1, 3) for corner in corners]), axis=0)


def test_demo_images_have_the_requested_backgrounds(server: RealServer, tmp_path: Path) -> None:
    shown = server.run("-m", "klein_mcp", "demo", "--json", "--out", str(tmp_path))
    assert shown.returncode == 0, shown.stderr
    calls = json.loads(shown.stdout)
    assert [entry["tool"] for entry in calls] == [
        "generate_image", "generate_image", "edit_image", "compose_references",
    ]  # fmt: skip
    assert all(entry["seconds"] > 0 for entry in calls)
    for entry, colour in zip(calls, (YELLOW, ORANGE, PINK, BLUE), strict=True):
        # Observed: at most 6 off in any channel; the nearest two of the world's colours are 50 apart.
        assert np.abs(background(Path(entry["path"])) - colour).max() < 25, entry


def test_demo_images_show_the_requested_objects(server: RealServer, tmp_path: Path) -> None:
    """By the strict scorer of the embedded model: nearest of all its sprites, and of the right outline."""
    server.run("-m", "klein_mcp", "demo", "--out", str(tmp_path))

    def scene(colour: str, **places: tuple[int, int]) -> Scene:
        things = (Thing(KINDS.index(name), NORMAL, slot) for name, slot in places.items())
        return Scene(BACKGROUNDS.index(colour), tuple(things))

    asked = (
        scene("yellow", apple=MIDDLE),
        scene("orange", rocket=MIDDLE),
        scene("pink", apple=MIDDLE),
        scene("blue", apple=(-1, 0), rocket=(1, 0)),
    )
    for path, wanted in zip(sorted(tmp_path.glob("*.png")), asked, strict=True):
        image = np.asarray(Image.open(path).convert("RGB"))
        assert composed(in_units(image), wanted), path.name


def claims(width: int, height: int) -> bytes:
    """A PNG of a hundred bytes whose header claims any size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files nobody should have to paint from."""
    image = file(noise(128, 128))
    (tmp_path / "good.png").write_bytes(image)
    (tmp_path / "cut.png").write_bytes(image[: len(image) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "huge.png").write_bytes(claims(50_000, 50_000))
    (tmp_path / "text.png").write_text("not an image")
    broken = tmp_path / "broken"
    for source in NANO.rglob("*"):
        target = broken / source.relative_to(NANO)
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            data = source.read_bytes()
            target.write_bytes(data[:-999] if source.name == "diffusion_pytorch_model.safetensors" else data)
    return tmp_path


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("generate_image", {"prompt": ""}, "prompt"),
    ("generate_image", {"prompt": "a " * 200_000}, "prompt"),
    ("generate_image", {"prompt": "a cat", "width": 4000, "height": 64}, "2048"),
    ("generate_image", {"prompt": "a cat", "width": 10, "height": 64}, "64"),
    ("generate_image", {"prompt": "a cat", "width": 128}, "height"),
    ("generate_image", {"prompt": "a cat", "count": 9}, "4"),
    ("generate_image", {"prompt": "a cat", "colour": "red"}, "colour"),
    ("generate_image", {"prompt": "a cat", "model": "klein-9b"}, "klein-mcp pull klein-9b"),
    ("generate_image", {"prompt": "a cat", "model": "klien-4b"}, "klein-4b"),
    ("edit_image", {"prompt": "a cat", "image": "zzzzzz"}, "list_images"),
    ("edit_image", {"prompt": "a cat", "image": "{folder}/cut.png"}, "cut.png"),
    ("edit_image", {"prompt": "a cat", "image": "{folder}/empty.png"}, "empty"),
    ("edit_image", {"prompt": "a cat", "image": "{folder}/huge.png"}, "50000×50000"),
    ("edit_image", {"prompt": "a cat", "image": "{folder}/text.png"}, "not"),
    ("edit_image", {"prompt": "a cat", "image": "{folder}/nowhere.png"}, "nowhere.png"),
    ("compose_references", {"prompt": "a cat", "images": ["{folder}/good.png"] * 12}, "1 to 4"),
    ("compose_references", {"prompt": "a cat", "images": []}, "images"),
]


def _on(folder: Path, value: Any) -> Any:
    if isinstance(value, list):
        return [_on(folder, each) for each in value]
    return value.replace("{folder}", str(folder)) if isinstance(value, str) else value


async def test_bad_input_gets_one_line_and_the_next_call_works(server: RealServer, folder: Path) -> None:
    async with Client(server.stdio()) as client:
        for tool, arguments, says in BAD:
            message = await refused(client, tool, **{key: _on(folder, value) for key, value in arguments.items()})
            assert says in message, f"{tool} {str(arguments)[:80]}: {message}"
        after = await call(client, "generate_image", prompt="a cat in the snow", seed=1)
        assert Path(after["path"]).is_file()
        edit = {"image": str(folder / "good.png"), "prompt": "make the background red", "preserve": "off"}
        assert await call(client, "edit_image", **edit)


async def test_truncated_weights_are_named_and_the_engine_survives(server: RealServer, folder: Path) -> None:
    async with Client(server.stdio(KLEIN_MODEL=str(folder / "broken"))) as client:
        message = await refused(client, "generate_image", prompt="a cat")
        assert "diffusion_pytorch_model.safetensors" in message
        assert "Download it again" in message
        assert await call(client, "generate_image", prompt="a cat", model="nano")


async def test_sizes_are_rounded_to_16_with_a_warning(server: RealServer) -> None:
    async with Client(server.stdio()) as client:
        payload = await call(client, "generate_image", prompt="a cat in the snow", width=100, height=70, seed=1)
        assert payload["size"] == [96, 64]
        assert any("16" in warning for warning in payload.get("warnings", []))


async def test_progress_reaches_the_client_for_every_step(server: RealServer) -> None:
    payload: list[tuple[float, str]] = []

    async def hear(progress: float, total: float | None, message: str | None) -> None:
        payload.append((progress, message or ""))

    async with Client(server.stdio()) as client:
        await client.call_tool("generate_image", {"prompt": "a dog on yellow", "seed": 2}, progress_callback=hear)
    values = [progress for progress, _ in payload]
    assert values == sorted(set(values)), "strictly increasing"
    for step in range(1, 5):
        assert any(f"{step}/4" in message or f"{step} of 4" in message for _, message in payload), payload
