"""Prompts for scenes, edits and compositions, and which wordings are held out."""

import json
import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

from engine.nano.training.compositor import BACKGROUNDS
from engine.nano.training.frames import SMALL_SQUARE, Frame, Slot
from engine.nano.training.scenes import (
    BIG,
    COLUMN,
    CORNERS,
    MAX_THINGS,
    MIDDLE,
    NORMAL,
    ROW,
    SLOTS,
    SMALL,
    Box,
    Scene,
    Thing,
    World,
    changed,
    fits,
    nested,
    shape_kind,
    valid,
    visible,
    without,
)
from engine.nano.words import COLOURS, COUNTS, NOUNS, SHAPES, UNCOUNTED, plural


@dataclass(frozen=True)
class Example:
    """One example: the prompt, its reference scenes and the wanted scene.

    task: generate, compose, or the kind of edit. touched: boxes the edit may repaint, in units.
    """

    task: str
    prompt: str
    target: Scene
    references: tuple[Scene, ...] = ()
    touched: tuple[Box, ...] = ()
    frame: Frame = SMALL_SQUARE


OPENINGS = ("", "", "", "a picture of", "a photo of", "an image of", "a drawing of", "draw", "show me", "paint", "make",
            "please draw", "a painting of")  # fmt: skip

PLACES: dict[Slot, tuple[str, ...]] = {
    (-1, 0): ("on the left", "at the left", "on the left side"),
    (1, 0): ("on the right", "at the right", "on the right side"),
    (0, -1): ("at the top", "near the top", "in the top"),
    (0, 1): ("at the bottom", "near the bottom", "in the bottom"),
    (-1, -1): ("in the top left", "in the top left corner", "at the top left"),
    (1, -1): ("in the top right", "in the top right corner", "at the top right"),
    (-1, 1): ("in the bottom left", "in the bottom left corner", "at the bottom left"),
    (1, 1): ("in the bottom right", "in the bottom right corner", "at the bottom right"),
    MIDDLE: ("in the middle", "in the center", "at the center"),
}

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

_FLAT = ("on a {} background", "on {}", "against a {} background", "with a {} background",
         "in front of a {} background", "on a plain {} background")  # fmt: skip
_SETTINGS = {
    "grass": ("on the grass", "in a meadow", "on a grass field", "in the field"),
    "desert": ("in the desert", "in a desert", "on the sand"),
    "ocean": ("in the ocean", "on the ocean", "at sea", "on the sea"),
    "night": ("at night", "under the stars", "in the night sky"),
    "snow": ("in the snow", "in winter", "on the snow"),
    "sunset": ("at sunset", "in the sunset", "in front of a sunset"),
    "clouds": ("in the sky", "in the blue sky", "up in the sky", "against the sky"),
    "room": ("in a room", "in the room", "on the floor of a room", "inside a room"),
    "beach": ("on the beach", "at the beach", "on a beach", "at the shore"),
    "forest": ("in the forest", "in a forest", "in the woods", "among trees"),
    "space": ("in space", "in outer space", "out in space", "in front of space"),
    "city": ("in the city", "in a city", "in town", "on a street", "in front of a city"),
}
_NAMES = {
    "grass": ("grass", "a meadow"),
    "desert": ("a desert", "the desert"),
    "ocean": ("the ocean", "the sea"),
    "night": ("the night sky", "night"),
    "snow": ("snow", "winter"),
    "sunset": ("a sunset", "the sunset"),
    "clouds": ("the sky", "a blue sky"),
    "room": ("a room", "the room"),
    "beach": ("a beach", "the beach"),
    "forest": ("a forest", "the forest", "the woods"),
    "space": ("space", "outer space"),
    "city": ("a city", "the city", "a street"),
}
_SIZES = {SMALL: ("small", "tiny", "little"), BIG: ("big", "large", "huge")}

_TRAINED_SIZES = (0.25, 0.35, 0.4)
"""How often a lone object is small, normal and big in training: big ones are always alone, each size is learnt anew."""

