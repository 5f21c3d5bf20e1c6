"""Examples drawn from a seed, for training and for evaluation."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from engine.nano.training.compositions import Compositions
from engine.nano.training.edits import EDITS, Edits, touched
from engine.nano.training.frames import UNITS, Frame
from engine.nano.training.held_out import combination_held_out, wording_held_out
from engine.nano.training.phrases import Phrases
from engine.nano.training.scenes import COLUMN, SMALL, Box, Scene, World
from engine.nano.words import NOUNS

_TRAINED_SIZES = (0.25, 0.35, 0.4)
"""How often a lone object is small, normal and big in training: big ones are always alone, each size is learnt anew."""

_TRAINED_EDITS = {"background": 0.09, "replace": 0.22, "remove": 0.07, "add": 0.12, "move": 0.21, "recolour": 0.12,
              "resize": 0.17}  # fmt: skip
"""How often each is tried in training: what fails most among two and three things, most often. Some do not fit."""
_ALTERATIONS = tuple(kind for kind in EDITS if kind != "background")


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
    frame: Frame = UNITS


class PromptSampler:
    """Draws the examples of one canvas.

    nouns: how many of NOUNS the world has, the first ones.
    """

    def __init__(self, seed: int | str, frame: Frame = UNITS, nouns: int = len(NOUNS)) -> None:
        self.world = World(seed, frame, nouns)
        self.random: random.Random = self.world.random
        self.pick = self.random.choice
        self.phrases = Phrases(self.world)
        self._edits = Edits(self.world, self.phrases)
        self._compositions = Compositions(self.world, self.phrases)

    @property
    def frame(self) -> Frame:
        return self.world.frame

    def generate(self, draw: Callable[[], Scene] | None = None) -> Example:
        """Draw a scene, by `draw` if given, and describe it."""
        world = self.world
        if draw is None:
            draws = (partial(world.single, _TRAINED_SIZES), world.pair, world.row, world.four, world.counted,
                     world.inside, self._column)  # fmt: skip
            shares = (0.34, 0.22, 0.05, 0.08, 0.15, 0.14, 0.02)
            scene = world.fitting(lambda: self.random.choices(draws, shares)[0]())
        else:
            scene = world.fitting(draw)
        prompt = self.phrases.finish(self.phrases.describe(scene))
        return Example("generate", prompt, scene, frame=self.frame)

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
            if made := self._edits.draw(kind, scene):
                break
            if source is not None:
                return None
        sentence, target = made
        prompt = self.phrases.finish(sentence)
        return Example(kind, prompt, target, (scene,), touched(scene, target, self.frame), self.frame)

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
        made = self._edits.draw(kind, scene)
        return made[1] if made else scene

    def compose(self, references: int | None = None) -> Example | None:
        """Draw a composition of parts of two to four references.

        None if the drawn parts do not go together.
        """
        if (made := self._compositions.draw(references)) is None:
            return None
        prompt = self.phrases.finish(made.sentence)
        return Example("compose", prompt, made.target, made.references, frame=self.frame)


BIG_SHARE = 0.08
"""Of the images to generate, for one big thing: most of its tokens are to be learned by heart."""
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
        example = make()
        if example and not wording_held_out(example.prompt) and not _combination_held_out(example):
            return example


def unseen(sampler: PromptSampler, make: Callable[[PromptSampler], Example | None]) -> Example:
    """Draw an example whose wording and combination are both held out."""
    while True:
        example = make(sampler)
        if example and wording_held_out(example.prompt) and _combination_held_out(example):
            return example


def _combination_held_out(example: Example) -> bool:
    return combination_held_out(example.target, example.references)
