"""Change mask of an edit, from the round trip of its reference.

Every pixel of an edit went through the autoencoder, so most of its difference to the original is the autoencoder's.
Unchanged parts equal the round trip, decode(encode(original)), not the original.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

HIGH = 12.0
"""Least distance, of 255, at which a change begins. Tuned on nano's held-out edits, see `engine/nano/README.md`."""
NOISE = 6.0
"""A change begins at this multiple of the image's own noise, where that is above HIGH."""
HIGHEST = 2.5 * HIGH
"""Upper limit of the threshold: a global edit leaves no quiet part to measure the noise on."""
LOW = 0.5
"""Share of the threshold down to which a change continues from its seeds."""
QUIET = 0.4
"""Quantile of the distance that counts as noise: most edits leave more than this share of the image unchanged."""
TEXTURE = 40.0
"""Local contrast, of 255, that doubles the threshold: a small misregistration weighs more at edges."""
FRAME = 2
"""Border pixels judged by their inner neighbours: the convolutions' padding makes the autoencoder wrong there."""
STEPS = 16
"""Cells of a few pixels that a change continues from its seeds."""
SMALLEST = 12
"""Fewer changed pixels in a window of 9 × 9 are noise."""
CLOSED = 4
"""Pixels: gaps up to twice as wide are closed."""
WHOLE = 0.6
"""An edit that changed more of the image than this is a global one. Local edits of nano reach 0.56."""
THREE_EDGES, FOUR_EDGES = 0.4, 0.2
"""Or one that changed half as much, and these shares of each of three edges, or of all four: a background behind an
object in the middle, at an edge or in a corner. A strip along one edge, such as a sky, leaves the opposite edge alone,
and is local up to 0.4 of the image. Of nano's 59 global edits four changed less than WHOLE, and at least 0.45 of three
edges. Of 391 local ones 32 changed more than half of WHOLE: one 0.52 of three edges, the others at most 0.15."""
DRIFT = 3.0
"""Colour drift, of 255, above which it is the edit itself if nothing else changed."""
MOST_DRIFT = 10.0
"""Colour drift, of 255, above which the edit is a global one whatever else changed. Of 125 local edits by nano none had
more than 3. Of 72 new backgrounds a desert for yellow or pink and a night for black had 16 to 36, and were taken for
drift: the old colour was put back behind pieces of the new."""
MOST_GAIN = 0.1
"""A gain farther from 1 is not colour drift but part of the edit."""
FAINT = 0.01
"""Share of the image: less near the threshold is not reported. Of 125 local edits by nano none left more than 0.006."""

# Luma and chroma of BT.601, and the weight of each in the distance.
_YCC = ((0.299, 0.587, 0.114), (-0.1687, -0.3313, 0.5), (0.5, -0.4187, -0.0813))
_WEIGHTS = (0.6, 0.5, 0.6)

Box = tuple[int, int, int, int]
"""x, y, width, height in pixels."""


@dataclass(frozen=True, slots=True)
class Change:
    """A change mask on the device.

    painted: [1, 3, h, w] in [-1, 1], shifted back, with the colours of the unchanged part matched.
    opacity: [h, w] float, 0 where nothing changed; it rises over a few pixels inside the change.
    whole: most of the image changed, so `painted` is the unmodified result and `opacity` is 1.
    faint, faint_box: share and box of pixels just below the threshold, left out of the mask.
    shift: whole pixels (right, down) by which the model had moved the image.
    drift: mean change of colour outside the change, of 255.
    """

    painted: Tensor
    opacity: Tensor
    whole: bool
    faint: float
    faint_box: Box | None
    shift: tuple[int, int]
    drift: float


def find_change(painted: Tensor, round_trip: Tensor) -> Change:
    """Compare an edit with the round trip of its reference.

    painted, round_trip: [1, 3, h, w], about [-1, 1].
    """
    painted, round_trip = painted.float().clamp(-1, 1), round_trip.float().clamp(-1, 1)
    texture = _texture(round_trip)
    distance = _distance(painted, round_trip, texture)
    shift = _shift(painted, round_trip, texture)
    if shift != (0, 0):
        painted = _shifted_back(painted, shift)
        distance = _distance(painted, round_trip, texture)
    matched, drift = _match_colours(painted, round_trip, distance < _threshold(distance))
    distance = _distance(matched, round_trip, texture)
    high = _threshold(distance)
    mask = _hysteresis(distance > high, distance > LOW * high)
    faint = _without_specks(distance > LOW * high) & (mask == 0)
    share = faint.float().mean().item()
    box = bounding_box(faint[0, 0]) if share >= FAINT else None
    if _is_whole(mask) or drift > MOST_DRIFT or (drift > DRIFT and not mask.any()):
        return Change(painted, torch.ones_like(mask)[0, 0], True, 0.0, None, shift, drift)
    return Change(matched, _ramp(mask)[0, 0], False, share, box, shift, drift)


