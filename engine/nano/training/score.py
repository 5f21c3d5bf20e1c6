"""Scores an image by its pixels alone against the scene asked for.

Images are judged at one pixel per unit: larger ones are averaged down first (`in_units`), so that every size meets the
same scorer. `sharpness` measures outlines at the image's own size. An object counts when the nearest of all sprites to
what is seen round its place is the right one, nearer than a plain blob of its size and colour too, and its outline
overlaps the sprite's by at least 0.6.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from engine.nano.training.compositor import Compositor, as_uint8, backgrounds
from engine.nano.training.data_loader import render, scene_arrays
from engine.nano.training.frames import SIZES, UNITS, Frame
from engine.nano.training.prompts import Example
from engine.nano.training.scenes import SLOTS, Box, Scene, Thing, nested, without
from engine.nano.training.sprites import KINDS, atlas
from engine.nano.words import COLOURS

Rgb8 = np.ndarray
"""[height, width, 3] uint8."""

OUTLINE = 0.6
"""Least overlap (intersection over union) of the seen outline with the right one."""
VISIBLE = 40
"""Of 255, in the channel where it is largest: what differs from the background by more belongs to an object."""
NEAR = 24
"""Of 255: a background may be this far off on average; the two nearest flat ones differ by more than twice that."""
GONE = 20
"""Of 255: where a thing was taken away, the image may be this far on average from what lies behind it."""
LEAST_FREE = 0.05
"""Share of the image: four things leave less than this between the margins of their boxes."""
_REACH = range(-8, 9, 2)
"""Pixels around an object's place that are searched in each direction; the object itself may be 6 away."""
_MARGIN = 8


@lru_cache(maxsize=2)
def _compositor(scale: int) -> Compositor:
    return Compositor(scale)


def draw(*scenes: Scene, frame: Frame = UNITS) -> list[Rgb8]:
    """Return the scenes as they ought to look on the canvas."""
    return as_uint8(render(_compositor(frame.scale), scene_arrays(scenes, frame), frame))


def in_units(image: Rgb8, frame: Frame) -> Rgb8:
    """Average the image down to one pixel per unit."""
    if frame.scale == 1:
        return image
    cells = image.reshape(frame.height, frame.scale, frame.width, frame.scale, 3).astype(np.float32)
    return cells.mean(axis=(1, 3)).round().astype(np.uint8)


def _frame(image: Rgb8) -> Frame:
    """Return the canvas of an image in units."""
    return Frame(image.shape[1], image.shape[0])


@lru_cache(maxsize=16)
def _grounds(frame: Frame) -> np.ndarray:
    return backgrounds(frame).astype(np.float32)


def _free(things: tuple[Thing, ...], frame: Frame, margin: int = 4) -> np.ndarray:
    """Return where no box of the things is: [height, width] bool."""
    free = np.ones((frame.height, frame.width), bool)
    for thing in things:
        free[_window(thing, frame, margin)] = False
    return free


def _window(thing: Thing, frame: Frame, margin: int) -> tuple[slice, slice]:
    left, top, right, bottom = thing.box(frame)
    return slice(max(0, top - margin), bottom + margin), slice(max(0, left - margin), right + margin)


def background_right(image: Rgb8, scene: Scene) -> bool:
    """Whether the free pixels match the right background and no other better."""
    frame = _frame(image)
    free = _free(scene.things, frame)
    if free.mean() < LEAST_FREE:
        free = _free(scene.things, frame, 0)
    distances = np.abs(_grounds(frame)[:, free] - image[free]).mean(axis=(1, 2))
    return bool(distances.argmin() == scene.background and distances.min() < NEAR)


@lru_cache(maxsize=len(SIZES))
def _candidates(size: int) -> torch.Tensor:
    """Return all sprites, then a blob of each.

    [2 · kinds, side, side, 4] premultiplied, 0 … 255.
    """
    sprites = atlas()[size].astype(np.float32)
    return torch.from_numpy(np.concatenate((sprites, np.stack([_blob(sprite) for sprite in sprites]))))