_BESIDE = {
    (-1, 0): ("{a} to the left of {b}", "{a} left of {b}", "{a} next to {b}", "{a} beside {b}", "{a} and {b}",
              "{b} to the right of {a}", "{b} right of {a}", "{a} on the left and {b} on the right",
              "{b} on the right and {a} on the left", "{a} on the left of {b}", "{b} on the right of {a}"),
    (0, -1): ("{a} above {b}", "{a} over {b}", "{b} below {a}", "{b} under {a}", "{a} on top of {b}",
              "{a} at the top and {b} at the bottom", "{b} at the bottom and {a} at the top", "{a} on {b}",
              "{b} with {a} on top", "{a} standing on {b}", "{a} sitting on {b}", "{b} underneath {a}"),
}  # fmt: skip
_ROWS = ("{a}, {b} and {c} in a row", "{a}, {b} and {c}", "{a} on the left, {b} in the middle and {c} on the right",
         "from left to right {a}, {b} and {c}", "{b} between {a} and {c}")  # fmt: skip

_COLUMNS = ("{a}, {b} and {c} from top to bottom", "from top to bottom {a}, {b} and {c}",
            "{a} above {b} and {b} above {c}", "{a} at the top, {b} in the middle and {c} at the bottom")  # fmt: skip
_FOURS = ("{a}, {b}, {c} and {d}", "{a}, {b}, {c} and {d} in the corners", "in the corners {a}, {b}, {c} and {d}",
          "{a} and {b} above {c} and {d}", "{a} and {b} at the top, {c} and {d} at the bottom",
          "{c} and {d} below {a} and {b}")  # fmt: skip
_GROUPS = ("{}", "{}", "a group of {}")
_GROUP_PLACES: dict[tuple[Slot, ...], tuple[str, ...]] = {
    ((-1, 0), (1, 0)): ("", "", " side by side", " next to each other"),
    ROW: ("", "", " in a row", " side by side"),
    CORNERS: ("", "", " in the corners", ", one in each corner"),
}
_INSIDE = ("{a} inside {b}", "{a} in {b}", "{b} with {a} inside", "{b} with {a} in it", "{a} within {b}",
           "{b} around {a}", "{a} in the middle of {b}")  # fmt: skip

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


def article(phrase: str) -> str:
    """Return the phrase with its article, if its noun has one."""
    if phrase.rpartition(" ")[2] in UNCOUNTED:
        return phrase
    return ("an " if phrase[0] in "aeiou" and not phrase.startswith("uni") else "a ") + phrase


def _unique(thing: Thing, scene: Scene) -> str:
    """Name a thing so that no other of the scene is meant.

    The shape alone where only one thing has it.
    """
    alike = [other for other in scene.things if other.shape == thing.shape]
    return thing.shape if thing.shape and len(alike) == 1 else thing.name


