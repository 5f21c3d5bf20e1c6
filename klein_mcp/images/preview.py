"""The small preview image in a result, or a sheet of several."""

import io
import math
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from klein_mcp.images.alpha import Pixels, for_viewing

MAX_BYTES = 512_000
"""Never more: as base64 that is 683 KB, and a message must stay below 1,000,000 bytes (Claude Desktop refuses more)."""
AIM_BYTES = 300_000
LONG_EDGE = 1024
"""About 1,369 tokens to a Claude model at 1024²."""
QUALITIES = (85, 75, 65, 50)
LABELS = "ABCD"
GAP, BAND = 8, 24
"""Pixels between the cells of a sheet, and above each for its label."""


def preview(
    image: Pixels, *, longest: int = LONG_EDGE, aim: int = AIM_BYTES, most: int = MAX_BYTES
) -> tuple[bytes, str]:
    """Return (bytes, MIME) of a JPEG, on a plain colour if transparent.

    Quality goes down first, then size, until it fits.
    """
    full = Image.fromarray(for_viewing(image))
    scale = min(1.0, longest / max(full.size))
    while True:
        width, height = (max(1, round(edge * scale)) for edge in full.size)
        small = full if scale == 1 else full.resize((width, height), Image.Resampling.LANCZOS)
        data = b""
        for data in _encodings(small):
            if len(data) <= aim:
                return data, "image/jpeg"
        # The aim was missed at every quality: the hard limit decides whether a smaller size must be tried.
        if len(data) <= most or max(width, height) == 1:
            return data, "image/jpeg"
        scale *= min(0.75, (most / len(data)) ** 0.5)


def thumbnail(image: Pixels, longest: int) -> tuple[bytes, str]:
    """Return (bytes, MIME) of a small image for a page.

    What is transparent stays so: the page has a ground of its own for it.
    """
    if image.shape[2] == 3:
        return preview(image, longest=longest, aim=24_000, most=60_000)
    small = Image.fromarray(image)
    small.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    small.save(out, "WEBP", quality=80)
    return out.getvalue(), "image/webp"


def _within(image: Pixels, most: tuple[int, int]) -> Image.Image:
    shrunk = Image.fromarray(image)
    shrunk.thumbnail(most, Image.Resampling.LANCZOS)
    return shrunk


def _encodings(image: Image.Image) -> Iterator[bytes]:
    for quality in QUALITIES:
        out = io.BytesIO()
        image.save(out, "JPEG", quality=quality)
        yield out.getvalue()


def contact_sheet(
    images: Sequence[Pixels], labels: Sequence[str] = LABELS, columns: int = 2, longest: int = LONG_EDGE
) -> Pixels:
    """Arrange images in columns, each below its label.

    images: also grey ones, [height, width]. longest: the long edge of an image, where its cell is not smaller.
    """
    rows = math.ceil(len(images) / columns)
    cell = min(longest, LONG_EDGE // columns - GAP)
    most = cell, min(cell, LONG_EDGE // rows - GAP - BAND)
    shrunk = [_within(image if image.ndim == 2 else for_viewing(image), most) for image in images]
    font = ImageFont.load_default(18)
    width, height = (max(thumbnail.size[axis] for thumbnail in shrunk) for axis in (0, 1))
    # A label may be wider than a narrow image, and must not run into the next one.
    width = max(width, *(math.ceil(font.getlength(label)) for label in labels[: len(shrunk)]))
    sheet = Image.new("RGB", (columns * (width + GAP), rows * (height + GAP + BAND)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, thumbnail in enumerate(shrunk):
        left, top = index % columns * (width + GAP) + GAP // 2, index // columns * (height + GAP + BAND)
        draw.text((left, top), labels[index], fill="black", font=font)
        sheet.paste(thumbnail, (left + (width - thumbnail.width) // 2, top + BAND))
    return np.asarray(sheet)