@dataclass(frozen=True)
class _Rivals:
    """Return the candidates of a size as rows, on every second pixel.

    The differences between candidates are larger than a pixel.

    cover: 0 … 1, thrice. colour: premultiplied. Each [candidates, pixels · 3].
    """

    cover: torch.Tensor
    colour: torch.Tensor


@lru_cache(maxsize=len(SIZES))
def _rivals(size: int) -> _Rivals:
    half = _candidates(size)[:, ::2, ::2]
    return _Rivals((half[..., 3:] / 255).expand(-1, -1, -1, 3).flatten(1), half[..., :3].flatten(1))


def _blob(sprite: np.ndarray) -> np.ndarray:
    """An ellipse of the sprite's place, extent and mean colour."""
    alpha = sprite[..., 3] / 255
    y, x = np.mgrid[0 : sprite.shape[0], 0 : sprite.shape[1]]
    points = np.stack((x, y)).reshape(2, -1)
    weights = alpha.reshape(-1) / alpha.sum()
    offsets = points - (points @ weights)[:, None]
    covariance = (offsets * weights) @ offsets.T + 1e-3 * np.eye(2)
    distance = np.einsum("in,ij,jn->n", offsets, np.linalg.inv(covariance), offsets).reshape(alpha.shape)
    # A filled ellipse reaches two deviations out.
    cover = np.clip((4 - distance) * 2, 0, 1)[..., None]
    colour = sprite[..., :3].sum(axis=(0, 1)) / alpha.sum()
    return np.concatenate((cover * colour, cover * 255), axis=-1).astype(np.float32)


def _round_already(kind: int) -> bool:
    """A circle is its own blob."""
    return KINDS[kind].endswith("circle")


@dataclass(frozen=True)
class Finding:
    """The match found at a thing's place.

    overlap: of the outlines. nearest: the sprite's kind, or None for a blob.
    """

    overlap: float
    nearest: int | None
    colour: int

    def right(self, thing: Thing) -> bool:
        return self.nearest == thing.kind and self.overlap >= OUTLINE


def look(image: Rgb8, scene: Scene, index: int) -> Finding:
    """Find what the image shows at a thing's place.

    The rest of the scene is taken as asked for.
    """
    thing = scene.things[index]
    frame = _frame(image)
    (under,) = draw(without(scene, index), frame=frame)
    around = _neighbourhood(image, under)
    if nested(scene) and index == 0:
        # Where the inner thing covers the outer one, the outer one cannot be judged.
        left, top, right, bottom = (side + _MARGIN for side in scene.things[1].box(frame))
        around[2][top:bottom, left:right] = 0
    box = thing.box(frame)
    distances = _distances(around, thing, box)
    inner = distances[thing.kind].reshape(len(_REACH), len(_REACH))[1:-1, 1:-1]
    y, x = divmod(int(inner.argmin()), inner.shape[1])
    # Every rival may shift by two pixels more, lest it lose only for standing aside.
    best = distances.unflatten(1, (len(_REACH), len(_REACH)))[:, y : y + 3, x : x + 3].amin(dim=(1, 2))
    if _round_already(thing.kind):
        best[len(KINDS) + thing.kind] = torch.inf
    nearest = int(best.argmin())
    dx, dy = _REACH[x + 1], _REACH[y + 1]
    return Finding(
        _overlap(around, thing, box, dx, dy),
        nearest if nearest < len(KINDS) else None,
        _colour(around[0], thing, box, dx, dy),
    )


