"""Prompts for scenes, edits and compositions, and which wordings are held out."""

import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from engine.nano.training.compositor import BACKGROUNDS
from engine.nano.training.scenes import (
    BIG,
    MAX_THINGS,
    MIDDLE,
    NORMAL,
    SLOTS,
    SMALL,
    Scene,
    Slot,
    Thing,
    World,
    changed,
    fits,
    shape_kind,
    visible,
    without,
)
from engine.nano.words import COLOURS, NOUNS, SHAPES


@dataclass(frozen=True)
class Example:
    """One example: the prompt, its reference scenes and the wanted scene.

    task: generate, compose, or the kind of edit. touched: boxes (left, top, right, bottom) the edit may repaint.
    """

    task: str
    prompt: str
    target: Scene
    references: tuple[Scene, ...] = ()
    touched: tuple[tuple[int, int, int, int], ...] = ()


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
}
_NAMES = {
    "grass": ("grass", "a meadow"),
    "desert": ("a desert", "the desert"),
    "ocean": ("the ocean", "the sea"),
    "night": ("the night sky", "night"),
    "snow": ("snow", "winter"),
    "sunset": ("a sunset", "the sunset"),
}
_SIZES = {SMALL: ("small", "tiny", "little"), BIG: ("big", "large", "huge")}

_PRACTISED = (0.25, 0.35, 0.4)
"""How often a lone object is small, normal and big in training: big ones are always alone, each size is learnt anew."""

_BESIDE = {
    (-1, 0): ("{a} to the left of {b}", "{a} left of {b}", "{a} next to {b}", "{a} beside {b}", "{a} and {b}",
              "{b} to the right of {a}", "{b} right of {a}", "{a} on the left and {b} on the right",
              "{b} on the right and {a} on the left", "{a} on the left of {b}", "{b} on the right of {a}"),
    (0, -1): ("{a} above {b}", "{a} over {b}", "{b} below {a}", "{b} under {a}", "{a} on top of {b}",
              "{a} at the top and {b} at the bottom", "{b} at the bottom and {a} at the top"),
}  # fmt: skip
_ROWS = ("{a}, {b} and {c} in a row", "{a}, {b} and {c}", "{a} on the left, {b} in the middle and {c} on the right",
         "from left to right {a}, {b} and {c}", "{b} between {a} and {c}")  # fmt: skip

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
    """With "a" or "an" before it."""
    return ("an " if phrase[0] in "aeiou" and not phrase.startswith("uni") else "a ") + phrase


def _unique(thing: Thing, scene: Scene) -> str:
    """Name a thing so that no other of the scene is meant.

    The shape alone where only one thing has it.
    """
    alike = [other for other in scene.things if other.shape == thing.shape]
    return thing.shape if thing.shape and len(alike) == 1 else thing.name


