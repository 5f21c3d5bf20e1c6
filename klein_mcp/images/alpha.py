"""Solves alpha from several backings or a plain background, and checks it.

A subject with opacity a and colour C on a backing b shows a·C + (1 - a)·b. Two or more images of one subject on known
backings therefore give its alpha and its colour, soft edges, glass and shadows included.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.contract import Rgb8

Rgba8 = npt.NDArray[np.uint8]
"""An image: uint8, [height, width, 4], sRGB, alpha not premultiplied."""
Pixels = npt.NDArray[np.uint8]
"""An image with or without alpha: uint8, [height, width, 3 or 4]."""
Float = npt.NDArray[np.float32]

BACKINGS: dict[str, tuple[int, int, int]] = {
    "gray": (140, 140, 145), "green": (50, 170, 70), "blue": (45, 90, 220), "white": (248, 248, 248),
}  # fmt: skip
"""Colours to paint a master on, in the order in which they are tried; the values are only used to compare."""
FAR = 70
"""Distance, of 255 a channel: a subject's colour nearer to the backing than this may melt into it."""

RIM, SUBJECT, SOFT, RESIDUAL, CHECKERBOARD = 0.03, (0.005, 0.95), 0.25, 4.0, 0.5
"""Limits: mean alpha at the rim; share of the image that is subject; share that is half transparent; mean error, of
255, of what no backing explains; how periodic the alpha or the removed part is."""
VIEWED_ON = {128: "grey", 255: "white", 20: "near-black"}
"""Greys that previews show a transparent image on: the first that stands out from it; and their names."""
AGREE = 0.9
"""Share of the border that must have one colour for a background to be plain."""
NEAR_PLAIN = 26
"""Distance to the plain background, of 255 in the channel that differs most, up to which a pixel belongs to it."""

LEFTOVER = 0.002
"""Share of an image's transparency below which what an edit left of it is a remnant: a line at an outline, barely seen.

Of 20 new backgrounds by nano at most 0.00014 was left, with no pixel under an alpha of 222; of 10 other edits 0.977."""
_SPECK = 0.0005
"""Share of the image below which an enclosed spot is not worth a word: 8 pixels at 128², 500 at 1024²."""
_FEW = 0.02
"""Share of a subject that may melt into a backing: eyes and outlines."""
_LINES = 256
"""Rows and columns in which a checkerboard is looked for."""
_SAMPLED = 250_000
"""Pixels that are enough to know an image's colours."""

_STRIP = 2**20
"""Pixels that are worked on at a time, so that a large image needs few copies."""
_REACH = 12
"""Rows beside a strip that its pixels depend on: 2 + 3 of the outline's colour, and 4 that it spreads."""

# Alpha this near to 0 or 1 is the model's noise.
_CLEAR, _SOLID = 0.08, 0.92
_CELLS = (4, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)
"""Sides of checkerboard cells that are looked for, in pixels: image editors paint 8 to 32."""


@dataclass(frozen=True, slots=True)
class AlphaChecks:
    """Measurements of a transparent image.

    rim: mean alpha of its border. subject: share that is opaque. soft: share that is half transparent.
    residual: mean error, of 255, that no opacity explains. checkerboard: 0 … 2. hole: share of the silhouette
    that is transparent.
    """

    rim: float
    subject: float
    soft: float
    residual: float
    checkerboard: float
    hole: float

    def to_json(self) -> dict[str, float]:
        """Return the numbers as they stand in a result."""
        return {name: round(value, 3) for name, value in asdict(self).items()}

    @property
    def error(self) -> str:
        """Reason not to trust the image, "" if there is none."""
        least, most = SUBJECT
        if self.checkerboard > CHECKERBOARD:
            return "a checkerboard was painted instead of a plain background"
        if self.subject < least:
            return f"nothing is left: {self.subject:.1%} of the image is opaque"
        if self.subject > most:
            return f"nothing was removed: {self.subject:.0%} of the image is opaque"
        if self.rim > RIM:
            return f"the border is not transparent (mean alpha {self.rim:.2f})"
        if self.soft > SOFT:
            return f"{self.soft:.0%} of the image is half transparent"
        if self.residual > RESIDUAL:
            return f"the subject changed between its backings (by {self.residual:.1f} of 255)"
        return ""


