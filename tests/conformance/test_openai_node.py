"""The OpenAI images API as openai-node sees it. Needs Node 22 and the npm registry."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conformance.test_conformance import HERE, node, run
from tests.embedded import SIDE, TOKENS
from tests.images import file, pixels
from tests.klein_mcp.front_ends import serving
from tests.klein_mcp.test_openai import wait_until_idle
from tests.real_server import RealServer

pytestmark = pytest.mark.conformance
__all__ = ["node"]


@pytest.fixture(scope="module")
def checks(node: Path, server: RealServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The script's lines by check, and its errors as a list."""
    folder = tmp_path_factory.mktemp("openai")
    apple, mask = folder / "apple.png", folder / "mask.png"
    ramp = np.tile(np.arange(128, dtype=np.uint8), (128, 1))
    apple.write_bytes(file(np.dstack([ramp, ramp.T, 255 - ramp])))
    holes = np.full((128, 128), 255, np.uint8)
    holes[:, :64] = 0
    Image.fromarray(np.dstack([pixels(apple.read_bytes()), holes])).save(mask)
    script = node / "openai.mjs"
    script.write_text((HERE / "openai.mjs").read_text())  # modules are looked for beside the script
    with serving(server) as url:
        done = run(node, "node", str(script), url, str(apple), str(mask))
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        wait_until_idle(server)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    errors = [line for line in lines if line["check"] == "error"]
    return {**{line["check"]: line for line in lines}, "errors": errors, "original": pixels(apple.read_bytes())}


def images(check: dict[str, Any]) -> list[np.ndarray]:
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(item))).convert("RGB")) for item in check["data"]]


def test_images_are_generated_edited_and_composed(checks: dict[str, Any]):
    assert checks["generate"]["seed"] == "7"
    assert checks["generate"]["usage"]["output_tokens"] == TOKENS
    assert [image.shape for image in images(checks["three"])] == [(64, 64, 3)] * 3
    for name, size in (("generate", SIDE), ("edit", 128), ("compose", 128)):
        (image,) = images(checks[name])
        assert image.shape == (size, size, 3)


def test_mask_keeps_every_byte_outside(checks: dict[str, Any]):
    (image,) = images(checks["mask"])
    changed = np.any(image != checks["original"], axis=2)
    assert changed[:, :64].any()
    assert not changed[:, 64:].any()


def test_streams_bring_partials_and_then_the_image(checks: dict[str, Any]):
    assert checks["stream"]["types"] == [*["image_generation.partial_image"] * 3, "image_generation.completed"]
    assert checks["stream of an edit"]["types"] == ["image_edit.partial_image", "image_edit.completed"]
    for name, size in (("stream", SIDE), ("stream of an edit", 128), ("hang up", 512)):
        assert all(image.shape == (size, size, 3) for image in images(checks[name]))


def test_errors_raise_the_right_class(checks: dict[str, Any]):
    raised = [(error["name"], error["status"], error["param"]) for error in checks["errors"]]
    assert raised == [
        ("BadRequestError", 400, "n"),
        ("BadRequestError", 400, "n"),
        ("NotFoundError", 404, "model"),
        ("BadRequestError", 400, "output_format"),
    ]


def test_models_are_listed(checks: dict[str, Any]):
    assert checks["models"]["names"] == ["auto", "nano"]
