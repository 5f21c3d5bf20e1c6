"""Edits of a scene: the sentence, and the scene after it."""

from collections.abc import Callable
from dataclasses import replace

from engine.nano.training.compositor import BACKGROUNDS
from engine.nano.training.frames import UNITS, Frame, Slot
from engine.nano.training.phrases import PLACES, Phrases
from engine.nano.training.scenes import (
    BIG,
    MAX_THINGS,
    MIDDLE,
    NORMAL,
    SLOTS,
    SMALL,
    Box,
    Scene,
    World,
    changed,
    fits,
    nested,
    shape_kind,
    visible,
    without,
)
from engine.nano.words import COLOURS, SHAPES

GOALS: dict[Slot, tuple[str, ...]] = {
    (-1, 0): ("to the left", "to the left side"),
    (1, 0): ("to the right", "to the right side"),
    (0, -1): ("to the top", "up to the top"),
    (0, 1): ("to the bottom", "down to the bottom"),
    (-1, -1): ("to the top left", "to the top left corner"),
    (1, -1): ("to the top right", "to the top right corner"),
    (-1, 1): ("to the bottom left", "to the bottom left corner"),
    (1, 1): ("to the bottom right", "to the bottom right corner"),
    MIDDLE: ("to the middle", "to the center"),
}

_SWAPS = ("replace {old} with {new}", "swap {old} for {new}", "turn {old} into {new}", "change {old} into {new}",
          "change {old} to {new}", "put {new} in place of {old}", "replace {old} by {new}")  # fmt: skip
_REMOVALS = ("remove {}", "delete {}", "erase {}", "take away {}", "get rid of {}", "take {} away", "make {} disappear")
_ADDITIONS = ("add {} {}", "put {} {}", "place {} {}", "draw {} {}")
_MOVES = ("move {} {}", "shift {} {}", "bring {} {}", "take {} {}")
_RECOLOURS = (
    "make {} {}",
    "change {} to {}",
    "turn {} {}",
    "paint {} {}",
    "color {} {}",
    "change the color of {} to {}",
)
_GROWTHS = ("make {} bigger", "make {} larger", "enlarge {}", "make {} big")
_SHRINKINGS = ("make {} smaller", "shrink {}", "make {} small", "shrink {} down", "shrink down {}")
_FLAT_CHANGES = ("make the background {}", "change the background to {}", "turn the background {}", "{} background",
                 "give it a {} background", "change the background color to {}", "paint the background {}",
                 "put it on a {} background", "use a {} background", "use {} for the background")  # fmt: skip
_PAINTED_CHANGES = ("change the background to {name}", "make the background {name}", "put it {setting}",
                    "move the scene {setting}", "replace the background with {name}", "set it {setting}")  # fmt: skip

EDITS = {"background": 0.16, "replace": 0.22, "remove": 0.14, "add": 0.16, "move": 0.12, "recolour": 0.12,
         "resize": 0.08}  # fmt: skip
"""Kinds of edit and how often each is asked."""

Edit = tuple[str, Scene]
"""The sentence that asks for an edit, and the scene after it."""


def touched(before: Scene, after: Scene, frame: Frame = UNITS) -> tuple[Box, ...]:
    """Return the boxes of the things that differ between two scenes.

    A new background changes everything else.
    """
    return tuple(thing.box(frame) for thing in {*before.things} ^ {*after.things})


class Edits:
    """Draws edits of given scenes, None where one makes no sense."""

    def __init__(self, world: World, phrases: Phrases) -> None:
        self.world = world
        self.phrases = phrases
        self.random = world.random
        self.pick = world.random.choice
        self._kinds: dict[str, Callable[[Scene], Edit | None]] = {
            "background": self._background,
            "replace": self._replace,
            "remove": self._remove,
            "add": self._add,
            "move": self._move,
            "recolour": self._recolour,
            "resize": self._resize,
        }

    def draw(self, kind: str, scene: Scene) -> Edit | None:
        """Draw an edit of one of the kinds in EDITS."""
        return self._kinds[kind](scene)

    def _background(self, scene: Scene) -> Edit | None:
        background = self.world.background()
        if background == scene.background or not all(visible(thing.kind, background) for thing in scene.things):
            return None
        name = BACKGROUNDS[background]
        if name in COLOURS:
            sentence = self.pick(_FLAT_CHANGES).format(name)
        else:
            sentence = self.pick(_PAINTED_CHANGES).format(
                name=self.phrases.background(background), setting=self.phrases.setting(background)
            )
        return sentence, replace(scene, background=background)

    def _replace(self, scene: Scene) -> Edit | None:
        if (i := self.world.one_of(scene)) is None:
            return None
        ground = scene.background
        if nested(scene):
            # The shape stays; what is inside it must stand out from it.
            i, ground = 1, scene.things[0].colour or 0
        kind = self.world.kind(ground, *(thing.kind for thing in scene.things))
        target = changed(scene, i, kind=kind)
        new = self.phrases.named(target.things[i].name)
        return self.pick(_SWAPS).format(old=self.phrases.the(scene.things[i], scene), new=new), target

    def _remove(self, scene: Scene) -> Edit | None:
        if (i := self.world.one_of(scene)) is None:
            return None
        if nested(scene):
            i = 1
        return self.pick(_REMOVALS).format(self.phrases.the(scene.things[i], scene)), without(scene, i)

    def _add(self, scene: Scene) -> Edit | None:
        if len(scene.things) >= MAX_THINGS or (target := self.world.with_another(scene)) is None:
            return None
        new = target.things[-1]
        return self.pick(_ADDITIONS).format(self.phrases.named(new.name), self.pick(PLACES[new.slot])), target

    def _move(self, scene: Scene) -> Edit | None:
        if (i := self.world.one_of(scene)) is None or nested(scene):
            return None
        thing, others = scene.things[i], without(scene, i).things
        frame = self.world.frame
        free = [slot for slot in SLOTS if slot != thing.slot and fits(replace(thing, slot=slot), others, frame)]
        if not free:
            return None
        slot = self.pick(free)
        sentence = self.pick(_MOVES).format(self.phrases.the(thing, scene), self.pick(GOALS[slot]))
        return sentence, changed(scene, i, slot=slot)

    def _recolour(self, scene: Scene) -> Edit | None:
        shapes = [i for i, thing in enumerate(scene.things) if thing.shape]
        if not shapes:
            return None
        i = self.pick(shapes)
        thing = scene.things[i]
        colour = self.random.randrange(len(COLOURS))
        kind = shape_kind(SHAPES.index(thing.shape or ""), colour)
        taken = {other.kind for other in scene.things}
        if nested(scene) and (i == 1 or not visible(scene.things[1].kind, colour)):
            return None
        if kind in taken or not visible(kind, scene.background):
            return None
        name = tuple(COLOURS)[colour]
        return self.pick(_RECOLOURS).format(self.phrases.the(thing, scene), name), changed(scene, i, kind=kind)

    def _resize(self, scene: Scene) -> Edit | None:
        if (i := self.world.one_of(scene)) is None or nested(scene):
            return None
        thing = scene.things[i]
        bigger = {SMALL: NORMAL, NORMAL: BIG}.get(thing.size)
        smaller = {NORMAL: SMALL, BIG: NORMAL}.get(thing.size)
        size = bigger if bigger is not None and (smaller is None or self.world.chance(0.5)) else smaller
        if size is None or not fits(replace(thing, size=size), without(scene, i).things, self.world.frame):
            return None
        wordings = _GROWTHS if size == bigger else _SHRINKINGS
        return self.pick(wordings).format(self.phrases.the(thing, scene)), changed(scene, i, size=size)