class PromptSampler:
    """Puts scenes into words and makes up tasks, from a seed."""

    def __init__(self, seed: int | str) -> None:
        self.world = World(seed)
        self.random: random.Random = self.world.random
        self.pick = self.random.choice

    # Phrases

    def thing(self, thing: Thing) -> str:
        size = f"{self.pick(_SIZES[thing.size])} " if thing.size in _SIZES else ""
        return article(size + thing.name)

    def the(self, thing: Thing, scene: Scene) -> str:
        """Return a definite phrase for a thing that a reference shows."""
        short = _unique(thing, scene)
        return "the " + (thing.name if self.world.chance(0.5) else short)

    def setting(self, background: int) -> str:
        name = BACKGROUNDS[background]
        return self.pick(_FLAT).format(name) if name in COLOURS else self.pick(_SETTINGS[name])

    def content(self, scene: Scene) -> str:
        """Describe the things of a scene and their places, without the background."""
        slots = [thing.slot for thing in scene.things]
        if len(slots) == 3:
            # Three only fit when small, so that nobody says it.
            names = [article(thing.name) for thing in scene.things]
            return self.pick(_ROWS).format(a=names[0], b=names[1], c=names[2])
        names = [self.thing(thing) for thing in scene.things]
        if len(names) == 2 and slots[0] in _BESIDE and slots[1] == (-slots[0][0], -slots[0][1]):
            return self.pick(_BESIDE[slots[0]]).format(a=names[0], b=names[1])
        places = [self.pick(PLACES[slot]) for slot in slots]
        if len(names) == 1:
            unsaid = slots[0] == MIDDLE and self.world.chance(0.7)
            return names[0] if unsaid else f"{names[0]} {places[0]}"
        return " and ".join(f"{name} {place}" for name, place in zip(names, places, strict=True))

    def finish(self, sentence: str) -> str:
        """Capitals and full stops come and go, as people type."""
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
        if draw is None:
            world = self.world
            draw = self.random.choices((partial(world.single, _PRACTISED), world.pair, world.row), (0.5, 0.37, 0.13))[0]
        scene = draw()
        return Example("generate", self.finish(self.describe(scene)), scene)

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
        return Example(kind, self.finish(sentence), target, (scene,), touched(scene, target))

    def edit_chain(self) -> Example:
        """Draw a training edit of a tidy or an edited scene."""
        while True:
            kind = self.random.choices(tuple(_REHEARSED), tuple(_REHEARSED.values()))[0]
            if self.world.chance(0.35):
                scene = self.world.scene()
            else:
                scene = self.world.pair()
                for _ in range(self.random.randrange(8)):
                    scene = self._altered(self.pick(_ALTERATIONS), scene)
            if example := self.edit(kind, scene):
                return example

    def _altered(self, kind: str, scene: Scene) -> Scene:
        """Return the scene after an edit, unchanged if none fits."""
        made = getattr(self, f"_{kind}")(scene)
        return made[1] if made else scene

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
        kind = self.world.kind(scene.background, *(thing.kind for thing in scene.things))
        target = changed(scene, i, kind=kind)
        new = article(target.things[i].name)
        return self.pick(_SWAPS).format(old=self.the(scene.things[i], scene), new=new), target

    def _remove(self, scene: Scene) -> tuple[str, Scene] | None:
        if (i := self._one(scene)) is None:
            return None
        return self.pick(_REMOVALS).format(self.the(scene.things[i], scene)), without(scene, i)

    def _add(self, scene: Scene) -> tuple[str, Scene] | None:
        if len(scene.things) >= MAX_THINGS or (target := self.world.with_another(scene)) is None:
            return None
        new = target.things[-1]
        return self.pick(_ADDITIONS).format(article(new.name), self.pick(PLACES[new.slot])), target

    def _move(self, scene: Scene) -> tuple[str, Scene] | None:
        if (i := self._one(scene)) is None:
            return None
        thing, others = scene.things[i], without(scene, i).things
        free = [slot for slot in SLOTS if slot != thing.slot and fits(replace(thing, slot=slot), others)]
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
        if kind in taken or not visible(kind, scene.background):
            return None
        name = tuple(COLOURS)[colour]
        return self.pick(_RECOLOURS).format(self.the(thing, scene), name), changed(scene, i, kind=kind)

    def _resize(self, scene: Scene) -> tuple[str, Scene] | None:
        if (i := self._one(scene)) is None:
            return None
        thing = scene.things[i]
        bigger = {SMALL: NORMAL, NORMAL: BIG}.get(thing.size)
        smaller = {NORMAL: SMALL, BIG: NORMAL}.get(thing.size)
        size = bigger if bigger is not None and (smaller is None or self.world.chance(0.5)) else smaller
        if size is None or not fits(replace(thing, size=size), without(scene, i).things):
            return None
        wordings = _GROWTHS if size == bigger else _SHRINKINGS
        return self.pick(wordings).format(self.the(thing, scene)), changed(scene, i, size=size)

    def compose(self, images: int | None = None) -> Example | None:
        """Draw a composition of parts of two or three references.

        None if the drawn parts do not go together.
        """
        images = images or self.random.choices((2, 3), (0.8, 0.2))[0]
        if images == 2 and self.world.chance(0.3):
            return self._transplant()
        return self._gather(images)

    def _transplant(self) -> Example | None:
        """Put all of image 1 on image 2's background, or the reverse."""
        references = (self.world.scene(), self.world.scene())
        content = self.random.randrange(2)
        ground = references[1 - content].background
        things = references[content].things
        if ground == references[content].background or not all(visible(thing.kind, ground) for thing in things):
            return None
        sentence = self.pick(_TRANSPLANTS).format(content + 1, 2 - content)
        return Example("compose", self.finish(sentence), Scene(ground, things), references)

    def _gather(self, images: int) -> Example | None:
        """Put one thing of each image on a new or given background."""
        references = tuple(self.world.scene() for _ in range(images))
        own = self.random.randrange(-1, images) if images == 2 else 2
        ground = self.world.background() if own < 0 else references[own].background
        order = self.random.sample((0, 1), 2)
        chosen = []
        names = []
        for image in order:
            scene = references[image]
            if (i := self._one(scene)) is None:
                return None
            thing = scene.things[i]
            alone = len(scene.things) == 1
            name = "the object" if alone and self.world.chance(0.15) else self.the(thing, scene)
            names.append(f"{name} {self.pick(('from', 'from', 'of', 'in'))} image {image + 1}")
            chosen.append(thing.kind)
        if chosen[0] == chosen[1] or not all(visible(kind, ground) for kind in chosen):
            return None
        first: Slot = (-1, 0) if self.world.chance(0.7) else (0, -1)
        things = (Thing(chosen[0], NORMAL, first), Thing(chosen[1], NORMAL, (-first[0], -first[1])))
        content = self.pick(_BESIDE[first]).format(a=names[0], b=names[1])
        setting = self.setting(ground) if own < 0 else self.pick(_BORROWED).format(own + 1)
        return Example("compose", self.finish(f"{content} {setting}"), Scene(ground, things), references)


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

