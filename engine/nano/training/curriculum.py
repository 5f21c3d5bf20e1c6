"""Draws a training's kinds of batch and its noise levels."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.diffusion.schedule import sigmas
from engine.nano.training.data_loader import BatchKind
from engine.nano.training.frames import SQUARE, Frame, canvases
from engine.nano.training.model import STEPS

LEVELS = 2
"""Noise levels an example: text and references are read once for all of them."""
OWN_WEIGHTS = (1.0, 1.0, 1.5, 2.5)
"""How often each of nano's own four levels is trained: the last step decides what is seen."""
OWN_SHARE = 0.85
"""Of training, on exactly those levels; the rest spreads over all, for other step counts."""
OTHER_SHAPES = 0.26
"""Of the batches: a chance tried once, in two million samples on a GPU (engine/nano/README.md)."""


@dataclass(frozen=True)
class Curriculum:
    """The kind of batch drawn at each point of the training.

    examples: in a batch. native_size: of the nano, whose square and other shapes are practised. text_length: its own,
    in tokens.
    """

    examples: int
    native_size: int = 2 * SQUARE
    text_length: int = 96

    @property
    def frames(self) -> tuple[Frame, ...]:
        """Return every canvas that is drawn."""
        square, shapes = canvases(self.native_size)
        return (square, *shapes)

    def __call__(self, done: float, draws: random.Random) -> BatchKind:
        square, shapes = canvases(self.native_size)
        if done < 0.6:
            shares = {("generate", 0): 0.40, ("edit", 1): 0.40, ("compose", 2): 0.12, ("compose", 3): 0.05,
                      ("compose", 4): 0.03}  # fmt: skip
        else:
            shares = {("generate", 0): 0.34, ("edit", 1): 0.46, ("compose", 2): 0.12, ("compose", 3): 0.05,
                      ("compose", 4): 0.03}  # fmt: skip
        (task, references), *_ = draws.choices(tuple(shares), tuple(shares.values()))
        frame = draws.choice(shapes) if draws.random() < OTHER_SHAPES else square
        count = self.examples // (2 if references > 2 else 1)
        return BatchKind(frame, task, references, self.text_length, max(1, count))


def draw_levels(count: int, canvas_tokens: int, generator: torch.Generator) -> Tensor:
    """Return noise levels, [count · LEVELS].

    Those of one example differ.
    """
    own = torch.tensor(sigmas(STEPS, canvas_tokens)[:-1])
    # Weighted draws without replacement: the largest of uniform^(1/weight).
    keys = torch.rand(count, len(own), generator=generator) ** (1 / torch.tensor(OWN_WEIGHTS))
    order = keys.topk(LEVELS, dim=1).indices
    # Logit-normal pushed by a shift of 3, as flow models of this family are trained; 12 % pure noise.
    spread = torch.sigmoid(torch.randn(count, LEVELS, generator=generator) + 1.0986)
    spread = torch.where(torch.rand(count, LEVELS, generator=generator) < 0.12, torch.ones(()), spread)
    chosen = torch.rand(count, LEVELS, generator=generator) < OWN_SHARE
    return torch.where(chosen, own[order], spread).flatten()
