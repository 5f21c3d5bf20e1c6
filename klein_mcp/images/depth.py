"""Scale greyscale of more than 8 bits, or of floats, to 8."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile

from klein_mcp.errors import BadImage
from klein_mcp.images.formats import EXPORT

_DARK = 0.125
"""Share of the range below which a file may really hold fewer bits than it declares."""
_STRIP = 1_000_000
"""Pixels that are looked at at a time, so that a large image needs no second copy."""

_BITS, _PHOTOMETRIC, _MAX_SAMPLE, _SAMPLE_FORMAT = 258, 262, 281, 339
_WHITE_IS_ZERO, _UNSIGNED = 0, 1


class Levels(NamedTuple):
    """The values of black and white.

    Black is the larger one in an inverted file.
    """

    black: float
    white: float


def levels(image: ImageFile.ImageFile, name: str, warnings: list[str]) -> Levels | None:
    """Return black and white of deep greyscale, else None. Raises BadImage."""
    if not (image.mode.startswith("I") or image.mode == "F"):
        return None
    found = _float_levels(image) if image.mode == "F" else _integer_levels(image, name, warnings)
    if found is None:
        lowest, highest = _extremes(image)
        found = Levels(min(lowest, 0.0), highest)
        warnings.append(
            f"{name} holds values from {found.black:.5g} to {highest:.5g}; they were scaled to black and white."
        )
    # Pillow inverts such files of 8 bits, and no deeper ones.
    return Levels(found.white, found.black) if _tag(image, _PHOTOMETRIC, 1) == _WHITE_IS_ZERO else found


def eight_bit(image: Image.Image, levels: Levels | None) -> Image.Image:
    """Scale deep greyscale to 8 bits, which convert() would clip."""
    if levels is None:
        return image
    values = np.clip(np.asarray(image, np.float64), min(levels), max(levels))
    shares = (np.nan_to_num(values, nan=levels.black) - levels.black) / ((levels.white - levels.black) or 1.0)
    return Image.fromarray((shares * 255 + 0.5).astype(np.uint8))


def narrow_transparency(image: ImageFile.ImageFile, bits: int) -> None:
    """Scale the transparent colour of a PNG as Pillow scales its pixels.

    bits: of a channel. Pillow leaves the colour as the file has it, which then matches no pixel. Grey of 16 bits stays
    as it is in both.
    """
    key = image.info.get("transparency")
    if image.mode == "L" and isinstance(key, int):
        image.info["transparency"] = key * 255 // (2**bits - 1)
    elif image.mode == "RGB" and isinstance(key, tuple) and bits == 16:
        image.info["transparency"] = tuple(value >> 8 for value in key)


def deep_alpha(image: Image.Image) -> npt.NDArray[np.uint8] | None:
    """Return the alpha of deep greyscale with a transparent value, else None."""
    key = image.info.get("transparency")
    if not (image.mode.startswith("I") and isinstance(key, int)):
        return None
    return np.where(np.asarray(image) == key, 0, 255).astype(np.uint8)


def _float_levels(image: Image.Image) -> Levels | None:
    """Return the usual levels that all values lie within, or None."""
    lowest, highest = _extremes(image)
    if lowest >= 0 and highest <= 1:
        return Levels(0.0, 1.0)
    return Levels(0.0, 255.0) if lowest >= 0 and 255 * _DARK < highest <= 255 else None


def _integer_levels(image: ImageFile.ImageFile, name: str, warnings: list[str]) -> Levels | None:
    if bits := _significant_bits(image):
        return Levels(0.0, 2.0**bits - 1)
    lowest, highest = _extremes(image)
    if image.mode == "I" and lowest < 0 and _tag(image, _SAMPLE_FORMAT, _UNSIGNED) == _UNSIGNED:
        # Pillow's numbers have a sign: the brighter half of these would become black.
        raise BadImage(f"{name} uses all of 32 bits a pixel, which is not read.", hint=f"Please {EXPORT}")
    if lowest < 0 or highest > 65535:
        return None
    if 0 < highest < 65535 * _DARK:
        warnings.append(
            f"{name} is nearly black: its brightest value is {highest:.0f} of 65535. Does it hold fewer than 16 bits?"
        )
    return Levels(0.0, 65535.0)


def _significant_bits(image: ImageFile.ImageFile) -> int | None:
    """Return the bits below 16 that a greyscale file declares, else None."""
    highest, bits = int(_tag(image, _MAX_SAMPLE, 0)), int(_tag(image, _BITS, 16))
    if 0 < highest < 65535:
        return highest.bit_length()
    return bits if 0 < bits < 16 else None


def _tag(image: ImageFile.ImageFile, number: int, default: float) -> float:
    """Return the first value of a TIFF's tag."""
    value = (getattr(image, "tag_v2", None) or {}).get(number, default)
    return value[0] if isinstance(value, tuple) else value


def _extremes(image: Image.Image) -> tuple[float, float]:
    """Return the lowest and the highest finite value."""
    width, height = image.size
    rows = max(1, _STRIP // width)
    lowest, highest = np.inf, -np.inf
    for top in range(0, height, rows):
        values = np.asarray(image.crop((0, top, width, min(top + rows, height))))
        finite = values[np.isfinite(values)] if image.mode == "F" else values
        if finite.size:
            lowest, highest = min(lowest, float(finite.min())), max(highest, float(finite.max()))
    return (lowest, highest) if lowest <= highest else (0.0, 0.0)