class PromptSampler:
    """Describes scenes and draws tasks for one canvas, from a seed."""

    def __init__(self, seed: int | str, frame: Frame = SMALL_SQUARE) -> None:
        self.world = World(seed, frame)
        self.random: random.Random = self.world.random
        self.pick = self.random.choice

    @property
    def frame(self) -> Frame:
        return self.world.frame

    # Phrases

    def thing(self, thing: Thing) -> str:
        size = f"{self.pick(_SIZES[thing.size])} " if thing.size in _SIZES else ""
        return self.named(size + thing.name)

    def named(self, phrase: str) -> str:
        """Return an indefinite phrase.

        Now and then "some" or "one" stands for the article.
        """
        if phrase.rpartition(" ")[2] in UNCOUNTED:
            return f"some {phrase}" if self.world.chance(0.3) else phrase
        return f"one {phrase}" if self.world.chance(0.04) else article(phrase)

    def the(self, thing: Thing, scene: Scene) -> str:
        """Return a definite phrase for a thing that a reference shows."""
        if any(other.kind == thing.kind and other is not thing for other in scene.things):
            return f"the {thing.name} {self.pick(PLACES[thing.slot])}"
        short = _unique(thing, scene)
        name = thing.name if self.world.chance(0.5) else short
        return f"the {name} {self.pick(PLACES[thing.slot])}" if self.world.chance(0.06) else "the " + name

    def setting(self, background: int) -> str:
        name = BACKGROUNDS[background]
        return self.pick(_FLAT).format(name) if name in COLOURS else self.pick(_SETTINGS[name])

    def content(self, scene: Scene) -> str:
        """Describe the things of a scene and their places, without the background."""
        things = scene.things
        slots = tuple(thing.slot for thing in things)
        if len(things) > 1 and len({(thing.kind, thing.size) for thing in things}) == 1 and slots in _GROUP_PLACES:
            return self._group(scene)
        if nested(scene):
            big = f"{self.pick(_SIZES[BIG])} " if self.world.chance(0.3) else ""
            small = f"{self.pick(_SIZES[SMALL])} " if self.world.chance(0.3) else ""
            outer, inner = scene.things
            inner, outer = article(small + inner.name), article(big + outer.name)
            return self.pick(_INSIDE).format(a=inner, b=outer)
        if slots in (ROW, COLUMN) and all(thing.size == SMALL for thing in things):
            # Three only fit when small, so that the size goes without saying.
            names = [self.named(thing.name) for thing in things]
            return self.pick(_ROWS if slots == ROW else _COLUMNS).format(a=names[0], b=names[1], c=names[2])
        names = [self.thing(thing) for thing in things]
        if slots == CORNERS and self.world.chance(0.7):
            return self.pick(_FOURS).format(**dict(zip("abcd", names, strict=True)))
        if len(names) == 2 and slots[0] in _BESIDE and slots[1] == (-slots[0][0], -slots[0][1]):
            return self.pick(_BESIDE[slots[0]]).format(a=names[0], b=names[1])
        places = [self.pick(PLACES[slot]) for slot in slots]
        if len(names) == 1:
            unsaid = slots[0] == MIDDLE and self.world.chance(0.7)
            return names[0] if unsaid else f"{names[0]} {places[0]}"
        phrases = [f"{name} {place}" for name, place in zip(names, places, strict=True)]
        return f"{', '.join(phrases[:-1])} and {phrases[-1]}"

    def _group(self, scene: Scene) -> str:
        """Return "three small stars"."""
        thing, count = scene.things[0], len(scene.things)
        # A row is always small, so that the size may be left out.
        sized = thing.size == SMALL and (count != 3 or self.world.chance(0.7))
        number = "a pair of" if count == 2 and self.world.chance(0.15) else COUNTS[count - 2]
        size = f"{self.pick(_SIZES[SMALL])} " if sized else ""
        *colour, noun = thing.name.split(" ")
        things = f"{number} {size}{' '.join((*colour, plural(noun)))}"
        return self.pick(_GROUPS).format(things) + self.pick(_GROUP_PLACES[tuple(t.slot for t in scene.things)])

    def finish(self, sentence: str) -> str:
        """Capitals and full stops come and go, as people type."""
        if self.world.chance(0.7):
            sentence = sentence.replace("a orange", "an orange")
        if self.world.chance(0.25):
            sentence = sentence[0].upper() + sentence[1:]
        return sentence + "." if self.world.chance(0.2) else sentence

    def describe(self, scene: Scene) -> str:
        content, setting = self.content(scene), self.setting(scene.background)
        opening = self.pick(OPENINGS)
        if self.world.chance(0.15):
            return f"{setting}, {content}"
        return f"{opening} {content}{self.pick((' ', ' ', ' ', ', '))}{setting}".strip()

    # Tasks

    def generate(self, draw: Callable[[], Scene] | None = None) -> Example:
        world = self.world
        if draw is None:
            draws = (partial(world.single, _TRAINED_SIZES), world.pair, world.row, world.four, world.counted,
                     world.inside, self._column)  # fmt: skip
            draw = self.random.choices(draws, (0.42, 0.26, 0.06, 0.06, 0.11, 0.06, 0.03))[0]
            scene = draw()
            while not valid(scene, self.frame):
                scene = self.random.choices(draws, (0.42, 0.26, 0.06, 0.06, 0.11, 0.06, 0.03))[0]()
        else:
            scene = world.fitting(draw)
        return Example("generate", self.finish(self.describe(scene)), scene, frame=self.frame)

    def _column(self) -> Scene:
        background = self.world.background()
        return Scene(background, self.world.things(background, SMALL, *COLUMN))

    def kind_of_edit(self) -> str:
        return self.random.choices(tuple(EDITS), tuple(EDITS.values()))[0]

    def edit(self, kind: str, source: Scene | None = None) -> Example | None:
        """Draw an edit of the given kind.

        None if the given scene has no place for it.
        """
        while True:
            scene = self.world.scene() if source is None else source
            # The kind stays: drawn anew with the scene, the kinds that seldom fit would hardly ever be met.
            if made := getattr(self, f"_{kind}")(scene):
                break
            if source is not None:
                return None
        sentence, target = made
        return Example(kind, self.finish(sentence), target, (scene,), touched(scene, target, self.frame), self.frame)

    def edit_chain(self) -> Example:
        """Draw a training edit of a tidy or an edited scene."""
        while True:
            kind = self.random.choices(tuple(_TRAINED_EDITS), tuple(_TRAINED_EDITS.values()))[0]
            if self.world.chance(0.35):
                scene = self.world.scene()
            else:
                scene = self.world.fitting(self.world.pair)
                for _ in range(self.random.randrange(8)):
                    scene = self._altered(self.pick(_ALTERATIONS), scene)
            if example := self.edit(kind, scene):
                return example

    def _altered(self, kind: str, scene: Scene) -> Scene:
        """Return the scene after an edit, unchanged if none fits."""
        made = getattr(self, f"_{kind}")(scene)
        return made[1] if made else scene

    # Edits: the sentence and the scene after it, or None where the edit makes no sense.

    def _background(self, scene: Scene) -> tuple[str, Scene] | None:
        background = self.world.background()
        if background == scene.background or not all(visible(thing.kind, background) for thing in scene.things):
            return None
        name = BACKGROUNDS[background]
        if name in COLOURS:
            sentence = self.pick(_FLAT_CHANGES).format(name)
        else:
            sentence = self.pick(_PAINTED_CHANGES).format(
                name=self.pick(_NAMES[name]), setting=self.setting(background)
            )
        return sentence, replace(scene, background=background)

    def _one(self, scene: Scene) -> int | None:
        return self.random.randrange(len(scene.things)) if scene.things else None

    def _replace(self, scene: Scene) -> tuple[str, Scene] | None:
        if (i := self._one(scene)) is None:
            return None
        ground = scene.background
        if nested(scene):
            # The shape stays; what is inside it must stand out from it.
            i, ground = 1, scene.things[0].colour or 0
        kind = self.world.kind(ground, *(thing.kind for thing in scene.things))
        target = changed(scene, i, kind=kind)
        new = self.named(target.things[i].name)
        return self.pick(_SWAPS).format(old=self.the(scene.things[i], scene), new=new), target

    def _remove(self, scene: Scene) -> tuple[str, Scene] | None:
        if (i := self._one(scene)) is None:
            return None
        if nested(scene):
            i = 1
        return self.pick(_REMOVALS).format(self.the(scene.things[i], scene)), without(scene, i)

    def _add(self, scene: Scene) -> tuple[str, Scene] | None:
        if len(scene.things) >= MAX_THINGS or (target := self.world.with_another(scene)) is None:
            return None
        new = target.things[-1]
        return self.pick(_ADDITIONS).format(self.named(new.name), self.pick(PLACES[new.slot])), target

    def _move(self, scene: Scene) -> tuple[str, Scene] | None:
        if (i := self._one(scene)) is None or nested(scene):
            return None
        thing, others = scene.things[i], without(scene, i).things
        free = [slot for slot in SLOTS if slot != thing.slot and fits(replace(thing, slot=slot), others, self.frame)]
        if not free:
            return None
        slot = self.pick(free)
        sentence = self.pick(_MOVES).format(self.the(thing, scene), self.pick(GOALS[slot]))
        return sentence, changed(scene, i, slot=slot)

    def _recolour(self, scene: Scene) -> tuple[str, Scene] | None:
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
        return self.pick(_RECOLOURS).format(self.the(thing, scene), name), changed(scene, i, kind=kind)

    def _resize(self, scene: Scene) -> tuple[str, Scene] | None:
        if (i := self._one(scene)) is None or nested(scene):
            return None
        thing = scene.things[i]
        bigger = {SMALL: NORMAL, NORMAL: BIG}.get(thing.size)
        smaller = {NORMAL: SMALL, BIG: NORMAL}.get(thing.size)
        size = bigger if bigger is not None and (smaller is None or self.world.chance(0.5)) else smaller
        if size is None or not fits(replace(thing, size=size), without(scene, i).things, self.frame):
            return None
        wordings = _GROWTHS if size == bigger else _SHRINKINGS
        return self.pick(wordings).format(self.the(thing, scene)), changed(scene, i, size=size)

    def compose(self, references: int | None = None) -> Example | None:
        """Draw a composition of parts of two to four references.

        None if the drawn parts do not go together.
        """
        references = references or self.random.choices((2, 3, 4), (0.7, 0.2, 0.1))[0]
        if references == 2 and self.world.chance(0.3):
            return self._transplant()
        if references > 2 and self.world.chance(0.5):
            return self._assemble(references)
        return self._gather(references)

    def _transplant(self) -> Example | None:
        """Put all of image 1 on image 2's background, or the reverse."""
        references = (self.world.scene(), self.world.scene())
        content = self.random.randrange(2)
        ground = references[1 - content].background
        things = references[content].things
        if ground == references[content].background or not all(visible(thing.kind, ground) for thing in things):
            return None
        if nested(references[content]) and not visible(things[1].kind, things[0].colour or 0):
            return None
        sentence = self.pick(_TRANSPLANTS).format(content + 1, 2 - content)
        return Example("compose", self.finish(sentence), Scene(ground, things), references, frame=self.frame)

    def _gather(self, count: int) -> Example | None:
        """Put things of two references on a new or given background."""
        references = tuple(self.world.scene() for _ in range(count))
        own = self.random.randrange(-1, count) if count == 2 else count - 1
        ground = self.world.background() if own < 0 else references[own].background
        chosen, names = self._chosen(references, self.random.sample(range(max(2, count - 1)), 2))
        if len({*chosen}) < 2 or not all(visible(kind, ground) for kind in chosen):
            return None
        first: Slot = (-1, 0) if self.world.chance(0.7) else (0, -1)
        things = (Thing(chosen[0], NORMAL, first), Thing(chosen[1], NORMAL, (-first[0], -first[1])))
        content = self.pick(_BESIDE[first]).format(a=names[0], b=names[1])
        return self._composition(content, own, Scene(ground, things), references)

    def _assemble(self, count: int) -> Example | None:
        """Put one thing of each reference together, in a row or corners.

        count: three or four references.
        """
        references = tuple(self.world.scene() for _ in range(count))
        own = self.random.randrange(-1, count)
        ground = self.world.background() if own < 0 else references[own].background
        chosen, names = self._chosen(references, self.random.sample(range(count), count))
        if len({*chosen}) < count or not all(visible(kind, ground) for kind in chosen):
            return None
        if count == 3:
            things = tuple(Thing(kind, SMALL, slot) for kind, slot in zip(chosen, ROW, strict=True))
            content = self.pick(_ROWS).format(**dict(zip("abc", names, strict=True)))
        else:
            things = tuple(Thing(kind, NORMAL, slot) for kind, slot in zip(chosen, CORNERS, strict=True))
            content = self.pick(_FOURS).format(**dict(zip("abcd", names, strict=True)))
        return self._composition(content, own, Scene(ground, things), references)

    def _chosen(self, references: tuple[Scene, ...], order: list[int]) -> tuple[list[int], list[str]]:
        """Return a thing's kind and its phrase from each reference.

        There are fewer of them where a reference is empty.
        """
        chosen, names = [], []
        for i in order:
            scene = references[i]
            if (j := self._one(scene)) is None:
                continue
            thing = scene.things[j]
            alone = len(scene.things) == 1
            unique = sum(other.kind == thing.kind for other in scene.things) == 1
            # Of two alike, either will do.
            name = self.the(thing, scene) if unique else f"the {thing.name}"
            name = "the object" if alone and self.world.chance(0.15) else name
            names.append(f"{name} {self.pick(('from', 'from', 'of', 'in'))} image {i + 1}")
            chosen.append(thing.kind)
        return chosen, names

    def _composition(self, content: str, own: int, target: Scene, references: tuple[Scene, ...]) -> Example | None:
        if not valid(target, self.frame):
            return None
        setting = self.setting(target.background) if own < 0 else self.pick(_BORROWED).format(own + 1)
        return Example("compose", self.finish(f"{content} {setting}"), target, references, frame=self.frame)


