"""Writes what nano knows into its klein.json."""

import colorsys
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from engine.nano.training.folder import load_extras
from engine.nano.training.sprites import atlas
from engine.nano.words import COLOURS, NOUNS, SHAPES, known

_SHARE = 0.15
"""Of a sprite's opaque pixels: a colour with fewer is not one a person would name the thing by."""


def vocabulary(nouns: int = len(NOUNS)) -> dict[str, Any]:
    """Return the vocabulary of a world of so many nouns.

    All words, nouns with their colours, shapes, colours.
    """
    largest = atlas()[-1]
    coloured = {noun: _colours(largest[i]) for i, noun in enumerate(tuple(NOUNS)[:nouns])}
    return {"words": sorted(known(nouns)), "nouns": coloured, "shapes": sorted(SHAPES), "colours": list(COLOURS)}


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


def write(folder: Path, **limits: int) -> None:
    """Put the vocabulary of the folder's nouns into its klein.json.

    limits: other entries, such as max_references.
    """
    extras = load_extras(folder)
    extras |= limits | vocabulary(len(extras["nouns"]))
    (folder / "klein.json").write_text(json.dumps(extras) + "\n")
