"""Scenes of nano's world, and how they are drawn at random."""

import random
from dataclasses import dataclass, replace
from functools import lru_cache

from engine.nano.training.compositor import BACKGROUNDS, visibility
from engine.nano.training.frames import SIZES, UNITS, Frame, Slot
from engine.nano.training.sprites import KINDS
from engine.nano.words import COLOURS, NOUNS, SHAPES

SMALL, NORMAL, BIG = range(len(SIZES))

MAX_THINGS = 4

SLOTS: tuple[Slot, ...] = tuple((column, row) for row in (-1, 0, 1) for column in (-1, 0, 1))
CORNERS: tuple[Slot, ...] = ((-1, -1), (1, -1), (-1, 1), (1, 1))
MIDDLE: Slot = (0, 0)
ROW: tuple[Slot, ...] = ((-1, 0), (0, 0), (1, 0))
COLUMN: tuple[Slot, ...] = ((0, -1), (0, 0), (0, 1))

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in units."""


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
        """In units."""
        return SIZES[self.size]

    @property
    def shape(self) -> str | None:
        """The name of the geometric shape, or None for a noun."""
        return None if self.kind < len(NOUNS) else SHAPES[(self.kind - len(NOUNS)) // len(COLOURS)]

    @property
    def colour(self) -> int | None:
        """The index of a shape's colour, or None for a noun."""
        return None if self.kind < len(NOUNS) else (self.kind - len(NOUNS)) % len(COLOURS)

    def box(self, frame: Frame = UNITS) -> Box:
        """Left, top, right, bottom in units."""
        return frame.box(self.size, self.slot)


@dataclass(frozen=True)
class Scene:
    """A background and up to four things, later ones in front.

    background: an index into BACKGROUNDS.
    """

    background: int
    things: tuple[Thing, ...] = ()

    def pack(self) -> list:
        """Return names instead of indices: what a list of questions stores."""
        return [BACKGROUNDS[self.background], *([thing.name, thing.size, *thing.slot] for thing in self.things)]

    @classmethod
    def unpack(cls, packed: list) -> "Scene":
        ground, *things = packed
        return cls(
            BACKGROUNDS.index(ground), tuple(Thing(KINDS.index(name), size, (x, y)) for name, size, x, y in things)
        )


def shape_kind(shape: int, colour: int) -> int:
    """Return the kind of a shape in a colour."""
    return len(NOUNS) + shape * len(COLOURS) + colour


def overlap(a: Box, b: Box) -> int:
    """Return the square units that two boxes share."""
    (al, at, ar, ab), (bl, bt, br, bb) = a, b
    return max(0, min(ar, br) - max(al, bl)) * max(0, min(ab, bb) - max(at, bt))


TOLERATED_OVERLAP = 120
"""Shared square units that leave both things whole: sprites seldom fill the corners of their boxes."""


@lru_cache(maxsize=100_000)
def collide(frame: Frame, size: int, slot: Slot, other_size: int, other_slot: Slot) -> bool:
    """Return whether two objects would cover each other on the canvas."""
    return overlap(frame.box(size, slot), frame.box(other_size, other_slot)) > TOLERATED_OVERLAP


@lru_cache(maxsize=1000)
def _whole(frame: Frame, size: int, slot: Slot) -> bool:
    left, top, right, bottom = frame.box(size, slot)
    inside = left >= 0 and top >= 0 and right <= frame.width and bottom <= frame.height
    # Where there is no room to move, "at the top" would be the middle.
    return inside and (slot == MIDDLE or frame.centre(size, slot) != frame.centre(size, MIDDLE))


def fits(thing: Thing, others: tuple[Thing, ...], frame: Frame = UNITS) -> bool:
    """Return whether the thing is whole and its place free."""
    return _whole(frame, thing.size, thing.slot) and not any(
        collide(frame, thing.size, thing.slot, other.size, other.slot) for other in others
    )


def nested(scene: Scene) -> bool:
    """Return whether the scene is one small thing inside a big shape."""
    return len(scene.things) == 2 and scene.things[0].slot == scene.things[1].slot == MIDDLE


def valid(scene: Scene, frame: Frame) -> bool:
    """Return whether all things are whole and apart on the canvas."""
    if nested(scene):
        return all(_whole(frame, thing.size, thing.slot) for thing in scene.things)
    return all(fits(thing, scene.things[:i], frame) for i, thing in enumerate(scene.things))


@lru_cache(maxsize=1)
def _visible() -> list[list[bool]]:
    return visibility().tolist()


def visible(kind: int, background: int) -> bool:
    """Return whether the object stands out from the background."""
    return _visible()[kind][background]