def bounding_box(mask: Tensor) -> Box | None:
    """Return the smallest box around the true pixels, None without any.

    mask: [h, w].
    """
    rows, columns = mask.any(1).nonzero().flatten().tolist(), mask.any(0).nonzero().flatten().tolist()
    if not rows:
        return None
    return columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1


def _distance(a: Tensor, b: Tensor, texture: Tensor) -> Tensor:
    """Return the weighted distance of luma and chroma per pixel.

    Averaged over 3 × 3 pixels: [1, 1, h, w], about 0 … 255.
    """
    weighted = a.new_tensor(_YCC) * a.new_tensor(_WEIGHTS)[:, None] * 127.5
    distance = F.conv2d(a - b, weighted[..., None, None]).square().sum(1, keepdim=True).sqrt()
    distance = _mean(distance, 1) / (1 + texture / TEXTURE)
    height, width = distance.shape[-2:]
    frame = min(FRAME, (min(height, width) - 1) // 2)  # a narrow image may have no inner neighbours
    return F.pad(distance[..., frame : height - frame, frame : width - frame], (frame,) * 4, mode="replicate")


def _texture(image: Tensor) -> Tensor:
    """Return the local contrast of luma: [1, 1, h, w], of 255."""
    luma = F.conv2d(image, image.new_tensor(_YCC[:1])[..., None, None] * 127.5)
    return _mean(_dilated(luma, 1) + _dilated(-luma, 1), 1)


def _threshold(distance: Tensor) -> Tensor:
    values = distance.flatten()
    values = values[:: 1 + values.numel() // 16384]  # enough for a quantile
    return (NOISE * values.kthvalue(1 + int(QUIET * values.numel())).values).clamp(HIGH, HIGHEST)


def _hysteresis(seeds: Tensor, allowed: Tensor) -> Tensor:
    """Return a mask of allowed pixels within STEPS cells of a seed.

    Specks are dropped, gaps are closed, and the mask grows by a margin.
    """
    # Cells of a few pixels are cheaper and bridge gaps of one pixel. Labelling of components is slow on GPUs.
    height, width = seeds.shape[-2:]
    cell = _margin(seeds)
    grid, ways = (F.max_pool2d(mask.float(), cell, ceil_mode=True) for mask in (seeds, allowed))
    for _ in range(STEPS):
        grid = _dilated(grid, 1) * ways
    mask = F.interpolate(grid, scale_factor=cell)[..., :height, :width] * allowed
    mask = mask * _without_specks(mask > 0)
    return _dilated(-_dilated(-_dilated(mask, CLOSED), CLOSED), _margin(mask))


def _is_whole(mask: Tensor) -> bool:
    """Return whether the edit was a global one.

    That is, most of the image changed, or much of it and of its edges.
    """
    share = mask.mean()
    edges = (mask[..., 0, :], mask[..., -1, :], mask[..., :, 0], mask[..., :, -1])
    fourth, third, *_ = torch.stack([edge.mean() for edge in edges]).sort().values
    return bool((share > WHOLE) | ((share > WHOLE / 2) & ((third > THREE_EDGES) | (fourth > FOUR_EDGES))))


def _without_specks(mask: Tensor) -> Tensor:
    return mask & (_mean(mask.float(), 4) * 81 > SMALLEST - 0.5)


def _margin(mask: Tensor) -> int:
    """Return the width in pixels of the blend around a change.

    It is 2, and more in large images.
    """
    return max(2, min(mask.shape[-2:]) // 256)


def _ramp(mask: Tensor) -> Tensor:
    """Return the opacity, which rises inside the mask.

    The border of the image does not count as an edge of the mask.
    """
    margin = _margin(mask)
    return mask * (2 * _mean(mask, margin) - 1 + 1 / (2 * margin + 1)).clamp(0, 1)


def _match_colours(painted: Tensor, round_trip: Tensor, same: Tensor) -> tuple[Tensor, float]:
    """Undo a gain and an offset per channel, and return the drift.

    Both are fitted by least squares to the pixels that are the same. The drift is the mean change of colour there,
    of 255. Nothing is undone if these pixels are too few.
    """
    weight = same.float()
    count = weight.sum().clamp(min=1)
    mean, target = ((image * weight).sum((2, 3), keepdim=True) / count for image in (painted, round_trip))
    covariance = ((painted - mean) * (round_trip - target) * weight).sum((2, 3), keepdim=True) / count
    variance = ((round_trip - target).square() * weight).sum((2, 3), keepdim=True) / count
    # A flat region does not determine the gain.
    gain = torch.where(variance > 1e-3, covariance / variance.clamp(min=1e-6), 1.0)
    gain = torch.where((gain - 1).abs() <= MOST_GAIN, gain, 1.0)
    offset = mean - gain * target
    drift = 127.5 * ((gain - 1) * round_trip + offset).abs().mul(weight).sum() / (3 * count)
    if weight.mean() < 1 - WHOLE:
        return painted, 0.0
    return ((painted - offset) / gain).clamp(-1, 1), drift.item()


def _shift(painted: Tensor, round_trip: Tensor, texture: Tensor) -> tuple[int, int]:
    """Return the shift of `painted` against `round_trip`.

    The shift is in whole pixels (right, down), found by phase correlation, and at most a 64th of the
    shorter side: a larger shift is part of the edit.
    """
    textured = texture > TEXTURE / 4
    before = _median_distance(painted, round_trip, textured)
    # A few textured pixels could agree by chance. Most edits end here, without a transform.
    if before < HIGH / 8 or textured.float().mean() < 0.1:
        return 0, 0
    height, width = painted.shape[-2:]
    reach = max(2, min(height, width) // 64)
    if min(height, width) <= 2 * reach:
        return 0, 0  # a shift would leave nothing to compare
    window = torch.hann_window(height, device=painted.device)[:, None] * torch.hann_window(width, device=painted.device)
    first, second = (torch.fft.rfft2((image.mean(1)[0] - image.mean()) * window) for image in (painted, round_trip))
    cross = first * second.conj()
    peaks = torch.fft.irfft2(cross / cross.abs().clamp(min=1e-6), s=(height, width))
    near = torch.roll(peaks, (reach, reach), (0, 1))[: 2 * reach + 1, : 2 * reach + 1]
    row, column = divmod(int(near.argmax()), 2 * reach + 1)
    shift = column - reach, row - reach
    after = _median_distance(_shifted_back(painted, shift), round_trip, textured)
    # An object that moved is not the whole image: at least half of the texture must fit much better.
    return shift if after < 0.5 * before else (0, 0)


def _median_distance(painted: Tensor, round_trip: Tensor, where: Tensor) -> float:
    distance = _distance(painted, round_trip, torch.zeros_like(where, dtype=painted.dtype))[where]
    return distance.median().item() if distance.numel() else 0.0


def _shifted_back(image: Tensor, shift: tuple[int, int]) -> Tensor:
    """Return the image moved back by `shift`.

    Its border is repeated into the gap.
    """
    across, down = shift
    padded = F.pad(image, (max(0, -across), max(0, across), max(0, -down), max(0, down)), mode="replicate")
    top, left = max(0, down), max(0, across)
    return padded[..., top : top + image.shape[-2], left : left + image.shape[-1]]


def _dilated(x: Tensor, by: int) -> Tensor:
    """Return the largest value within `by` pixels.

    Slices are 10 to 20 times as fast on a CPU as max_pool2d.
    """
    window = 2 * by + 1
    x = F.pad(x, (by,) * 4, value=-torch.inf)
    for axis in (-2, -1):
        width = 1
        while width < window:
            step = min(width, window - width)
            length = x.shape[axis] - step
            x = torch.maximum(x.narrow(axis, 0, length), x.narrow(axis, step, length))
            width += step
    return x


def _mean(x: Tensor, reach: int) -> Tensor:
    """Return the mean within `reach` pixels.

    The border is repeated.
    """
    x = F.pad(x, (reach,) * 4, mode="replicate")
    for axis in (-2, -1):
        length = x.shape[axis] - 2 * reach
        x = sum((x.narrow(axis, i, length) for i in range(1, 2 * reach + 1)), x.narrow(axis, 0, length))
    return x / (2 * reach + 1) ** 2