@dataclass(frozen=True, slots=True)
class Cutout:
    """A transparent image and its measurements.

    enclosed: share of the image that has the background's colour and is surrounded by the subject; it stays opaque.
    """

    image: Rgba8
    checks: AlphaChecks
    enclosed: float = 0.0

    @property
    def warnings(self) -> tuple[str, ...]:
        """Say what the checks allow and a reader may not expect."""
        if self.enclosed < _SPECK:
            return ()
        return (f"{self.enclosed:.1%} of the image has the background's colour inside the subject, and stays opaque",)


def backing_colour(image: Rgb8) -> Float:
    """Median colour of a ring 2 to 6 pixels inside the border."""
    ring = np.concatenate([image[2:6].reshape(-1, 3), image[-6:-2].reshape(-1, 3),
                           image[:, 2:6].reshape(-1, 3), image[:, -6:-2].reshape(-1, 3)])  # fmt: skip
    pixels = ring if len(ring) else image.reshape(-1, 3)  # an image of 2 × 2 has no such ring
    return np.median(pixels, axis=0).astype(np.float32)


def choose_backing(prompt: str, avoid: Sequence[str] = ()) -> str:
    """Return the first backing whose colour the prompt does not name.

    avoid: backings that were tried.
    """
    named = prompt.lower().replace("grey", "gray")
    free = [name for name in BACKINGS if name not in avoid]
    return next((name for name in free if name not in named), free[0])


def is_plain(image: Rgb8) -> bool:
    """Return whether the border has one colour."""
    distance = _distance(image, backing_colour(image))
    one = _frame(distance, 1)
    border = np.concatenate([distance[one], distance[-1 - one], distance[:, one], distance[:, -1 - one]])
    return bool((border <= NEAR_PLAIN).mean() >= AGREE)


def melts(image: Rgb8) -> bool:
    """Whether much of the subject has nearly the colour of its backing."""
    distance = _distance(image, backing_colour(image))
    subject = distance > NEAR_PLAIN
    if not subject.any():
        return True
    return bool((distance[subject] < FAR).mean() > 0.35)


def solve(images: Sequence[Rgb8], master: int = 0) -> Cutout:
    """Solve alpha and colour of one subject on two or more backings.

    master: index of the image whose colours are taken.
    """
    stack = np.stack(images).astype(np.float32)
    backings = np.stack([backing_colour(image) for image in images])
    # Least squares: of the spread of the backings, the share that a pixel still shows is 1 - alpha.
    spread = backings - backings.mean(0)
    deviation = stack - stack.mean(0)
    through = np.einsum("khwc,kc->hw", deviation, spread) / max(1.0, float((spread**2).sum()))
    alpha = 1 - np.clip(through, 0, 1)
    unexplained = deviation - through[None, ..., None] * spread[:, None, None]
    residual = float(np.abs(unexplained).mean())
    alpha = _stretched(_without_border(alpha))
    colour = _unmixed(stack[master], alpha, backings[master])
    return Cutout(_rgba(colour, alpha), _measure(alpha, images[master], residual))


def cut_out(image: Rgb8) -> Cutout | None:
    """Cut a subject out of a plain background.

    Returns None where the border has more than one colour.
    """
    if not is_plain(image):
        return None
    backing = backing_colour(image)
    distance = _distance_to_backing(image, backing)
    outside = _flood(distance <= NEAR_PLAIN)
    enclosed = float(((distance <= NEAR_PLAIN / 2) & ~outside).mean())
    del distance
    cut, alpha = _cut_in_strips(image, outside, backing)
    return Cutout(cut, _measure(alpha, image, 0.0), enclosed)


