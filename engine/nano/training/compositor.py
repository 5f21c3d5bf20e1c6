"""Renders scenes: backgrounds and sprites composited in batches, on any device."""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from engine.nano.training.frames import SIZES, Frame
from engine.nano.training.sprites import KINDS, atlas
from engine.nano.words import COLOURS, SCENES

BACKGROUNDS: tuple[str, ...] = (*COLOURS, *SCENES)
"""Every background: flat colours first, then the painted scenes. A background is an index into this."""

Rgb = tuple[int, int, int]


class _Brush:
    """Paints a background on a canvas of any size.

    Heights and levels are 0 … 1.
    """

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.pixel = min(width, height) / 128
        """Pixels in one unit of a square canvas."""
        self.image = np.zeros((height, width, 3))

    def gradient(self, *stops: tuple[float, Rgb]) -> np.ndarray:
        """Return [height, width, 3], from top to bottom through (height, colour)."""
        heights, colours = zip(*stops, strict=True)
        y = (np.arange(self.height) + 0.5) / self.height
        rows = np.stack([np.interp(y, heights, channel) for channel in np.array(colours, dtype=float).T], axis=-1)
        return np.repeat(rows[:, None], self.width, axis=1)

    def fill(self, *stops: tuple[float, Rgb]) -> None:
        self.image = self.gradient(*stops)

    def below(self, level: float, waves: tuple[float, float, float], colour: np.ndarray | Rgb) -> None:
        """Fill everything under a wave line, its edge one pixel soft.

        waves: height, turns, phase.
        """
        height, turns, phase = waves
        x = np.arange(self.width) / self.width
        line = self.height * level - self.pixel * height * np.sin(2 * math.pi * (turns * x + phase))
        y = np.arange(self.height)[:, None] + 0.5
        self._cover(np.clip(y - line[None] + 0.5, 0, 1), colour)

    def disc(self, x: float, y: float, radius: float, colour: Rgb) -> None:
        """Paint a disc.

        x, y: in 128ths of the sides. radius: in units.
        """
        ys, xs = np.mgrid[0 : self.height, 0 : self.width] + 0.5
        away = np.hypot(xs - x * self.width / 128, ys - y * self.height / 128)
        self._cover(np.clip(radius * self.pixel - away + 0.5, 0, 1), colour)

    def block(self, left: float, top: float, right: float, bottom: float, colour: Rgb) -> None:
        """Paint a rectangle given in 128ths of the sides."""
        ys, xs = np.mgrid[0 : self.height, 0 : self.width] + 0.5
        x, y = xs * 128 / self.width, ys * 128 / self.height
        self._cover(((x > left) & (x < right) & (y > top) & (y < bottom)).astype(float), colour)

    def _cover(self, cover: np.ndarray, colour: np.ndarray | Rgb) -> None:
        self.image = self.image * (1 - cover[..., None]) + np.asarray(colour) * cover[..., None]


def _grass(brush: _Brush) -> None:
    brush.fill((0.0, (115, 185, 245)), (0.7, (190, 225, 250)))
    brush.below(0.66, (5, 1.0, 0.3), brush.gradient((0.6, (95, 175, 65)), (1.0, (70, 140, 50))))


def _desert(brush: _Brush) -> None:
    brush.fill((0.0, (250, 215, 150)), (0.6, (252, 232, 190)))
    brush.below(0.6, (6, 0.9, 0.1), (225, 180, 110))
    brush.below(0.72, (7, 0.8, 0.55), (205, 155, 90))


def _ocean(brush: _Brush) -> None:
    brush.fill((0.0, (120, 190, 240)), (0.55, (205, 232, 248)))
    brush.below(0.55, (2.5, 4.0, 0.0), brush.gradient((0.5, (50, 130, 195)), (1.0, (20, 75, 140))))


def _night(brush: _Brush) -> None:
    brush.fill((0.0, (12, 14, 45)), (1.0, (48, 38, 105)))
    stars = ((10, 14), (30, 50), (20, 90), (46, 22), (60, 64), (52, 108), (76, 36), (84, 88), (112, 60), (118, 110))
    for i, (x, y) in enumerate(stars):
        brush.disc(x, y, 1.2 + 0.5 * (i % 2), (235, 235, 245))
    brush.disc(108, 20, 9, (245, 240, 200))


