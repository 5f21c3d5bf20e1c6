"""Renders scenes: backgrounds and sprites composited in batches, on any device."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from engine.nano.training.sprites import KINDS, SIZES, atlas
from engine.nano.words import COLOURS, SCENES

CANVAS = 128
"""Side of every image of the world."""

BACKGROUNDS: tuple[str, ...] = (*COLOURS, *SCENES)
"""Every background: flat colours first, then the painted scenes. A background is an index into this."""


def _gradient(*stops: tuple[float, tuple[int, int, int]]) -> np.ndarray:
    """[side, side, 3], from top to bottom through (height, colour)."""
    heights, colours = zip(*stops, strict=True)
    y = (np.arange(CANVAS) + 0.5) / CANVAS
    rows = np.stack([np.interp(y, heights, channel) for channel in np.array(colours, dtype=float).T], axis=-1)
    return np.repeat(rows[:, None], CANVAS, axis=1)


def _below(image: np.ndarray, line: np.ndarray, colour: np.ndarray) -> None:
    """Fill everything under a line, with one soft pixel at its edge.

    heights: in pixels, one a column.
    """
    y = np.arange(CANVAS)[:, None] + 0.5
    cover = np.clip(y - line[None] + 0.5, 0, 1)[..., None]
    image[:] = image * (1 - cover) + colour * cover


def _wave(level: float, height: float, turns: float, phase: float) -> np.ndarray:
    x = np.arange(CANVAS) / CANVAS
    return CANVAS * level - height * np.sin(2 * math.pi * (turns * x + phase))


def _disc(image: np.ndarray, x: float, y: float, radius: float, colour: tuple[int, int, int]) -> None:
    ys, xs = np.mgrid[0:CANVAS, 0:CANVAS] + 0.5
    cover = np.clip(radius - np.hypot(xs - x, ys - y) + 0.5, 0, 1)[..., None]
    image[:] = image * (1 - cover) + np.array(colour) * cover


def _grass() -> np.ndarray:
    image = _gradient((0.0, (115, 185, 245)), (0.7, (190, 225, 250)))
    _below(image, _wave(0.66, 5, 1.0, 0.3), _gradient((0.6, (95, 175, 65)), (1.0, (70, 140, 50))))
    return image


def _desert() -> np.ndarray:
    image = _gradient((0.0, (250, 215, 150)), (0.6, (252, 232, 190)))
    _below(image, _wave(0.6, 6, 0.9, 0.1), np.array((225, 180, 110)))
    _below(image, _wave(0.72, 7, 0.8, 0.55), np.array((205, 155, 90)))
    return image


def _ocean() -> np.ndarray:
    image = _gradient((0.0, (120, 190, 240)), (0.55, (205, 232, 248)))
    _below(image, _wave(0.55, 2.5, 4.0, 0.0), _gradient((0.5, (50, 130, 195)), (1.0, (20, 75, 140))))
    return image


def _night() -> np.ndarray:
    image = _gradient((0.0, (12, 14, 45)), (1.0, (48, 38, 105)))
    stars = ((10, 14), (30, 50), (20, 90), (46, 22), (60, 64), (52, 108), (76, 36), (84, 88), (112, 60), (118, 110))
    for i, (x, y) in enumerate(stars):
        _disc(image, x, y, 1.2 + 0.5 * (i % 2), (235, 235, 245))
    _disc(image, 108, 20, 9, (245, 240, 200))
    return image


def _snow() -> np.ndarray:
    image = _gradient((0.0, (140, 165, 205)), (0.7, (195, 210, 228)))
    _below(image, _wave(0.7, 4, 0.75, 0.0), np.array((246, 249, 253)))
    for x, y in ((14, 18), (38, 40), (24, 70), (58, 12), (66, 52), (88, 30), (100, 66), (116, 16), (120, 46)):
        _disc(image, x, y, 1.7, (250, 250, 252))
    return image


def _sunset() -> np.ndarray:
    image = _gradient((0.0, (110, 60, 140)), (0.35, (215, 100, 120)), (0.7, (255, 155, 70)))
    _disc(image, 64, 88, 18, (255, 225, 110))
    _below(image, _wave(0.7, 0, 0, 0), np.array((62, 32, 70)))
    return image


_PAINTED = {"grass": _grass, "desert": _desert, "ocean": _ocean, "night": _night, "snow": _snow, "sunset": _sunset}


def backgrounds() -> np.ndarray:
    """[backgrounds, side, side, 3] uint8, in the order of BACKGROUNDS."""
    flat = [np.broadcast_to(np.array(colour, dtype=float), (CANVAS, CANVAS, 3)) for colour in COLOURS.values()]
    return np.stack([*flat, *(_PAINTED[name]() for name in SCENES)]).round().astype(np.uint8)


class Compositor(nn.Module):
    """Renders batches of scenes without files or Pillow, on any device.

    sprites: [kinds, sizes, largest, largest, 4]; smaller sizes lie in the top left corner of their cell.
    """

    backdrop: Tensor
    sprites: Tensor
    sides: Tensor

    def __init__(self) -> None:
        super().__init__()
        largest = SIZES[-1]
        cells = np.zeros((len(KINDS), len(SIZES), largest, largest, 4), np.uint8)
        for i, side in enumerate(SIZES):
            cells[:, i, :side, :side] = atlas()[side]
        self.register_buffer("backdrop", torch.from_numpy(backgrounds()).permute(0, 3, 1, 2).contiguous())
        self.register_buffer("sprites", torch.from_numpy(cells))
        self.register_buffer("sides", torch.tensor(SIZES))

    def forward(self, background: Tensor, kind: Tensor, size: Tensor, centre: Tensor) -> Tensor:
        """[b, 3, side, side] in [-1, 1].

        background: [b]. kind: [b, things], -1 for none. size: [b, things], an index into SIZES.
        centre: [b, things, 2] in pixels (x, y), on the half-pixel grid that an even side needs.
        """
        image = self.backdrop[background].float() / 255
        across = torch.arange(CANVAS, device=image.device)
        for k in range(kind.shape[1]):
            side = self.sides[size[:, k]]
            left_top = (centre[:, k] - side[:, None] / 2).round().long()
            x = across - left_top[:, :1]
            y = across - left_top[:, 1:]
            within = ((y >= 0) & (y < side[:, None]))[:, :, None] & ((x >= 0) & (x < side[:, None]))[:, None, :]
            within &= (kind[:, k] >= 0)[:, None, None]
            x, y = (axis.clamp(0, SIZES[-1] - 1) for axis in (x, y))
            cell = kind[:, k].clamp(min=0)[:, None, None], size[:, k][:, None, None]
            sprite = self.sprites[*cell, y[:, :, None], x[:, None, :]] * within[..., None]
            sprite = sprite.permute(0, 3, 1, 2).float() / 255
            image = image * (1 - sprite[:, 3:]) + sprite[:, :3]
        return image * 2 - 1
