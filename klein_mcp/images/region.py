"""Changing a part and nothing else: where an edit may paint, what the model sees of it, and how it is put back."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.contract import ChangeMask, Rgb8
from klein_mcp.errors import RequestError
from klein_mcp.images import codec, preserve
from klein_mcp.jobs.request import MAX_AREA

SEAM = 16
"""Pixels inside the mask over which old turns into new."""

WORK_AREA = MAX_AREA
"""Pixels: the most that is sent to the engine; what is larger is worked on at this size."""

# A region smaller than this share of the picture is shown to the model close up, with as much again around it.
_SMALL = 0.25
_LEAST_SURROUNDINGS = 128

# Of 255: so near to black or white is what JPEG makes of them. Soft edges stay below the share.
_NEARLY = 48
_UNCLEAR = 0.2

Mask = npt.NDArray[np.bool_]
Box = tuple[int, int, int, int]
"""left, top, right, bottom: pixels, right and bottom not included."""


@dataclass(frozen=True, slots=True)
class EditRegion:
    """The part of a picture that the model works on, and where in it it may leave a trace.

    box: the part, in pixels of the picture. mask: [height, width] of the whole picture; None where all may change.
    """

    box: Box
    mask: Mask | None

    @property
    def part_of_more(self) -> bool:
        """Whether the model sees less than the whole picture."""
        return self.mask is not None and (self.box[3] - self.box[1], self.box[2] - self.box[0]) != self.mask.shape

    def cut(self, image: Rgb8) -> Rgb8:
        """What the model gets to see."""
        left, top, right, bottom = self.box
        part = np.ascontiguousarray(image[top:bottom, left:right])
        height, width = part.shape[:2]
        scale = (WORK_AREA / (width * height)) ** 0.5
        return part if scale >= 1 else codec.resize(part, max(1, int(width * scale)), max(1, int(height * scale)))

    def opacity(self, change: ChangeMask | None = None) -> npt.NDArray[np.uint8] | None:
        """0 where the part keeps the image's own bytes, 255 where it is painted; None where all of it is painted.

        change: where the engine found that the edit changed anything, in pixels of what `cut` returned.
        """
        left, top, right, bottom = self.box
        seam = None if self.mask is None else _seam(self.mask[top:bottom, left:right])
        if change is None or change.whole:
            return seam
        found = codec.resize_mask(change.opacity, right - left, bottom - top)
        return found if seam is None else np.minimum(seam, found)

    def paste(self, painted: Rgb8, image: Rgb8, change: ChangeMask | None = None) -> Rgb8:
        """Return the image with the painted part in it; where the opacity is 0, every byte is the image's own."""
        left, top, right, bottom = self.box
        part = codec.resize(painted, right - left, bottom - top)
        opacity = self.opacity(change)
        return part if opacity is None else preserve.put_back(part, image, opacity, (left, top))


def patch(image: Rgb8, region: Sequence[int] | None, mask: "Rgb8 | None") -> EditRegion:
    """region: x, y, width, height. mask: white where it may change. Both: where they meet. Raises RequestError."""
    height, width = image.shape[:2]
    if region is None and mask is None:
        return EditRegion((0, 0, width, height), None)
    may = np.ones((height, width), bool)
    if mask is not None:
        may &= _white(mask, width, height)
    if region is not None:
        may &= _inside(region, width, height)
    if not may.any():
        raise RequestError(
            "Region and mask do not meet." if region is not None else "The mask is black everywhere.",
            hint="White in the mask is what may change.",
        )
    rows, columns = np.flatnonzero(may.any(1)), np.flatnonzero(may.any(0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    return EditRegion(_surroundings(box, width, height), may)


def doubt(mask: Rgb8) -> tuple[str, ...]:
    """A word where a mask looks like a picture: it is cut at half brightness, whatever it shows."""
    low, high = mask.min(axis=2), mask.max(axis=2)
    unclear = float(((high >= _NEARLY) & (low <= 255 - _NEARLY)).mean())
    if unclear <= _UNCLEAR:
        return ()
    return (f"{unclear:.0%} of the mask is neither black nor white; what is brighter than half was taken as white",)


def check(region: Sequence[int], width: int, height: int) -> Box:
    """Raises RequestError for a region that is not wholly inside a picture of this size."""
    x, y, wide, high = region
    if x < 0 or y < 0 or wide < 1 or high < 1 or x + wide > width or y + high > height:
        raise RequestError(
            f"region {list(region)} does not fit: the picture is {width}×{height}.",
            hint="region is [x, y, width, height] in pixels, x + width and y + height within the picture.",
        )
    return x, y, x + wide, y + high


def _inside(region: Sequence[int], width: int, height: int) -> Mask:
    left, top, right, bottom = check(region, width, height)
    inside = np.zeros((height, width), bool)
    inside[top:bottom, left:right] = True
    return inside


def _white(mask: Rgb8, width: int, height: int) -> Mask:
    if mask.shape[:2] != (height, width):
        raise RequestError(
            f"The mask is {mask.shape[1]}×{mask.shape[0]} but the picture is {width}×{height}.",
            hint="Send a mask of the picture's own size.",
        )
    return mask.mean(axis=2) > 127


def _surroundings(box: Box, width: int, height: int) -> Box:
    """The whole picture; for a small region, the region in the middle of twice its sides."""
    left, top, right, bottom = box
    if (right - left) * (bottom - top) >= _SMALL * width * height and width * height <= WORK_AREA:
        return 0, 0, width, height
    across = max(right - left, _LEAST_SURROUNDINGS) // 2
    along = max(bottom - top, _LEAST_SURROUNDINGS) // 2
    return max(0, left - across), max(0, top - along), min(width, right + across), min(height, bottom + along)


def _seam(mask: Mask) -> npt.NDArray[np.uint8]:
    """0 outside; inside, rising to 255 over at most SEAM pixels from the mask's edge. The picture's own edge is none.

    mask: of a patch, which reaches beyond the white on every side where there is more picture.
    """
    depth = np.zeros(mask.shape, np.uint8)
    left = mask.copy()
    for _ in range(SEAM):
        depth += left
        left = _eroded(left)
        if not left.any():
            break
    # Full strength is the deepest place near by: a thin line beside a broad spot may change as much as the spot.
    deepest = depth
    for _ in range(SEAM):
        deepest = _spread(deepest, mask)
    return np.rint(255 * depth.astype(np.float32) / np.maximum(deepest, 1)).astype(np.uint8)


def _eroded(mask: Mask) -> Mask:
    padded = np.pad(mask, 1, mode="edge")
    return mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]


def _spread(depth: npt.NDArray[np.uint8], mask: Mask) -> npt.NDArray[np.uint8]:
    """Each place of the mask as deep as the deepest of its neighbours."""
    padded = np.pad(depth, 1)
    across = np.maximum(np.maximum(padded[:, :-2], padded[:, 1:-1]), padded[:, 2:])
    return np.maximum(np.maximum(across[:-2], across[1:-1]), across[2:]) * mask
