"""Conversion between RGB8 and tensors, and sizes of images and canvases.

Sizes are fitted to an area and to whole tokens.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from engine.contract import GRID, MIN_SIDE, Grey8, InvalidJob, Rgb8

MOST_ENLARGED = 4
"""Largest factor per side by which a crop is enlarged. Beyond it the model sees more blur than content."""
ENOUGH = 0.75
"""Share of a model's least area from which on an image is not enlarged: some shapes of whole tokens fill less."""
MAX_ASPECT = 8
"""Largest aspect ratio of a reference. Source: diffusers Flux2ImageProcessor.check_image_input."""


def to_tensor(image: Rgb8, device: torch.device | None = None) -> Tensor:
    """Convert an image to a tensor, on the device.

    [h, w, 3] uint8 -> [1, 3, h, w] fp32 in [-1, 1].
    """
    levels = rearrange(torch.from_numpy(np.array(image)).to(device), "h w c -> 1 c h w")
    return (levels.float() / 255.0).mul_(2.0).sub_(1.0)


def to_rgb8(pixels: Tensor) -> Rgb8:
    """Convert a tensor to an image, with values clamped.

    [1, 3, h, w] about [-1, 1] -> [h, w, 3] uint8.
    """
    # In place: on a CPU most of the time would go into the memory of five temporary images.
    levels = (pixels[0].float() / 2).add_(0.5).clamp_(0, 1).mul_(255).round_().to(torch.uint8)
    return rearrange(levels, "c h w -> h w c").contiguous().cpu().numpy()


def floor_grid(side: int, grid: int = GRID) -> int:
    """Return `side` rounded down to a multiple of `grid`."""
    return side // grid * grid


