"""Edit a part of an image: crop for the model, composite back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from engine.contract import ChangeMask, Rgb8
from klein_mcp.errors import RequestError
from klein_mcp.images import codec, preserve
from klein_mcp.images.mask import MID_TONES, NEAR
from klein_mcp.limits import MAX_AREA

SEAM = 16
"""Pixels: the most over which the old image fades into the new, inside the mask."""

SEAM_SHARE = 3
"""The fade is a third of the way from the mask's edge to its middle where that is less than SEAM."""

WORK_AREA = MAX_AREA
"""Pixels: the most that is sent to the engine; larger crops are scaled down to it."""

FINE_AREA = 2**20
"""Pixels: masks up to this are measured at every pixel."""

# A region smaller than this share of the image is cropped for the model, with a margin of the same size.
_SMALL = 0.25
_LEAST_MARGIN = 128
_WHOLE = 256**2
"""Pixels of an image that is sent whole: of a part of so few a model sees little, and nano knows whole scenes alone."""

_PLACES = (
    ("in the top left corner", "at the top", "in the top right corner"),
    ("on the left", "in the middle", "on the right"),
    ("in the bottom left corner", "at the bottom", "in the bottom right corner"),
)

Mask = npt.NDArray[np.bool_]


class Corners(NamedTuple):
    """A rectangle of pixels, right and bottom not included."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top


@dataclass(frozen=True, slots=True)
class EditRegion:
    """The crop for the model, and its pixels that may change.

    box: the crop, in pixels of the image. mask: [height, width] of the whole image; None if all may change.
    """

    box: Corners
    mask: Mask | None

    @property
    def is_partial(self) -> bool:
        """Return whether the model sees less than the whole image."""
        return self.mask is not None and (self.box.height, self.box.width) != self.mask.shape

    @property
    def place(self) -> str:
        """Name the ninth of the image that holds the mask's middle.

        "" where the model sees no more than the mask and its surroundings, and without a mask.
        """
        if self.mask is None or self.is_partial or self.mask.all() or not self.mask.any():
            return ""
        middles = [(np.flatnonzero(self.mask.any(axis=axis))[[0, -1]].sum() + 1) / 2 for axis in (1, 0)]
        row, column = (min(2, int(3 * middle / side)) for middle, side in zip(middles, self.mask.shape, strict=True))
        return _PLACES[row][column]

    def crop(self, image: Rgb8) -> Rgb8:
        """Return the part for the model, scaled down to WORK_AREA."""
        left, top, right, bottom = self.box
        part = np.ascontiguousarray(image[top:bottom, left:right])
        height, width = part.shape[:2]
        scale = (WORK_AREA / (width * height)) ** 0.5
        return part if scale >= 1 else codec.resize(part, max(1, int(width * scale)), max(1, int(height * scale)))

    def opacity(self, change: ChangeMask | None = None) -> npt.NDArray[np.uint8] | None:
        """Return each pixel's share of the new image, of 255.

        change: where the engine found that the edit changed anything, in pixels of what `crop` returned.
        """
        left, top, right, bottom = self.box
        feather = None if self.mask is None else _feather(self.mask[top:bottom, left:right])
        if change is None or change.whole:
            return feather
        found = codec.resize_mask(change.opacity, self.box.width, self.box.height)
        return found if feather is None else np.minimum(feather, found)

    def composite(self, generated: Rgb8, image: Rgb8, change: ChangeMask | None = None) -> Rgb8:
        """Blend the generated crop into the image by its opacity."""
        part = codec.resize(generated, self.box.width, self.box.height)
        opacity = self.opacity(change)
        return part if opacity is None else preserve.put_back(part, image, opacity, (self.box.left, self.box.top))

    def faint_change(self, change: ChangeMask) -> tuple[float, preserve.Box] | None:
        """Return share and box of a faint change, of the whole image.

        None without one inside the mask: the rest of the crop is never kept.
        """
        if change.faint_box is None:
            return None
        rows, columns = change.opacity.shape
        across, down = self.box.width / columns, self.box.height / rows
        x, y, width, height = change.faint_box
        x, y, end, low = round(x * across), round(y * down), round((x + width) * across), round((y + height) * down)
        box = self.box.left + x, self.box.top + y, max(1, end - x), max(1, low - y)
        if self.mask is None:
            return change.faint, box
        if not self.mask[box[1] : box[1] + box[3], box[0] : box[0] + box[2]].any():
            return None
        return change.faint * self.box.width * self.box.height / self.mask.size, box

    def enlargement_warnings(self, generated: Rgb8) -> tuple[str, ...]:
        """Warn of a crop that was too large for the model."""
        width, height = self.box.width, self.box.height
        if generated.shape[:2] == (height, width):
            return ()
        seen = f"{generated.shape[1]}×{generated.shape[0]}"
        return (f"{width}×{height} is more than a model takes: edited at {seen}, then enlarged to {width}×{height}",)


def edit_region(image: Rgb8, region: Sequence[int] | None, mask: "Rgb8 | None") -> EditRegion:
    """Combine region and mask: their intersection may change. Raises RequestError.

    region: x, y, width, height. mask: white where the image may change.
    """
    height, width = image.shape[:2]
    if region is None and mask is None:
        return EditRegion(Corners(0, 0, width, height), None)
    allowed = np.ones((height, width), bool)
    if mask is not None:
        allowed &= _white(mask, width, height)
    if region is not None:
        allowed &= inside(region, width, height)
    if not allowed.any():
        raise RequestError(
            "Region and mask do not overlap." if region is not None else "The mask is black everywhere.",
            hint="White in the mask is what may change.",
        )
    rows, columns = np.flatnonzero(allowed.any(1)), np.flatnonzero(allowed.any(0))
    box = Corners(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    return EditRegion(_with_margin(box, width, height), allowed)


def mask_warnings(mask: Rgb8) -> tuple[str, ...]:
    """Warn if a mask has much grey, which is cut at half."""
    low, high = (preserve.across_channels(extreme, mask) for extreme in (np.minimum, np.maximum))
    grey = float(((high >= NEAR) & (low <= 255 - NEAR)).mean())
    if grey <= MID_TONES:
        return ()
    return (f"{grey:.0%} of the mask is neither black nor white; pixels brighter than half count as white",)


def region_box(region: Sequence[int], width: int, height: int) -> Corners:
    """Convert a region to its corners. Raises RequestError if outside."""
    x, y, wide, high = region
    if wide < 1 or high < 1:
        raise RequestError(
            f"region {list(region)} has no area.",
            hint="region is [x, y, width, height] in pixels; leave it out for the whole image.",
        )
    if x < 0 or y < 0 or x + wide > width or y + high > height:
        raise RequestError(
            f"region {list(region)} does not fit: the image is {width}×{height}.",
            hint="region is [x, y, width, height] in pixels, x + width and y + height within the image.",
        )
    return Corners(x, y, x + wide, y + high)


def inside(region: Sequence[int], width: int, height: int) -> Mask:
    """Return the mask of a region. Raises RequestError if it is outside."""
    left, top, right, bottom = region_box(region, width, height)
    mask = np.zeros((height, width), bool)
    mask[top:bottom, left:right] = True
    return mask


def _white(mask: Rgb8, width: int, height: int) -> Mask:
    if mask.shape[:2] != (height, width):
        raise RequestError(
            f"The mask is {mask.shape[1]}×{mask.shape[0]} but the image is {width}×{height}.",
            hint="Send a mask of the image's own size.",
        )
    return preserve.across_channels(np.add, mask.astype(np.uint16)) > 127 * mask.shape[2]


def _with_margin(box: Corners, width: int, height: int) -> Corners:
    """Return the whole image, or a small region with its margin."""
    left, top, right, bottom = box
    large = box.width * box.height >= _SMALL * width * height
    if width * height <= _WHOLE or (large and width * height <= WORK_AREA):
        return Corners(0, 0, width, height)
    across = max(box.width, _LEAST_MARGIN) // 2
    along = max(box.height, _LEAST_MARGIN) // 2
    return Corners(max(0, left - across), max(0, top - along), min(width, right + across), min(height, bottom + along))


def _feather(mask: Mask) -> npt.NDArray[np.uint8]:
    """Return opacity that rises to 255 inside the mask's edge.

    The image's own border is no edge. mask: of a crop, which reaches beyond the white wherever there is more image.
    """
    depth = _depth(mask, SEAM * SEAM_SHARE)
    seam = np.clip(_thickness(depth, mask).astype(np.float32) / SEAM_SHARE, 1, SEAM)
    return np.rint(255 * np.minimum(1, depth / seam)).astype(np.uint8)


def _depth(mask: Mask, most: int) -> npt.NDArray[np.uint8]:
    """Return each pixel's distance from the black, at most `most`.

    Measured along rows and columns.
    """
    depth = np.where(mask, most, 0).astype(np.uint8)
    for lines in (depth, depth.T):
        for there, back in ((lines, lines[1:]), (lines[::-1], lines[-2::-1])):
            for before, line in zip(there, back, strict=False):
                np.minimum(line, before + 1, out=line)
    return depth


def _thickness(depth: npt.NDArray[np.uint8], mask: Mask) -> npt.NDArray[np.uint8]:
    """Return the depth of the deepest pixel around each one.

    It counts as far as it is deep.

    So a thin line beside a broad spot, and one that hangs on it, has its own thickness. Of large images it is
    measured on every few pixels, so that 2048² take 0.4 s of one core.
    """
    step = max(1, round((mask.size / FINE_AREA) ** 0.5))
    thickness, inside = _coarse(depth, step), _coarse(mask.view(np.uint8), step)
    for distance in range(step, int(depth.max(initial=0)), step):
        thickness = np.maximum(thickness, _spread(thickness * (thickness > distance), inside))
    height, width = mask.shape
    return np.maximum(depth, thickness.repeat(step, 0).repeat(step, 1)[:height, :width])


def _coarse(values: npt.NDArray[np.uint8], step: int) -> npt.NDArray[np.uint8]:
    """Return the largest value of each block of step × step."""
    if step == 1:
        return values
    height, width = values.shape
    padded = np.pad(values, ((0, -height % step), (0, -width % step)))
    return padded.reshape(padded.shape[0] // step, step, padded.shape[1] // step, step).max((1, 3))


def _spread(depth: npt.NDArray[np.uint8], mask: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Raise each pixel of the mask to the deepest of its neighbours."""
    padded = np.pad(depth, 1)
    across = np.maximum(np.maximum(padded[:, :-2], padded[:, 1:-1]), padded[:, 2:])
    return np.maximum(np.maximum(across[:-2], across[1:-1]), across[2:]) * mask
