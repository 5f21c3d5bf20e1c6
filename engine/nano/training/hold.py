"""Hold a training to what its start knew.

Each step learns from two batches: one of skills that the start lacks, from their images, and one of skills it has, from
the start's own velocities. Those are means over all noise, so that they pull no more than needed. A held training of
226 k samples forgot less than one of 246 k that was not (engine/nano/README.md).
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.nano.training.compiled_training import TrainingVelocity, multiplies_bf16
from engine.nano.training.compositor import BACKGROUNDS
from engine.nano.training.curriculum import Curriculum
from engine.nano.training.data_loader import Batch, BatchKind, DataLoader, Wanted
from engine.nano.training.folder import load_extras
from engine.nano.training.frames import NATIVE, UNITS, Frame, canvases
from engine.nano.training.model import Nano, Tokenize
from engine.nano.training.prompts import Example
from engine.nano.training.scenes import Scene, nested
from engine.nano.words import COLOURS, SCENES

PULL = 2.0
"""Weight of the held batch's loss beside the other's."""
TRUTH = 0.3
"""Share of the true velocity in what a held batch learns, so that it may also get better."""
_OTHER_SHAPES = 0.35
"""Of new edits."""
_STILL_KNOWN = 0.04
"""Of the known examples that are drawn among the new ones, kept: their phrases stay mixed."""

Shares = dict[tuple[str, int], float]
"""(task, references) -> its share of the batches."""

NEW: Shares = {("generate", 0): 0.52, ("edit", 1): 0.28, ("compose", 2): 0.07, ("compose", 3): 0.07,
               ("compose", 4): 0.06}  # fmt: skip
KNOWN: Shares = {("generate", 0): 0.24, ("edit", 1): 0.60, ("compose", 2): 0.16}


@dataclass(frozen=True)
class HeldKinds:
    """The kinds of batch of one half of a held training.

    examples: in a batch, half of them with three or four references. native_size, text_length: of the nano.
    """

    shares: Shares
    examples: int
    native_size: int
    text_length: int

    def __call__(self, done: float, draws: random.Random) -> BatchKind:
        square, shapes = canvases(self.native_size)
        (task, references), *_ = draws.choices(tuple(self.shares), tuple(self.shares.values()))
        frame: Frame = square
        if self.shares is NEW and task == "edit" and draws.random() < _OTHER_SHAPES:
            frame = draws.choice(shapes)
        count = self.examples // (2 if references > 2 else 1)
        return BatchKind(frame, task, references, self.text_length, max(1, count))


class FirstWorld:
    """Tells the examples that the first nano's training drew from all others.

    folder: a nano whose words are those of that time.
    """

    _SCENES = frozenset(SCENES[:6])

    def __init__(self, folder: Path) -> None:
        self._words = frozenset(load_extras(folder)["words"])

    def known(self, kind: BatchKind, example: Example) -> bool:
        """Return whether the first nano practised such an example."""
        if kind.frame not in (UNITS, NATIVE) or kind.references > 2:
            return False
        scenes = example.target, *example.references
        return all(map(self._is_plain, scenes)) and {*re.findall("[a-z]+", example.prompt.lower())} <= self._words

    def new(self, kind: BatchKind, example: Example) -> bool:
        """Return whether it did not, now and then one it did."""
        return not self.known(kind, example) or random.random() < _STILL_KNOWN

    def _is_plain(self, scene: Scene) -> bool:
        name, things = BACKGROUNDS[scene.background], scene.things
        several = len({thing.kind for thing in things}) < len(things)
        return (name in COLOURS or name in self._SCENES) and len(things) <= 3 and not nested(scene) and not several


class Teacher:
    """The nano that the training began with, which never changes."""

    def __init__(self, nano: Nano, compiled: bool) -> None:
        self.nano = nano.requires_grad_(False)
        self.velocity = TrainingVelocity(nano, compiled)

    @torch.no_grad()
    def blended(self, true: Tensor, batch: Batch, noisy: Tensor, sigma: Tensor, references: Tensor | None) -> Tensor:
        """Return its velocities with a share of the true ones.

        [b · n, tokens, channels], n noise levels an example.
        """
        device = noisy.device
        with torch.autocast(device.type, torch.bfloat16, enabled=multiplies_bf16(device)):
            states = self.nano.read(batch.ids, batch.mask)
        return torch.lerp(self.velocity(noisy, sigma, states, batch.kind.frame.tokens, references), true, TRUTH)


def loaders(
    folder: Path, curriculum: Curriculum, tokenize: Tokenize, workers: int, seed: int, nouns: int
) -> tuple[DataLoader, DataLoader]:
    """Return the loaders of new skills and of those `folder` has."""
    first = FirstWorld(folder)

    def loader(shares: Shares, wanted: Wanted, seed: int) -> DataLoader:
        kinds = HeldKinds(shares, curriculum.examples, curriculum.native_size, curriculum.text_length)
        return DataLoader(kinds, tokenize, curriculum.frames, workers, seed, nouns, wanted)

    return loader(NEW, first.new, seed), loader(KNOWN, first.known, seed + 1000)