def ceil_grid(side: int, grid: int = GRID) -> int:
    """Return `side` rounded up to a multiple of `grid`."""
    return -(-side // grid) * grid


def size_for_aspect(aspect: tuple[int, int], area: int, grid: int = GRID) -> tuple[int, int]:
    """Return the size nearest to an aspect ratio and an area.

    Both sides are multiples of `grid`, and the area is never exceeded, unless a token does.
    Raises InvalidJob beyond 8:1.
    """
    ratio = aspect[0] / aspect[1]
    if not 1 / MAX_ASPECT <= ratio <= MAX_ASPECT:
        raise InvalidJob(f"The shape {aspect[0]}:{aspect[1]} is too long; at most {MAX_ASPECT}:1.")

    def miss(size: tuple[int, int]) -> float:
        width, height = size
        return abs(math.log(width / height / ratio)) + abs(math.log(width * height / area)) / 2

    heights = range(grid, int(math.sqrt(area / ratio)) + 2 * grid, grid)
    sizes = (
        (width, height)
        for height in heights
        for width in (floor_grid(int(height * ratio), grid), ceil_grid(int(height * ratio), grid))
    )
    # An area of few tokens may hold no long shape: then as many as it holds lie in one row.
    row = max(grid, floor_grid(area // grid, grid))
    few = (row, grid) if ratio >= 1 else (grid, row)
    return min((size for size in sizes if 0 < size[0] * size[1] <= area), key=miss, default=few)


def resize(image: Rgb8, width: int, height: int) -> Rgb8:
    """Resize to exactly width × height with Lanczos."""
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def fit_reference(image: Rgb8, area: int, grid: int = GRID, least: int = 0) -> Rgb8:
    """Return the reference as the model sees it.

    It has at most `area` pixels and is cropped at the centre to multiples of `grid`. A smaller one is enlarged to
    the area `least` (see ENOUGH), which is 0 for klein: it is never enlarged there.
    Raises InvalidJob if a side is under 64 or the aspect ratio beyond 8. Source: diffusers.
    """
    height, width = image.shape[:2]
    if min(width, height) < MIN_SIDE:
        raise InvalidJob(f"A reference of {width}×{height} is too small; each side needs {MIN_SIDE} pixels.")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InvalidJob(f"A reference of {width}×{height} is too long; at most {MAX_ASPECT}:1.", hint="Crop it first.")
    small = floor_grid(width, grid) * floor_grid(height, grid) < ENOUGH * min(least, area)
    if width * height > area or small:
        scale = math.sqrt((min(least, area) if small else area) / (width * height))
        # Of few tokens none is lost to rounding: 260 × 260 is 256 × 256, not 255. Klein's own are as in diffusers.
        across, along = (round(side * scale) if least else int(side * scale) for side in (width, height))
        # At least a token, which a long image in a small area would lack.
        image = resize(image, max(grid, across), max(grid, along))
        height, width = image.shape[:2]
    rows, columns = floor_grid(height, grid), floor_grid(width, grid)
    top, left = (height - rows) // 2, (width - columns) // 2
    return image[top : top + rows, left : left + columns]


@dataclass(frozen=True, slots=True)
class Canvas:
    """Letterbox: an image of any size on a canvas of whole tokens.

    The content is scaled evenly, and the rest is padding.

    width, height: of the requested image. content_width, content_height: of its content on the canvas, in the
    top left corner. canvas_width, canvas_height: multiples of grid, the pixels per token.
    """

    width: int
    height: int
    content_width: int
    content_height: int
    canvas_width: int
    canvas_height: int
    grid: int = GRID

    @classmethod
    def of(cls, width: int, height: int, area: int, least: int = 0, grid: int = GRID) -> "Canvas":
        """Return the canvas of at most `area` pixels for width × height.

        least: area to which a smaller image is enlarged, by at most MOST_ENLARGED a side.
        """
        enlarged = min(MOST_ENLARGED, math.sqrt(least / (width * height)))
        scale = min(max(1.0, enlarged), math.sqrt(area / (width * height)))
        if max(width, height) < MIN_SIDE:
            # An icon is enlarged to fill the smallest canvas.
            scale = max(scale, MIN_SIDE / max(width, height))
        smallest = ceil_grid(MIN_SIDE, grid)
        # Rounding up to whole tokens may exceed the area. Each iteration reduces the scale.
        while True:
            content_width, content_height = max(1, round(width * scale)), max(1, round(height * scale))
            canvas_width, canvas_height = (
                max(smallest, ceil_grid(side, grid)) for side in (content_width, content_height)
            )
            if canvas_width * canvas_height <= area or (canvas_width, canvas_height) == (smallest, smallest):
                return cls(width, height, content_width, content_height, canvas_width, canvas_height, grid)
            scale *= 0.99

    @property
    def tokens(self) -> tuple[int, int]:
        """Return the rows and columns of its tokens."""
        return self.canvas_height // self.grid, self.canvas_width // self.grid

    @property
    def exact(self) -> bool:
        """Whether canvas and image have the same size."""
        return (self.width, self.height) == (self.canvas_width, self.canvas_height)

    @property
    def enlarges(self) -> bool:
        """Whether the image is resampled from a smaller content."""
        return self.content_width < self.width or self.content_height < self.height

    def pad(self, image: Rgb8) -> Rgb8:
        """Return the image on its canvas.

        The padding repeats the edge, so that no border appears.
        """
        content = resize(image, self.content_width, self.content_height)
        bottom, right = self.canvas_height - self.content_height, self.canvas_width - self.content_width
        return np.pad(content, ((0, bottom), (0, right), (0, 0)), mode="edge")

    def crop(self, canvas: Rgb8) -> Rgb8:
        """Return the image at its exact size, cropped from a generated canvas."""
        return resize(canvas[: self.content_height, : self.content_width], self.width, self.height)

    def crop_mask(self, mask: Grey8) -> Grey8:
        """Return a mask of the canvas cropped and resized as by `crop`."""
        content = mask[: self.content_height, : self.content_width]
        if content.shape == (self.height, self.width):
            return content
        # Bilinear does not ring, so 0 stays 0 away from a change.
        return np.asarray(Image.fromarray(content).resize((self.width, self.height), Image.Resampling.BILINEAR))
