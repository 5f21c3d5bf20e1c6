"""Writes what nano knows into its klein.json: `python -m engine.nano.training.metadata FOLDER`."""

import colorsys
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from engine.nano.training.sprites import atlas
from engine.nano.words import COLOURS, KNOWN, NOUNS, SHAPES

_SHARE = 0.15
"""Of a sprite's opaque pixels: a colour with fewer is not one a person would name the thing by."""


def vocabulary() -> dict[str, Any]:
    """Return the vocabulary: all words, nouns with their colours, shapes, colours."""
    largest = atlas()[-1]
    nouns = {noun: _colours(largest[i]) for i, noun in enumerate(NOUNS)}
    return {"words": sorted(KNOWN), "nouns": nouns, "shapes": sorted(SHAPES), "colours": list(COLOURS)}


def _colours(sprite: np.ndarray) -> list[str]:
    """Return the names of a sprite's main colours, the largest area first.

    sprite: premultiplied.
    """
    opaque = sprite[sprite[..., 3] > 250][:, :3]
    found = Counter(_name(*(channel / 255 for channel in pixel)) for pixel in opaque.tolist())
    return [name for name, count in found.most_common() if count >= _SHARE * len(opaque)]


def _name(red: float, green: float, blue: float) -> str:
    """Return the name a person would give a colour.

    Decided by hue: the nearest of twelve RGB points is seldom that name.
    """
    hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
    if value < 0.22:
        return "black"
    if saturation < 0.18:
        return "white" if value > 0.82 else "gray"
    name = next(name for end, name in _HUES if 360 * hue < end)
    if name in ("red", "orange") and value < 0.7:
        return "brown"
    return "pink" if name in ("red", "orange") and saturation < 0.5 < value else name


_HUES = ((14, "red"), (42, "orange"), (68, "yellow"), (165, "green"), (195, "cyan"), (255, "blue"), (290, "purple"),
         (345, "pink"), (361, "red"))  # fmt: skip
"""Where each hue ends, in degrees."""


def write(folder: Path) -> None:
    """Put the vocabulary into the folder's klein.json."""
    path = folder / "klein.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | vocabulary()) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