def _snow(brush: _Brush) -> None:
    brush.fill((0.0, (140, 165, 205)), (0.7, (195, 210, 228)))
    brush.below(0.7, (4, 0.75, 0.0), (246, 249, 253))
    for x, y in ((14, 18), (38, 40), (24, 70), (58, 12), (66, 52), (88, 30), (100, 66), (116, 16), (120, 46)):
        brush.disc(x, y, 1.7, (250, 250, 252))


def _sunset(brush: _Brush) -> None:
    brush.fill((0.0, (110, 60, 140)), (0.35, (215, 100, 120)), (0.7, (255, 155, 70)))
    brush.disc(64, 88, 18, (255, 225, 110))
    brush.below(0.7, (0, 0, 0), (62, 32, 70))


def _clouds(brush: _Brush) -> None:
    brush.fill((0.0, (85, 160, 235)), (1.0, (185, 220, 250)))
    for x, y, radius in ((20, 26, 8), (31, 22, 10), (42, 27, 7), (92, 60, 8), (103, 56, 11), (115, 61, 8),
                         (30, 104, 7), (40, 100, 9), (50, 105, 6)):  # fmt: skip
        brush.disc(x, y, radius, (244, 248, 252))


def _room(brush: _Brush) -> None:
    brush.fill((0.0, (236, 222, 196)), (1.0, (226, 208, 178)))
    brush.block(0, 92, 128, 128, (172, 120, 78))
    brush.block(0, 88, 128, 92, (250, 246, 238))
    for y in (101, 113):
        brush.block(0, y, 128, y + 1, (146, 98, 60))


def _beach(brush: _Brush) -> None:
    brush.fill((0.0, (105, 190, 240)), (0.5, (200, 235, 250)))
    brush.below(0.5, (0, 0, 0), brush.gradient((0.5, (40, 150, 200)), (0.75, (80, 195, 215))))
    brush.below(0.72, (3, 1.5, 0.2), (250, 250, 245))
    brush.below(0.75, (3, 1.5, 0.2), (238, 214, 160))


def _forest(brush: _Brush) -> None:
    brush.fill((0.0, (150, 200, 160)), (0.7, (205, 228, 190)))
    for x in (10, 30, 50, 78, 98, 118):
        brush.block(x - 3, 10, x + 3, 100, (92, 66, 46))
    for i in range(9):
        brush.disc(16 * i, 8 + 4 * (i % 2), 13, (60, 120, 70))
    brush.below(0.75, (3, 2.0, 0.4), (74, 104, 52))


def _space(brush: _Brush) -> None:
    brush.fill((0.0, (8, 6, 18)), (0.5, (36, 14, 52)), (1.0, (8, 10, 30)))
    stars = ((8, 30), (22, 8), (28, 70), (40, 40), (50, 100), (57, 16), (66, 68), (80, 118), (84, 34), (97, 88),
             (104, 12), (112, 52), (121, 104))  # fmt: skip
    for i, (x, y) in enumerate(stars):
        brush.disc(x, y, 0.9 + 0.4 * (i % 3), (225, 225, 240))
    brush.disc(20, 106, 13, (120, 80, 150))


def _city(brush: _Brush) -> None:
    brush.fill((0.0, (150, 190, 225)), (0.8, (225, 230, 235)))
    for i, top in enumerate((52, 34, 60, 44, 26, 56, 40, 62)):
        shade = 96 + 14 * (i % 3)
        brush.block(16 * i, top, 16 * i + 15, 108, (shade, shade + 6, shade + 18))
        for y in range(top + 6, 100, 20):
            brush.block(16 * i + 4, y, 16 * i + 11, y + 7, (240, 226, 160))
    brush.block(0, 108, 128, 128, (88, 88, 92))


_PAINTED = {"grass": _grass, "desert": _desert, "ocean": _ocean, "night": _night, "snow": _snow, "sunset": _sunset,
            "clouds": _clouds, "room": _room, "beach": _beach, "forest": _forest, "space": _space,
            "city": _city}  # fmt: skip


@lru_cache(maxsize=16)
def backgrounds(frame: Frame) -> np.ndarray:
    """Return [backgrounds, height, width, 3] uint8, in the order of BACKGROUNDS."""
    width, height = frame.pixels
    images = [np.broadcast_to(np.array(colour, dtype=float), (height, width, 3)) for colour in COLOURS.values()]
    for name in SCENES:
        brush = _Brush(width, height)
        _PAINTED[name](brush)
        images.append(brush.image)
    return np.stack(images).round().astype(np.uint8)