_REHEARSED = {"background": 0.09, "replace": 0.22, "remove": 0.07, "add": 0.12, "move": 0.21, "recolour": 0.12,
              "resize": 0.17}  # fmt: skip
"""How often each is tried in training: what fails most among two and three things, most often. Some do not fit."""
_ALTERATIONS = tuple(kind for kind in EDITS if kind != "background")


def touched(before: Scene, after: Scene) -> tuple[tuple[int, int, int, int], ...]:
    """Return the boxes of the things that differ between two scenes.

    A new background changes everything else.
    """
    return tuple(thing.box for thing in {*before.things} ^ {*after.things})


_NAMES_IN_PROMPT = re.compile(rf"\b(?:{'|'.join((*NOUNS, *SHAPES, *COLOURS))})\b")

HELD_OUT_ONE_IN = 12


def _one_in(text: str) -> bool:
    return zlib.crc32(text.encode()) % HELD_OUT_ONE_IN == 0


def wording_held_out(example: Example) -> bool:
    """Whether this wording is held out from training.

    Each of its words occurs in other wordings.
    """
    sentence = _NAMES_IN_PROMPT.sub("*", example.prompt.lower().rstrip(".")).replace("an *", "a *")
    return _one_in(sentence)


def combination_held_out(example: Example) -> bool:
    """Whether this combination of wanted and given scenes is held out."""
    return _one_in(repr((example.references, example.target)))


def training_prompts(sampler: PromptSampler, task: str, images: int | None = None) -> Example:
    """Draw a training example: no held-out wording, no held-out combination."""
    make = {"generate": sampler.generate, "edit": sampler.edit_chain, "compose": partial(sampler.compose, images)}[task]
    while True:
        if (example := make()) and not wording_held_out(example) and not combination_held_out(example):
            return example


def unseen(sampler: PromptSampler, make: Callable[[PromptSampler], Example | None]) -> Example:
    """One example that training never saw: neither its wording nor its combination."""
    while True:
        example = make(sampler)
        if example and wording_held_out(example) and combination_held_out(example):
            return example