Neighbourhood = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""The image, what should be behind the thing, and 1 where the image is: padded by _MARGIN, 0 … 255."""


def _neighbourhood(image: Rgb8, under: Rgb8) -> Neighbourhood:
    """Pad the image so that the search may reach over its edge.

    Pixels there match nothing.
    """
    pad = ((_MARGIN, _MARGIN), (_MARGIN, _MARGIN), (0, 0))
    seen, behind = (torch.from_numpy(np.pad(image, pad, mode="edge")).float() for image in (image, under))
    inside = torch.zeros(*seen.shape[:2], 1)
    inside[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN] = 1
    return seen, behind, inside


def _cut(image: torch.Tensor, box: Box, dx: int, dy: int) -> torch.Tensor:
    left, top, right, bottom = box
    return image[top + _MARGIN + dy : bottom + _MARGIN + dy, left + _MARGIN + dx : right + _MARGIN + dx]


def _distances(neighbourhood: Neighbourhood, thing: Thing, box: Box) -> torch.Tensor:
    """Return squared differences of the image and each composited candidate.

    [candidates, shifts].

    (seen - (behind · (1 - cover) + colour))², multiplied out, so that all shifts of all sprites are a few products.
    """
    shifts = [(dx, dy) for dy in _REACH for dx in _REACH]
    seen, behind, inside = (
        torch.stack([_cut(image, box, dx, dy)[::2, ::2].expand(-1, -1, 3).flatten() for dx, dy in shifts], dim=1)
        for image in neighbourhood
    )
    behind = behind * inside
    missing = seen * inside - behind
    rivals = _rivals(thing.size)
    squares = rivals.cover.square() @ behind.square() + rivals.colour.square() @ inside + missing.square().sum(0)
    products = rivals.cover @ (missing * behind) - rivals.colour @ missing - (rivals.cover * rivals.colour) @ behind
    return squares + 2 * products


def _overlap(neighbourhood: Neighbourhood, thing: Thing, box: Box, dx: int, dy: int) -> float:
    """Return the overlap of the outlines in image and truth.

    Over the whole neighbourhood of the thing.
    """
    seen, behind, inside = neighbourhood
    sprite = _candidates(thing.size)[thing.kind]
    truth = behind.clone()
    here = _cut(truth, box, dx, dy)
    here.mul_(1 - sprite[..., 3:] / 255).add_(sprite[..., :3])
    left, top, right, bottom = box
    area = slice(top, bottom + 2 * _MARGIN), slice(left, right + 2 * _MARGIN)
    ours, theirs = ((((image - behind).abs() * inside).amax(dim=-1) > VISIBLE)[area] for image in (seen, truth))
    union = (ours | theirs).sum().item()
    return (ours & theirs).sum().item() / union if union else 0.0


def _colour(seen: torch.Tensor, thing: Thing, box: Box, dx: int, dy: int) -> int:
    """The known colour nearest to what the sprite's inside shows."""
    solid = _candidates(thing.size)[thing.kind][..., 3] > 250
    mean = _cut(seen, box, dx, dy)[solid].mean(dim=0)
    return int((torch.tensor(list(COLOURS.values())) - mean).pow(2).sum(dim=1).argmin())


def place_right(image: Rgb8, scene: Scene) -> bool:
    """Whether a single object is centred on the right of nine places."""
    (thing,) = scene.things
    frame = _frame(image)
    ground = _grounds(frame)[scene.background]
    mask = np.abs(image.astype(int) - ground).max(axis=-1) > VISIBLE
    if mask.sum() < 0.1 * thing.side**2:
        return False
    y, x = np.nonzero(mask)
    truth = np.abs(draw(scene, frame=frame)[0].astype(int) - ground).max(axis=-1) > VISIBLE
    true_y, true_x = np.nonzero(truth)
    # Sprites are seldom centred in their box: the truth's own centre says by how much.
    centre_x, centre_y = frame.centre(thing.size, thing.slot)
    off_x, off_y = true_x.mean() - centre_x, true_y.mean() - centre_y

    def distance(slot: tuple[int, int]) -> float:
        centre = frame.centre(thing.size, slot)
        return np.hypot(x.mean() - off_x - centre[0], y.mean() - off_y - centre[1])

    return min(SLOTS, key=distance) == thing.slot