class Compositor(nn.Module):
    """Renders batches of scenes without files or Pillow, on any device.

    sprites: every sprite's pixels in one row, [pixels, 4] premultiplied; `first` says where those of a size begin.
    """

    sprites: Tensor
    first: Tensor
    sides: Tensor

    def __init__(self, scale: int = 1, compiled: bool = False) -> None:
        super().__init__()
        self.compiled = compiled
        cells = [torch.from_numpy(cell).reshape(-1, 4) for cell in atlas(scale)]
        sides = torch.tensor([scale * side for side in SIZES])
        counts = torch.tensor([0, *(len(cell) for cell in cells[:-1])])
        self.scale = scale
        self.register_buffer("sprites", torch.cat(cells))
        self.register_buffer("sides", sides)
        self.register_buffer("first", counts.cumsum(0))
        self._backdrops: dict[Frame, Tensor] = {}

    def backdrop(self, frame: Frame) -> Tensor:
        """Return [backgrounds, 3, height, width] uint8."""
        if frame not in self._backdrops:
            images = torch.from_numpy(backgrounds(frame)).permute(0, 3, 1, 2).contiguous()
            self._backdrops[frame] = images.to(self.sprites.device)
        return self._backdrops[frame]

    def forward(self, frame: Frame, background: Tensor, kind: Tensor, size: Tensor, centre: Tensor) -> Tensor:
        """Return images [b, 3, height, width] in [-1, 1].

        background: [b]. kind: [b, things], -1 for none. size: [b, things], an index into SIZES.
        centre: [b, things, 2] in pixels (x, y). Later things lie in front.
        """
        image = self.backdrop(frame)[background].float()
        lay = _compiled_lay() if self.compiled else _lay
        for k in range(kind.shape[1]):
            side = self.sides[size[:, k]]
            start = self.first[size[:, k]] + kind[:, k].clamp(min=0) * side * side
            left, top = (centre[:, k] - side[:, None] // 2).unbind(-1)
            # A thing that is missing has no pixels.
            side = torch.where(kind[:, k] >= 0, side, 0)
            image = lay(image, self.sprites, *(x.int() for x in (left, top, side, start)))
        return image / 127.5 - 1


def _lay(image: Tensor, sprites: Tensor, left: Tensor, top: Tensor, side: Tensor, start: Tensor) -> Tensor:
    """Composite one sprite onto each image, [b, 3, h, w].

    left, top, side: [b] in pixels. start: [b], a row of `sprites`.
    """
    height, width = image.shape[-2:]
    left, top, side, start = (x[:, None, None] for x in (left, top, side, start))
    x = torch.arange(width, device=image.device, dtype=torch.int32) - left
    y = torch.arange(height, device=image.device, dtype=torch.int32)[:, None] - top
    inside = (x >= 0) & (x < side) & (y >= 0) & (y < side)
    # Pixels outside the sprite read the first one of all and are masked.
    index = torch.where(inside, start + y * side + x, 0)
    sprite = (sprites[index] * inside[..., None]).permute(0, 3, 1, 2)
    return image * (1 - sprite[:, 3:] / 255) + sprite[:, :3]


@lru_cache(maxsize=1)
def _compiled_lay() -> Callable[..., Tensor]:
    return torch.compile(_lay, dynamic=True)


def as_tensor(images: list[np.ndarray]) -> Tensor:
    """Return uint8 images as [b, 3, h, w] in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def as_uint8(images: Tensor) -> list[np.ndarray]:
    """Return images in [-1, 1] as [h, w, 3] uint8 each."""
    return list(((images + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy())


@lru_cache(maxsize=1)
def visibility() -> np.ndarray:
    """Return which objects stand out from which backgrounds, [kinds, backgrounds].

    An object of normal size in the middle does when more than 40 % of its opaque pixels differ by more than 40
    (of 255) in some channel.
    """
    sprites = atlas()[1].astype(np.float32)
    frame = Frame()
    left, top, right, bottom = frame.box(1, (0, 0))
    grounds = backgrounds(frame)[:, top:bottom, left:right].astype(np.float32)
    solid = sprites[..., 3] > 200
    seen = np.zeros((len(KINDS), len(BACKGROUNDS)), bool)
    for k, sprite in enumerate(sprites):
        differs = np.abs(sprite[..., :3] - grounds).max(axis=-1) > 40
        seen[k] = differs[:, solid[k]].mean(axis=1) > 0.4
    return seen