def after_edit(painted: Rgb8, original: Rgba8, grey: int, may_change: npt.NDArray[np.bool_] | None) -> Rgba8:
    """Return the edit of a transparent image with its alpha.

    What did not change keeps its alpha. What became the backing's colour, and touches what is transparent, is
    transparent too.

    painted: the edit of `original` over a grey backing. may_change: elsewhere the original's bytes are kept; None: all.
    """
    before, clear = over(original, grey), original[..., 3] == 0
    changed = _grown(_distance(painted, before.astype(np.float32)) > NEAR_PLAIN, 2)
    if may_change is not None:
        changed &= may_change
    # A model paints the backing a little darker or lighter than it was.
    still = painted[clear & ~changed]
    backing = np.median(still, axis=0).astype(np.float32) if len(still) else np.full(3, grey, np.float32)
    outside = _flood(_distance_to_backing(painted, backing) <= NEAR_PLAIN, clear & ~changed)
    cut, _ = _cut_in_strips(painted, outside, backing)
    image = original.copy()
    image[changed] = cut[changed]
    # What changed by less, such as a soft shadow, is no outline: it stays opaque.
    solid = ~changed & (original[..., 3] == 255)
    if may_change is not None:
        solid &= may_change
    image[solid, :3] = painted[solid]
    return image


def is_opaque_after(image: Rgba8, original: Rgba8) -> bool:
    """Return whether an edit left practically nothing of an image's transparency."""
    left, before = (int((255 - each[..., 3].astype(np.int64)).sum()) for each in (image, original))
    return left < LEFTOVER * before or left == 0


def measure(image: Rgba8) -> AlphaChecks:
    """Measure an image that has alpha already."""
    return _measure((image[..., 3] / 255).astype(np.float32), for_viewing(image), 0.0)


def keep_colours(cut: Rgba8, original: Rgb8) -> Rgba8:
    """Put the original's bytes back where a cut-out is opaque.

    Only where both look alike."""
    same = (cut[..., 3] == 255) & (_distance(original, cut[..., :3].astype(np.float32)) <= NEAR_PLAIN)
    image = cut.copy()
    image[same, :3] = original[same]
    return image


def _cut_in_strips(image: Rgb8, outside: npt.NDArray[np.bool_], backing: Float) -> tuple[Rgba8, Float]:
    """Return the cut-out and its alpha, made in strips of rows.

    At once it takes 160 bytes a pixel.
    """
    height, width = outside.shape
    cut, alpha = np.empty((height, width, 4), np.uint8), np.empty((height, width), np.float32)
    for rows in _strips(outside):
        begin, end = max(0, rows.start - _REACH), rows.stop + _REACH
        colour, opacity = _cut(image[begin:end], outside[begin:end], backing)
        own = slice(rows.start - begin, rows.stop - begin)
        cut[rows], alpha[rows] = _rgba(colour, opacity)[own], opacity[own]
    return cut, alpha