def places_right(image: Rgb8, scene: Scene) -> bool:
    """Whether neither of two objects looks more like the other.

    Both have one size.
    """
    first, second = scene.things
    swapped = Scene(scene.background, (_put(first, second), _put(second, first)))
    frame = _frame(image)
    right, wrong = draw(scene, swapped, frame=frame)
    free = ~_free(scene.things, frame, 0)
    seen = image[free].astype(int)
    return bool(np.abs(seen - right[free]).mean() < np.abs(seen - wrong[free]).mean())


def _put(thing: Thing, where: Thing) -> Thing:
    return Thing(thing.kind, thing.size, where.slot)


def edit_done(image: Rgb8, example: Example) -> bool:
    """Whether the asked change is there."""
    target, (source,) = example.target, example.references
    if example.task == "background":
        return background_right(image, target)
    changes = [i for i, thing in enumerate(target.things) if thing not in source.things]
    if not all(look(image, target, i).right(target.things[i]) for i in changes):
        return False
    frame = _frame(image)
    old, new = draw(source, target, frame=frame)
    for thing in (thing for thing in source.things if thing not in target.things):
        window = _window(thing, frame, 0)
        left_over = np.abs(old[window].astype(int) - new[window]).max(axis=-1) > VISIBLE
        for other in target.things:
            if other not in source.things:
                left_over &= _free((other,), frame, 0)[window]
        error = np.abs(image[window].astype(int) - new[window]).mean(axis=-1)
        if left_over.any() and error[left_over].mean() > GONE:
            return False
    return True


def rest_kept(image: Rgb8, example: Example) -> float:
    """Return the mean absolute difference outside the edit, of 255.

    Measured at the image's own size. Behind a new background, of the things.
    """
    (truth,) = draw(example.target, frame=example.frame)
    if example.task == "background":
        empty = draw(Scene(example.target.background), frame=example.frame)[0].astype(int)
        kept = np.abs(truth - empty).max(axis=-1) > VISIBLE
    else:
        kept = untouched(example.touched, example.frame)
    return float(np.abs(image[kept].astype(int) - truth[kept]).mean()) if kept.any() else 0.0


def untouched(boxes: tuple[Box, ...], frame: Frame) -> np.ndarray:
    """Return the mask of pixels outside all boxes, [height, width] bool.

    boxes: in units.
    """
    width, height = frame.pixels
    free = np.ones((height, width), bool)
    for left, top, right, bottom in boxes:
        left, top, right, bottom = (frame.scale * side for side in (left - 2, top - 2, right + 2, bottom + 2))
        free[max(0, top) : bottom, max(0, left) : right] = False
    return free


def sharpness(image: Rgb8, example: Example, index: int) -> float:
    """Return the gradient energy along an object's outline, of the true one's.

    Measured at the image's own size.

    The outline is where the true sprite's cover changes, and two pixels around it; 1 is as sharp as the truth.
    """
    frame, scene = example.frame, example.target
    truth, under = draw(scene, without(scene, index), frame=frame)
    shown = np.abs(truth.astype(int) - under).max(axis=-1) > VISIBLE
    edge = np.zeros_like(shown)
    edge[:, 1:] |= shown[:, 1:] != shown[:, :-1]
    edge[1:] |= shown[1:] != shown[:-1]
    for _ in range(2):
        padded = np.pad(edge, 1)
        edge = edge | padded[2:, 1:-1] | padded[:-2, 1:-1] | padded[1:-1, 2:] | padded[1:-1, :-2]
    return _energy(image, edge) / max(1.0, _energy(truth, edge))


def _energy(image: Rgb8, where: np.ndarray) -> float:
    """Return the sum of squared differences between neighbouring pixels."""
    values = image.astype(np.float32)
    across = np.square(np.diff(values, axis=1)).sum(axis=-1)[where[:, 1:]].sum()
    down = np.square(np.diff(values, axis=0)).sum(axis=-1)[where[1:]].sum()
    return float(across + down)


def composed(image: Rgb8, scene: Scene) -> bool:
    """Whether every object is there, each where it should be."""
    return all(look(image, scene, i).right(thing) for i, thing in enumerate(scene.things))
