"""Images and image files that tests are about."""

import io
from typing import Any

import numpy as np
from PIL import Image

from engine.contract import Rgb8


def noise(width: int, height: int, seed: int = 0) -> Rgb8:
    """Noise, which compresses worst."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def scene(width: int, height: int) -> Rgb8:
    """A smooth image that shows every rotation and shift."""
    across = np.linspace(0, 255, width, dtype=np.float64)[None, :]
    along = np.linspace(0, 255, height, dtype=np.float64)[:, None]
    planes = (across + 0 * along, along + 0 * across, (across + along) / 2)
    return np.stack(planes, axis=-1).astype(np.uint8)


def file(image: Any, kind: str = "PNG", **options: Any) -> bytes:
    """An array or a Pillow image as the bytes of a file, written by Pillow."""
    opened = image if isinstance(image, Image.Image) else Image.fromarray(image)
    out = io.BytesIO()
    opened.save(out, kind, **options)
    return out.getvalue()


def pixels(data: bytes) -> Rgb8:
    """A file as Pillow reads it."""
    with Image.open(io.BytesIO(data)) as opened:
        return np.asarray(opened.convert("RGB"))