_TRANSPLANTS = ("image {} on the background of image {}", "image {} with the background from image {}",
                "image {} with the background of image {}", "put image {} on the background of image {}",
                "use image {} with the background from image {}",
                "use image {} and put it on the background of image {}",
                "use image {} in front of the background of image {}")  # fmt: skip
_BORROWED = ("on the background of image {}", "on the background from image {}", "with the background of image {}",
             "with the background from image {}")  # fmt: skip

EDITS = {"background": 0.16, "replace": 0.22, "remove": 0.14, "add": 0.16, "move": 0.12, "recolour": 0.12,
         "resize": 0.08}  # fmt: skip
"""Kinds of edit and how often each is asked."""

_TRAINED_EDITS = {"background": 0.09, "replace": 0.22, "remove": 0.07, "add": 0.12, "move": 0.21, "recolour": 0.12,
              "resize": 0.17}  # fmt: skip
"""How often each is tried in training: what fails most among two and three things, most often. Some do not fit."""
_ALTERATIONS = tuple(kind for kind in EDITS if kind != "background")


def touched(before: Scene, after: Scene, frame: Frame = SMALL_SQUARE) -> tuple[Box, ...]:
    """Return the boxes of the things that differ between two scenes.

    A new background changes everything else.
    """
    return tuple(thing.box(frame) for thing in {*before.things} ^ {*after.things})


