"""Tells flat drawings from detailed images, such as photographs."""

import numpy as np
from PIL import Image

from engine.contract import Rgb8

SIDE = 128
"""Pixels a side at which neighbours are compared."""
STEP = 4
"""Of 255: neighbours that differ by no more belong to one flat area."""
FLAT = 0.6
"""Share of flat pixels below which an image is detailed.

Scenes of the embedded model have at least 0.76, three photographs 0.09 to 0.45."""


def is_detailed(image: Rgb8) -> bool:
    """Return whether an image has more detail than a flat drawing."""
    small = np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX)).astype(np.int16)
    across = np.abs(np.diff(small, axis=1)).max(axis=2)[:-1]
    down = np.abs(np.diff(small, axis=0)).max(axis=2)[:, :-1]
    return float((np.maximum(across, down) <= STEP).mean()) < FLAT
