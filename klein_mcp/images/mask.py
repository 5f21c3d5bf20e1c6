"""Readings of a mask: its transparent, white or opaque pixels change.

The first is OpenAI's, the second that of most other tools, the third A1111's of masks drawn on nothing.
"""

import numpy as np

from engine.contract import Rgb8
from klein_mcp.errors import RequestError
from klein_mcp.images.alpha import Pixels, over
from klein_mcp.images.codec import Decoded

NEAR = 48
"""Of 255: JPEG leaves black and white this near to themselves."""

MID_TONES = 0.2
"""Share of grey pixels above which an image is not a drawn mask. Soft brushes stay below it."""

TRACE = 0.001
"""Share of white pixels below which reading by brightness would change nothing."""


def to_brightness(mask: Decoded, name: str, *, alpha_only: bool = False) -> Rgb8:
    """Return the mask in grey, white where the edit may change.

    mask: decoded with transparent pixels on black. alpha_only: a mask with transparency is always read by it, as the
    OpenAI API defines. Otherwise a mask that could mean either raises RequestError, which names both readings.
    """
    if mask.alpha is None:
        return mask.image
    if not alpha_only and _is_ambiguous(mask):
        raise RequestError(
            f"{name} can be read in two ways: its transparent pixels may change, or its white ones.",
            hint="For the first, make the rest black. For the second, flatten it onto black.",
        )
    return np.repeat(255 - mask.alpha[..., None], 3, axis=2)


def drawn(mask: Decoded) -> Rgb8:
    """Return a mask of A1111 in grey, white where it may change.

    These are its opaque pixels if it has transparent ones, else its white ones.

    mask: decoded with transparent pixels on black.
    """
    return mask.image if mask.alpha is None else np.repeat(mask.alpha[..., None], 3, axis=2)


def of_image(image: Pixels, name: str) -> Rgb8:
    """Read an image of the library as `to_brightness` reads a file."""
    if image.shape[2] == 3:
        return image
    return to_brightness(Decoded(over(image, 0), (), None, True, image[..., 3]), name)


def _is_ambiguous(mask: Decoded) -> bool:
    """Whether the visible pixels are themselves a mask with white in it.

    Black ones allow no second reading, nor do the many tones of an image from which a part was erased.
    """
    assert mask.alpha is not None
    brightness = mask.image[mask.alpha > 127].mean(axis=1)
    if not brightness.size:
        return False
    white = (brightness > 255 - NEAR).mean()
    grey = ((brightness >= NEAR) & (brightness <= 255 - NEAR)).mean()
    return bool(white > TRACE and grey <= MID_TONES)
