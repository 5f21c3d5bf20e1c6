"""Restore original pixels around a change, verify them, and measure the change."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.contract import Grey8, Rgb8

VISIBLE = 24
"""Difference in the channel that differs most, of 255. A smaller change is hard to see.

Of 46 local edits by nano, those without effect changed no pixel by more. The others changed at least 2.1 % by more."""
NOTHING = 0.002
"""Share of the pixels. An edit that visibly changed fewer had no effect."""
NOTHING_AREA = 128 * 128
"""Pixels: of larger images NOTHING counts as of this many, 33. An eye in a portrait of 1024² is 400 of a million."""
ALIKE = 0.02
"""Share of the pixels. Drafts that visibly differ by less show the same image.

Four seeds of nano: 0 for prompts in its words, 0.003 to 0.34 with words that it does not know."""
_OF_NINE = 5
"""Changed pixels among nine neighbours that make a change visible. The autoencoder makes lines of one pixel."""

_STRIP = 2**21
"""Pixels that are compared at a time."""

Box = tuple[int, int, int, int]
"""x, y, width, height in pixels."""


@dataclass(frozen=True, slots=True)
class VisibleChange:
    """The visible change of an edit.

    share: of the pixels the edit was allowed to change. box: the changed area, None if there is none.
    kept: some bytes are the original's, and this was verified on the stored file.
    had_effect: whether so many pixels changed that somebody would see it.
    """

    share: float
    box: Box | None
    kept: bool
    had_effect: bool = True

    def to_json(self) -> dict[str, object]:
        """Return the fields as they stand in a result.

        The box is null for an edit without effect.
        """
        box = list(self.box) if self.box and self.had_effect else None
        return {"share": self.share, "box": box, "kept": self.kept}


def put_back(painted: Rgb8, original: Rgb8, opacity: Grey8, at: tuple[int, int] = (0, 0)) -> Rgb8:
    """Return `original` with `painted` composited at (x, y).

    Bytes with opacity 0 stay as they are.
    """
    result = original.copy()
    box = bounding_box(opacity > 0)
    if box is None:
        return result
    x, y, width, height = box
    part = slice(y, y + height), slice(x, x + width)
    target = slice(at[1] + y, at[1] + y + height), slice(at[0] + x, at[0] + x + width)
    weight = opacity[part].astype(np.float32)[..., None] / 255
    old = original[target].astype(np.float32)
    # With weight 0 this is exactly the old value: float32 represents every uint8.
    result[target] = (old + weight * (painted[part].astype(np.float32) - old) + 0.5).astype(np.uint8)
    return result


def measure(result: Rgb8, original: Rgb8, allowed: npt.NDArray[np.bool_] | None = None, *, kept: bool) -> VisibleChange:
    """Measure the visible change.

    allowed: the pixels the edit was allowed to change, None for all.
    """
    visible = _without_lines(difference(result, original) > VISIBLE)
    if allowed is not None:
        visible &= allowed
    count = visible.size if allowed is None else int(np.count_nonzero(allowed))
    changed = int(np.count_nonzero(visible))
    had_effect = changed >= NOTHING * min(count, NOTHING_AREA) and changed > 0
    return VisibleChange(round(changed / max(1, count), 4), bounding_box(visible), kept, had_effect)


def are_alike(drafts: Sequence[Rgb8], changed: float = 1.0) -> bool:
    """Return whether several images hardly differ from the first.

    changed: the share that an edit changed, of which its drafts must differ by a part.
    """
    first, *others = drafts
    return all(measure(other, first, kept=False).share < ALIKE * changed for other in others)


def difference(a: Rgb8, b: Rgb8) -> Grey8:
    """Return each pixel's largest difference over the channels, of 255."""
    result = np.empty(a.shape[:2], np.uint8)
    rows = max(1, _STRIP // a.shape[1])
    for top in range(0, len(a), rows):  # a large image needs no second copy
        strip, other = a[top : top + rows], b[top : top + rows]
        larger = np.maximum(strip, other)
        np.subtract(larger, np.minimum(strip, other), out=larger)
        result[top : top + rows] = across_channels(np.maximum, larger)
    return result


def is_kept(stored: Rgb8, original: Rgb8, opacity: Grey8, at: tuple[int, int] = (0, 0)) -> bool:
    """Return whether all bytes outside the change are the original's.

    Outside means opacity 0, and everything beyond the mask. False if nothing is outside.
    """
    if opacity.shape == stored.shape[:2] and opacity.all():
        return False
    differs = across_channels(np.logical_or, stored != original)
    height, width = opacity.shape
    inside = differs[at[1] : at[1] + height, at[0] : at[0] + width]
    return int(np.count_nonzero(differs)) == int(np.count_nonzero(inside & (opacity > 0)))


def across_channels(combine: Callable[[Any, Any], Any], pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Combine the channels of [h, w, channels] to [h, w].

    numpy reduces an axis of three values one by one: 26 ms at 1024², whole planes 4.
    """
    return reduce(combine, (pixels[..., channel] for channel in range(pixels.shape[2])))


def bounding_box(mask: npt.NDArray[np.bool_]) -> Box | None:
    """Return the smallest box around true values, None without any."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        return None
    x, y = int(columns[0]), int(rows[0])
    return x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1


def _without_lines(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Remove parts of the mask that are only one pixel wide."""
    if not mask.any():
        return mask
    padded = np.pad(mask.astype(np.uint8), 1)
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return mask & (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] >= _OF_NINE)