# "stars" also describes the night.
_MASKED = {*NOUNS, *SHAPES, *COLOURS, *map(plural, (*NOUNS, *SHAPES))} - {"stars"}
_NAMES_IN_PROMPT = re.compile(rf"\b(?:{'|'.join(sorted(_MASKED, key=len, reverse=True))})\b")

HELD_OUT_ONE_IN = 12
OLD_LIST = Path(__file__).with_name("held_out_48.jsonl")
"""The questions of the first nano (48 nouns at 128 × 128): held out for good, so that both can be compared on them."""


def _one_in(text: str) -> bool:
    return zlib.crc32(text.encode()) % HELD_OUT_ONE_IN == 0


@lru_cache(maxsize=200_000)
def _sentence_held_out(sentence: str) -> bool:
    return _one_in(sentence)


def wording_held_out(example: Example) -> bool:
    """Whether this wording is held out from training.

    Each of its words occurs in other wordings.
    """
    sentence = _NAMES_IN_PROMPT.sub("*", example.prompt.lower().rstrip(".")).replace("an *", "a *")
    return _sentence_held_out(sentence)


def combination_held_out(example: Example) -> bool:
    """Whether this combination of wanted and given scenes is held out."""
    key = (example.target, example.references)
    return key in _old_combinations() or _one_in(
        repr([scene.pack() for scene in (example.target, *example.references)])
    )


