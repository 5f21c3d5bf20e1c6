"""Scenes of nano's world, and the edits and compositions of them."""

import random
from dataclasses import dataclass, replace
from functools import cached_property

from engine.nano.training.compositor import BACKGROUNDS, CANVAS
from engine.nano.training.sprites import KINDS, SIZES
from engine.nano.words import COLOURS, NOUNS, SHAPES

SMALL, NORMAL, BIG = range(len(SIZES))

REACH = (48, 32, 16)
"""Pixels from the middle of the image to the centre of an object at the side, for each size.

Multiples of a token's 16: an object then has the same tokens in every slot, so that what is learned of it in one place
holds in all.
"""

MAX_THINGS = 3

Slot = tuple[int, int]
"""(column, row), each -1, 0 or 1: left, middle, right; top, middle, bottom."""

SLOTS: tuple[Slot, ...] = tuple((column, row) for row in (-1, 0, 1) for column in (-1, 0, 1))
CORNERS: tuple[Slot, ...] = ((-1, -1), (1, -1), (-1, 1), (1, 1))
MIDDLE: Slot = (0, 0)


@dataclass(frozen=True)
class Thing:
    """One object: indices into KINDS and SIZES, and its place."""

    kind: int
    size: int
    slot: Slot

    @property
    def name(self) -> str:
        return KINDS[self.kind]

    @property
    def side(self) -> int:
        return SIZES[self.size]

    @property
    def shape(self) -> str | None:
        """The name of the geometric shape, or None for a noun."""
        return None if self.kind < len(NOUNS) else SHAPES[(self.kind - len(NOUNS)) // len(COLOURS)]

    @property
    def colour(self) -> int | None:
        """The index of a shape's colour, or None for a noun."""
        return None if self.kind < len(NOUNS) else (self.kind - len(NOUNS)) % len(COLOURS)

    @cached_property
    def centre(self) -> tuple[int, int]:
        """(x, y) in pixels."""
        middle, reach = CANVAS // 2, REACH[self.size]
        return middle + reach * self.slot[0], middle + reach * self.slot[1]

    @property
    def box(self) -> tuple[int, int, int, int]:
        """left, top, right, bottom in pixels."""
        x, y = self.centre
        left, top = x - self.side // 2, y - self.side // 2
        return left, top, left + self.side, top + self.side


@dataclass(frozen=True)
class Scene:
    """A background and up to three things, later ones in front.

    background: an index into BACKGROUNDS.
    """

    background: int
    things: tuple[Thing, ...] = ()


def shape_kind(shape: int, colour: int) -> int:
    """The kind of a shape in a colour."""
    return len(NOUNS) + shape * len(COLOURS) + colour


def overlap(a: Thing, b: Thing) -> int:
    """Pixels that the boxes of two things share."""
    (al, at, ar, ab), (bl, bt, br, bb) = a.box, b.box
    return max(0, min(ar, br) - max(al, bl)) * max(0, min(ab, bb) - max(at, bt))


TOLERATED_OVERLAP = 120
"""Shared box pixels that still leave both things whole: sprites seldom fill the corners of their boxes."""


def fits(thing: Thing, others: tuple[Thing, ...]) -> bool:
    """Whether the thing finds its place free."""
    return all(overlap(thing, other) <= TOLERATED_OVERLAP for other in others)


_CLASH = {"gray": {"elephant", "robot", "whale", "bus"}, "white": {"ghost", "snowman"}, "snow": {"ghost", "snowman"},
          "black": {"hat", "penguin", "camera"}, "night": {"black"}, "yellow": {"helicopter"}}  # fmt: skip
"""Background -> things of nearly its own colour, which nobody could make out on it."""


def visible(kind: int, background: int) -> bool:
    """Whether the object stands out from the background."""
    ground, name = BACKGROUNDS[background], KINDS[kind]
    words = name.split()
    return ground not in words and not _CLASH.get(ground, set()) & set(words)


class World:
    """Draws scenes from a seed."""

    def __init__(self, seed: int | str) -> None:
        self.random = random.Random(seed)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def background(self) -> int:
        # A third of the images get a painted scene: there are fewer of them, but each is harder.
        flat = len(COLOURS)
        return self.random.randrange(flat) if self.chance(0.67) else self.random.randrange(flat, len(BACKGROUNDS))

    def kind(self, background: int, *taken: int) -> int:
        """Draw an object that is visible there, two thirds of them nouns."""
        while True:
            noun = self.chance(0.66)
            kind = self.random.randrange(len(NOUNS)) if noun else self.random.randrange(len(NOUNS), len(KINDS))
            if kind not in taken and visible(kind, background):
                return kind

    def things(self, background: int, size: int, *slots: Slot) -> tuple[Thing, ...]:
        """Different objects in the given slots."""
        kinds: list[int] = []
        for _ in slots:
            kinds.append(self.kind(background, *kinds))
        return tuple(Thing(kind, size, slot) for kind, slot in zip(kinds, slots, strict=True))

    def single(self, sizes: tuple[float, float, float] = (0.2, 0.6, 0.2)) -> Scene:
        """One object: nine places, three sizes, as often as `sizes` says."""
        background = self.background()
        size = self.random.choices((SMALL, NORMAL, BIG), sizes)[0]
        slot = MIDDLE if self.chance(0.25) else self.random.choice(SLOTS)
        return Scene(background, self.things(background, size, slot))

    def pair(self) -> Scene:
        """Place two objects side by side, stacked, or in two corners."""
        background = self.background()
        layout = self.random.random()
        if layout < 0.5:
            slots = ((-1, 0), (1, 0))
        elif layout < 0.8:
            slots = ((0, -1), (0, 1))
        else:
            first, second = self.random.sample(CORNERS, 2)
            slots = (first, second)
        return Scene(background, self.things(background, NORMAL, *slots))

    def row(self) -> Scene:
        """Three objects beside each other."""
        background = self.background()
        return Scene(background, self.things(background, SMALL, (-1, 0), (0, 0), (1, 0)))

    def loose(self) -> Scene:
        """Place one to three objects anywhere, as a chain of edits would."""
        scene = Scene(self.background())
        for _ in range(self.random.randint(1, MAX_THINGS)):
            scene = self.with_another(scene, self.random.choice((SMALL, SMALL, NORMAL))) or scene
        return scene

    def with_another(self, scene: Scene, size: int = SMALL) -> Scene | None:
        """Add a thing in a free slot, or return None without one."""
        kind = self.kind(scene.background, *(thing.kind for thing in scene.things))
        for slot in self.random.sample(SLOTS, len(SLOTS)):
            thing = Thing(kind, size, slot)
            if fits(thing, scene.things):
                return replace(scene, things=(*scene.things, thing))
        return None

    def scene(self) -> Scene:
        """Any scene, fewer things more often."""
        draw = self.random.choices((self.single, self.pair, self.row, self.loose), (0.4, 0.3, 0.1, 0.2))[0]
        return draw()


def changed(scene: Scene, index: int, **fields: object) -> Scene:
    """The scene with one thing altered."""
    thing = replace(scene.things[index], **fields)
    return replace(scene, things=(*scene.things[:index], thing, *scene.things[index + 1 :]))


def without(scene: Scene, index: int) -> Scene:
    """The scene with one thing gone."""
    return replace(scene, things=(*scene.things[:index], *scene.things[index + 1 :]))
