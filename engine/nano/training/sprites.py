"""Sprites of nano's objects: nouns from a sheet, shapes by geometry.

`python -m engine.nano.training.sprites FONT` renders the sheet anew from Noto Color Emoji
(Debian: fonts-noto-color-emoji). Reading the sheet needs no font.
"""

import math
import sys
import unicodedata
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from engine.nano.training.frames import SIZES
from engine.nano.words import COLOURS, NOUNS, SHAPES

CELL = 128
"""Side of a sprite on the sheet in pixels: the size at which the font stores its bitmaps."""
COLUMNS = 16
SHEET = Path(__file__).with_name("sprites.webp")
QUALITY = 88
"""Of the sheet's lossy compression: 208 sprites in about one megabyte."""

KINDS: tuple[str, ...] = (*NOUNS, *(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS))
"""Every object: nouns first, then each shape in each colour. An object is an index into this."""

_FONT_SIZE = 109
"""The one size at which the bitmaps of the font are stored."""
_OVERSAMPLE = 8


def _render(character: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """Return an emoji cropped to its ink, centred on a square cell."""
    canvas = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(canvas).text((8, 8), character, font=font, embedded_color=True)
    drawn = canvas.crop(canvas.getbbox())
    side = max(drawn.size)
    square = Image.new("RGBA", (side, side))
    square.paste(drawn, ((side - drawn.width) // 2, (side - drawn.height) // 2))
    # Premultiplied: the colour under transparent pixels must not bleed into the outline.
    return square.convert("RGBa").resize((CELL, CELL), Image.Resampling.LANCZOS).convert("RGBA")


def build_sheet(font_path: str) -> Image.Image:
    """Render all nouns of the vocabulary on one image, row by row."""
    font = ImageFont.truetype(font_path, _FONT_SIZE)
    rows = math.ceil(len(NOUNS) / COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * CELL, rows * CELL))
    for i, name in enumerate(NOUNS.values()):
        cell = _render(unicodedata.lookup(name), font)
        sheet.paste(cell, (i % COLUMNS * CELL, i // COLUMNS * CELL))
    return sheet


def _polygon(points: list[tuple[float, float]], side: int) -> Image.Image:
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).polygon([(x * side, y * side) for x, y in points], fill=255)
    return mask


def _turns(count: int, radius: float, inner: float, start: float = -0.5) -> list[tuple[float, float]]:
    """Return points on alternating radii round the centre.

    start: in half turns.
    """
    around = (math.pi * (start + i / count) for i in range(2 * count))
    return [
        (0.5 + (radius, inner)[i % 2] * math.cos(angle), 0.5 + (radius, inner)[i % 2] * math.sin(angle))
        for i, angle in enumerate(around)
    ]


def _heart(side: int) -> Image.Image:
    turns = [2 * math.pi * i / 200 for i in range(200)]
    points = [
        (
            0.5 + 16 * math.sin(a) ** 3 / 34,
            0.46 - (13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 34,
        )
        for a in turns
    ]
    return _polygon(points, side)


def _disc(side: int, *holes: float) -> Image.Image:
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    for radius, fill in zip((0.47, *holes), (255, 0), strict=False):
        draw.ellipse([(0.5 - radius) * side, (0.5 - radius) * side, (0.5 + radius) * side, (0.5 + radius) * side], fill)
    return mask


_CROSS = [(0.34, 0.03), (0.66, 0.03), (0.66, 0.34), (0.97, 0.34), (0.97, 0.66), (0.66, 0.66),
          (0.66, 0.97), (0.34, 0.97), (0.34, 0.66), (0.03, 0.66), (0.03, 0.34), (0.34, 0.34)]  # fmt: skip

_SHAPE_MASKS = {
    "circle": _disc,
    "square": lambda side: _polygon([(0.07, 0.07), (0.93, 0.07), (0.93, 0.93), (0.07, 0.93)], side),
    "triangle": lambda side: _polygon([(0.5, 0.05), (0.98, 0.92), (0.02, 0.92)], side),
    "star": lambda side: _polygon([(x, y + 0.03) for x, y in _turns(5, 0.5, 0.2)], side),
    "heart": _heart,
    "diamond": lambda side: _polygon([(0.5, 0.02), (0.9, 0.5), (0.5, 0.98), (0.1, 0.5)], side),
    "ring": lambda side: _disc(side, 0.26),
    "cross": lambda side: _polygon(_CROSS, side),
}


def _premultiplied(image: Image.Image, side: int) -> np.ndarray:
    return np.asarray(image.convert("RGBa").resize((side, side), Image.Resampling.LANCZOS).convert("RGBa"))


def _nouns() -> list[Image.Image]:
    sheet = Image.open(SHEET).convert("RGBA")
    corners = ((i % COLUMNS * CELL, i // COLUMNS * CELL) for i in range(len(NOUNS)))
    return [sheet.crop((left, top, left + CELL, top + CELL)) for left, top in corners]


def _shapes(side: int) -> list[Image.Image]:
    """Draw each shape in each colour, a little larger than `side`."""
    images = []
    for shape in SHAPES:
        mask = _SHAPE_MASKS[shape](side * _OVERSAMPLE)
        for colour in COLOURS.values():
            image = Image.new("RGBA", mask.size, (*colour, 0))
            image.putalpha(mask)
            # One reduction to twice the units of a big object; all sizes follow from it, as the nouns' from their cell.
            images.append(image.convert("RGBa").reduce(_OVERSAMPLE // 2).convert("RGBA"))
    return images


@lru_cache(maxsize=2)
def atlas(scale: int = 1) -> tuple[np.ndarray, ...]:
    """Return all sprites of each size, [kinds, side, side, 4] uint8.

    They are premultiplied, in the order of KINDS. scale: pixels per unit of SIZES.
    """
    images = [*_nouns(), *_shapes(SIZES[-1])]
    return tuple(np.stack([_premultiplied(image, scale * side) for image in images]) for side in SIZES)


if __name__ == "__main__":
    build_sheet(sys.argv[1]).save(SHEET, quality=QUALITY, method=6)