@lru_cache(maxsize=1)
def _old_combinations() -> frozenset[tuple[Scene, tuple[Scene, ...]]]:
    lines = [json.loads(line) for line in OLD_LIST.read_text().splitlines()]
    return frozenset((Scene.unpack(line[4]), tuple(map(Scene.unpack, line[5:]))) for line in lines)


BIG_SHARE = 0.25
"""Of the images to generate, for one big thing. With 12 % of examples showing one, half of the big things of the list
came out as smears at 256 × 256, while every small and normal one was right: 750 k samples on an H200."""
RESIZE_SHARE = 0.1
"""Of edits, to resize one thing alone: there is room for a big one. 68 % of such edits were done."""


def training_prompts(sampler: PromptSampler, task: str, references: int | None = None) -> Example:
    """Draw a training example: no held-out wording, no held-out combination."""
    world = sampler.world
    draw: Callable[[], Example | None] = {
        "generate": sampler.generate,
        "edit": sampler.edit_chain,
        "compose": partial(sampler.compose, references),
    }[task]
    big = partial(sampler.generate, partial(world.single, (0.0, 0.0, 1.0)))
    while True:
        make = draw
        if task == "generate" and world.chance(BIG_SHARE):
            make = big
        elif task == "edit" and world.chance(RESIZE_SHARE):
            make = partial(sampler.edit, "resize", world.fitting(partial(world.single, (0.15, 0.55, 0.3))))
        if (example := make()) and not wording_held_out(example) and not combination_held_out(example):
            return example


def unseen(sampler: PromptSampler, make: Callable[[PromptSampler], Example | None]) -> Example:
    """Draw an example whose wording and combination are both held out."""
    while True:
        example = make(sampler)
        if example and wording_held_out(example) and combination_held_out(example):
            return example