class World:
    """Draws scenes for one canvas from a seed.

    nouns: how many of NOUNS there are, the first ones.
    """

    def __init__(self, seed: int | str, frame: Frame = UNITS, nouns: int = len(NOUNS)) -> None:
        self.random = random.Random(seed)
        self.frame = frame
        self.nouns = nouns

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def background(self) -> int:
        # Two in five images get a painted scene: each is harder than a flat colour.
        flat = len(COLOURS)
        return self.random.randrange(flat) if self.chance(0.6) else self.random.randrange(flat, len(BACKGROUNDS))

    def kind(self, background: int, *taken: int) -> int:
        """Draw an object that is visible there, three quarters of them nouns.

        taken: kinds that are not drawn again.
        """
        while True:
            noun = self.chance(0.75)
            kind = self.random.randrange(self.nouns) if noun else self.random.randrange(len(NOUNS), len(KINDS))
            if kind not in taken and visible(kind, background):
                return kind

    def things(self, background: int, size: int, *slots: Slot) -> tuple[Thing, ...]:
        """Return different objects in the given slots."""
        kinds: list[int] = []
        for _ in slots:
            kinds.append(self.kind(background, *kinds))
        return tuple(Thing(kind, size, slot) for kind, slot in zip(kinds, slots, strict=True))

    def single(self, sizes: tuple[float, float, float] = (0.2, 0.6, 0.2)) -> Scene:
        """Draw one object: nine places, three sizes, as often as `sizes` says."""
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
        """Draw three objects beside each other."""
        background = self.background()
        return Scene(background, self.things(background, SMALL, *ROW))

    def four(self) -> Scene:
        """Draw four objects, one in each corner."""
        background = self.background()
        return Scene(background, self.things(background, NORMAL, *CORNERS))

    def counted(self) -> Scene:
        """Draw two to four of a kind, in a row or corners."""
        background = self.background()
        kind = self.kind(background)
        size, slots = self.random.choice(GROUPS)
        return Scene(background, tuple(Thing(kind, size, slot) for slot in slots))

    def inside(self) -> Scene:
        """Draw a small object inside a big shape."""
        background = self.background()
        while True:
            shape, colour = self.random.choice(CONTAINERS), self.random.randrange(len(COLOURS))
            outer = shape_kind(SHAPES.index(shape), colour)
            inner = self.kind(colour)
            if visible(outer, background) and inner != outer:
                return Scene(background, (Thing(outer, BIG, MIDDLE), Thing(inner, SMALL, MIDDLE)))

    def loose(self) -> Scene:
        """Place one to four objects anywhere, as a chain of edits would."""
        scene = Scene(self.background())
        for _ in range(self.random.randint(1, MAX_THINGS)):
            scene = self.with_another(scene, self.random.choice((SMALL, SMALL, NORMAL))) or scene
        return scene

    def with_another(self, scene: Scene, size: int = SMALL) -> Scene | None:
        """Add a thing in a free slot, or return None without one."""
        kind = self.kind(scene.background, *(thing.kind for thing in scene.things))
        for slot in self.random.sample(SLOTS, len(SLOTS)):
            thing = Thing(kind, size, slot)
            if fits(thing, scene.things, self.frame):
                return replace(scene, things=(*scene.things, thing))
        return None

    def one_of(self, scene: Scene) -> int | None:
        """Draw the index of a thing of the scene, None without things."""
        return self.random.randrange(len(scene.things)) if scene.things else None

    def scene(self) -> Scene:
        """Draw any scene that fits on the canvas, fewer things more often."""
        kinds = (self.single, self.pair, self.row, self.loose, self.four, self.counted, self.inside)
        return self.fitting(lambda: self.random.choices(kinds, (0.34, 0.26, 0.08, 0.18, 0.04, 0.06, 0.04))[0]())

    def fitting(self, draw) -> Scene:
        """Draw again until a scene fits on the canvas."""
        while not valid(scene := draw(), self.frame):
            pass
        return scene


GROUPS: tuple[tuple[int, tuple[Slot, ...]], ...] = (
    (NORMAL, ((-1, 0), (1, 0))),
    (SMALL, ((-1, 0), (1, 0))),
    (SMALL, ROW),
    (NORMAL, CORNERS),
    (SMALL, CORNERS),
)
"""The layouts of two, three and four of a kind: (size, slots)."""
CONTAINERS = ("circle", "square", "heart", "diamond")
"""Shapes that another thing can be inside of."""


def changed(scene: Scene, index: int, **fields: object) -> Scene:
    """Return the scene with one thing altered."""
    thing = replace(scene.things[index], **fields)
    return replace(scene, things=(*scene.things[:index], thing, *scene.things[index + 1 :]))


def without(scene: Scene, index: int) -> Scene:
    """Return the scene with one thing gone."""
    return replace(scene, things=(*scene.things[:index], *scene.things[index + 1 :]))