def _strips(image: npt.NDArray[Any]) -> Iterator[slice]:
    """Yield slices of rows, about _STRIP pixels each."""
    height, width = image.shape[:2]
    step = max(1, _STRIP // width)
    for top in range(0, height, step):
        yield slice(top, min(top + step, height))


def _cut(image: Rgb8, outside: npt.NDArray[np.bool_], backing: Float) -> tuple[Float, Float]:
    """Return colour and alpha, with the outline un-mixed from the backing."""
    # Pixels at the outline are mixed: their alpha is their place between the backing and the colour further inside.
    inside = ~_grown(outside, 2)
    solid = _blurred(image.astype(np.float32) * inside[..., None], 3)
    weight = _blurred(inside[..., None].astype(np.float32), 3)
    subject = np.where(weight > 0.01, solid / np.maximum(weight, 0.01), image)
    axis = subject - backing
    mixed = ((image - backing) * axis).sum(-1) / np.maximum((axis**2).sum(-1), 1)
    alpha = np.where(inside, 1, np.where(outside, 0, np.clip(mixed, 0, 1))).astype(np.float32)
    return _unmixed(image.astype(np.float32), alpha, backing), alpha


def flat(image: Pixels, backing: int = 255) -> Rgb8:
    """Return an image without alpha, over a grey if it has one."""
    return over(image, backing) if image.shape[2] == 4 else image


def plain_backing(image: Rgba8, choices: Sequence[int] = (255, 128, 20)) -> int:
    """Return the first grey that stands out from all visible pixels.

    Where none does, the one that the fewest are near."""
    step = max(1, int((image.shape[0] * image.shape[1] / _SAMPLED) ** 0.5))
    sample = image[::step, ::step]
    visible = sample[sample[..., 3] > 127][:, :3]
    if not len(visible):
        return choices[0]
    near = {grey: float((np.abs(visible.astype(np.int16) - grey).max(1) < FAR).mean()) for grey in choices}
    return next((grey for grey in choices if near[grey] < _FEW), min(choices, key=lambda grey: near[grey]))


def viewing_backing(image: Pixels) -> int | None:
    """Return the grey of an image's previews, None if it is opaque."""
    return plain_backing(image, tuple(VIEWED_ON)) if image.shape[2] == 4 else None


def for_viewing(image: Pixels, backing: int | None = None) -> Rgb8:
    """Return an image for previews, over a grey that stands out.

    backing: another grey, to show it as another image is shown.
    """
    if image.shape[2] != 4:
        return image
    return over(image, backing if backing is not None else plain_backing(image, tuple(VIEWED_ON)))


def over(image: Rgba8, backing: "int | Rgb8" = 128) -> Rgb8:
    """A transparent image over a grey, or over another image."""
    alpha = image[..., 3:].astype(np.uint16)
    return ((image[..., :3] * alpha + np.uint16(backing) * (255 - alpha) + 127) // 255).astype(np.uint8)


def checkerboard(values: Float, where: npt.NDArray[np.bool_]) -> float:
    """Measure likeness to a checkerboard, 0 … 2.

    A cell further, a checkerboard is its own negative; two cells further, itself. Nothing in nature is.
    """
    if where.mean() < 0.05:
        return 0.0
    signal = np.where(where, values - values[where].mean(), 0).astype(np.float32)
    power = float((signal[where] ** 2).mean())
    if power < 4:  # of 255²: an even surface has no pattern
        return 0.0
    # A pattern along the rows shows in any of them.
    rows, columns = (max(1, side // _LINES) for side in signal.shape)
    across, down = (signal[::rows], where[::rows]), (signal.T[::columns], where.T[::columns])
    return max((min(_repeats(*across, cell), _repeats(*down, cell)) for cell in _CELLS), default=0.0)


def _repeats(signal: Float, where: npt.NDArray[np.bool_], cell: int) -> float:
    if 4 * cell > signal.shape[1]:
        return 0.0
    return _correlation(signal, where, 2 * cell) - _correlation(signal, where, cell)


def _correlation(signal: Float, where: npt.NDArray[np.bool_], shift: int) -> float:
    both = where[:, shift:] & where[:, :-shift]
    if not both.any():
        return 0.0
    first, second = signal[:, shift:][both], signal[:, :-shift][both]
    return float((first * second).mean() / max(1e-6, float(np.sqrt((first**2).mean() * (second**2).mean()))))


def _measure(alpha: Float, image: Rgb8, residual: float) -> AlphaChecks:
    rim = np.concatenate([alpha[:2].ravel(), alpha[-2:].ravel(), alpha[:, :2].ravel(), alpha[:, -2:].ravel()])
    opaque = alpha > 0.5
    silhouette = ~_flood(~opaque)
    pattern = max(
        checkerboard(image.mean(2, dtype=np.float32), ~opaque), checkerboard(255 * alpha, np.ones_like(opaque))
    )
    return AlphaChecks(
        rim=float(rim.mean()),
        subject=float(opaque.mean()),
        soft=float(((alpha > 0.05) & (alpha < 0.95)).mean()),
        residual=residual,
        checkerboard=pattern,
        hole=float((silhouette & ~opaque).sum() / max(1, silhouette.sum())),
    )


def _stretched(alpha: Float) -> Float:
    return np.clip((alpha - _CLEAR) / (_SOLID - _CLEAR), 0, 1).astype(np.float32)


def _without_border(alpha: Float) -> Float:
    """Repeat the inner neighbours of the outermost two pixels.

    The autoencoder is wrong there.
    """
    return _with_repeated_frame(alpha, 2)


def _unmixed(image: Float, alpha: Float, backing: Float) -> Float:
    """Return the subject's own colours, or its neighbours' where it hardly shows."""
    solid = alpha >= 0.1
    weight = np.maximum(alpha, 0.1)[..., None]
    colour = np.where(solid[..., None], (image - (1 - alpha[..., None]) * backing) / weight, 0)
    colour = np.clip(colour, 0, 255)
    known = solid
    for _ in range(4):
        # Spread outwards, so that a viewer that interpolates meets no fringe of the backing.
        total = _blurred(colour * known[..., None], 1)
        count = _blurred(known[..., None].astype(np.float32), 1)
        grown = (count[..., 0] > 0) & ~known
        colour = np.where(grown[..., None], total / np.maximum(count, 1e-6), colour)
        known = known | grown
    return colour


def _rgba(colour: Float, alpha: Float) -> Rgba8:
    opacity = np.rint(255 * alpha).astype(np.uint8)
    near = _grown(opacity > 0, 2)
    return np.dstack([np.rint(np.where(near[..., None], colour, 0)).astype(np.uint8), opacity])


def _distance(image: Rgb8, colour: Float) -> Float:
    """Return the largest difference over the channels.

    colour: one for all, or one a pixel.
    """
    result = np.empty(image.shape[:2], np.float32)
    for rows in _strips(image):
        result[rows] = np.abs(image[rows] - (colour[rows] if colour.ndim == 3 else colour)).max(2)
    return result


def _distance_to_backing(image: Rgb8, backing: Float) -> Float:
    """Return the distance, with the outermost pixels as near as their neighbours.

    The autoencoder paints a plain colour up to 46 of 255 wrong in the corners, and up to 16 one pixel further inside.
    """
    distance = _distance(image, backing)
    return np.minimum(distance, _with_repeated_frame(distance, 1))


def _with_repeated_frame(values: Float, by: int) -> Float:
    """Return the values with inner neighbours in place of the frame."""
    height, width = values.shape
    frame = _frame(values, by)
    return np.pad(values[frame : height - frame, frame : width - frame], frame, mode="edge")


def _frame(values: Float, by: int) -> int:
    """Return the width of a frame that leaves something inside."""
    return min(by, (min(values.shape) - 1) // 2)


def _flood(passable: npt.NDArray[np.bool_], seeds: npt.NDArray[np.bool_] | None = None) -> npt.NDArray[np.bool_]:
    """Return what is reached from the border, and from `seeds`.

    Whole rows and columns at once, so a few rounds are enough.
    """
    reached = np.zeros_like(passable) if seeds is None else seeds & passable
    reached[0], reached[-1], reached[:, 0], reached[:, -1] = passable[0], passable[-1], passable[:, 0], passable[:, -1]
    while True:
        before = int(reached.sum())
        for _ in range(2):
            reached = _along_rows(_along_rows(reached, passable)[:, ::-1], passable[:, ::-1])[:, ::-1]
            reached, passable = reached.T, passable.T
        if int(reached.sum()) == before:
            return reached


def _along_rows(reached: npt.NDArray[np.bool_], passable: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Spread to the right, as far as it is passable."""
    result = np.empty_like(passable)
    index = np.arange(reached.shape[1], dtype=np.int32)
    for rows in _strips(reached):
        seed = np.maximum.accumulate(np.where(reached[rows], index, -1), axis=1)
        wall = np.maximum.accumulate(np.where(passable[rows], -1, index), axis=1)
        result[rows] = passable[rows] & (seed > wall)
    return result


def _grown(mask: npt.NDArray[np.bool_], by: int) -> npt.NDArray[np.bool_]:
    for _ in range(by):
        padded = np.pad(mask, 1, mode="edge")
        mask = mask | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return mask


def _blurred(image: Float, reach: int) -> Float:
    """Mean within `reach` pixels, with the border repeated."""
    padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    height, width = image.shape[:2]
    rows = padded[:height].copy()
    for start in range(1, 2 * reach + 1):
        rows += padded[start : start + height]
    total = rows[:, :width].copy()
    for start in range(1, 2 * reach + 1):
        total += rows[:, start : start + width]
    return total / np.float32((2 * reach + 1) ** 2)
