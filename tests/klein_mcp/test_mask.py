"""The two readings of a mask: by alpha and by brightness."""

import io

import numpy as np
import pytest
from PIL import Image

from klein_mcp.errors import RequestError
from klein_mcp.images import codec
from klein_mcp.images.mask import to_brightness
from tests.images import scene

LEFT = np.zeros((64, 64), bool)
LEFT[:, :32] = True
"""The half that may change."""


def png(colour: np.ndarray | int, alpha: np.ndarray | None = None) -> codec.Decoded:
    rgb = np.full((64, 64, 3), colour, np.uint8) if isinstance(colour, int) else colour
    image = Image.fromarray(rgb if alpha is None else np.dstack([rgb, alpha.astype(np.uint8)]))
    out = io.BytesIO()
    image.save(out, "PNG")
    return codec.decode(out.getvalue(), "The mask", backdrop=0)


def changes(mask: np.ndarray) -> np.ndarray:
    return mask.mean(axis=2) > 127


BLACK_AND_WHITE = np.repeat(np.where(LEFT, 255, 0).astype(np.uint8)[..., None], 3, axis=2)
HOLES = np.where(LEFT, 0, 255)


@pytest.mark.parametrize("alpha_only", [True, False])
def test_mask_without_transparency_is_read_by_brightness(alpha_only: bool):
    opaque = np.full((64, 64), 255)
    for mask in (png(BLACK_AND_WHITE), png(BLACK_AND_WHITE, opaque)):
        assert (changes(to_brightness(mask, "The mask", alpha_only=alpha_only)) == LEFT).all()


@pytest.mark.parametrize("alpha_only", [True, False])
@pytest.mark.parametrize("colour", [0, scene(64, 64)], ids=["black", "an image"])
def test_holes_in_black_or_in_an_image_may_change(colour: np.ndarray | int, alpha_only: bool):
    assert (changes(to_brightness(png(colour, HOLES), "The mask", alpha_only=alpha_only)) == LEFT).all()


def test_holes_in_white_mean_either_and_are_refused():
    with pytest.raises(RequestError, match=r"transparent pixels may change, or its white ones"):
        to_brightness(png(255, HOLES), "The mask")
    with pytest.raises(RequestError, match="flatten it onto black"):
        to_brightness(png(BLACK_AND_WHITE, np.where(LEFT.T, 255, 0)), "The mask")


def test_openai_reads_holes_in_white_by_alpha():
    assert (changes(to_brightness(png(255, HOLES), "The mask", alpha_only=True)) == LEFT).all()


def test_wholly_transparent_mask_lets_everything_change():
    for colour in (0, 255):
        assert changes(to_brightness(png(colour, np.zeros((64, 64))), "The mask")).all()


def test_soft_edges_keep_their_gradient():
    ramp = np.tile(np.linspace(255, 0, 64), (64, 1))
    mask = to_brightness(png(0, ramp), "The mask")
    assert (np.abs(mask[..., 0].astype(int) - (255 - ramp.astype(np.uint8))) == 0).all()
