"""Draws a training's kinds of batch and its noise levels."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.diffusion.schedule import sigmas
from engine.nano.training.data_loader import BatchKind
from engine.nano.training.frames import NATIVE, SMALL_SQUARE, SQUARE, Frame, canvases
from engine.nano.training.model import STEPS

LEVELS = 2
"""Noise levels an example: text and references are read once for all of them."""
OWN_WEIGHTS = (1.0, 1.0, 1.5, 2.5)
"""How often each of nano's own four levels is trained: the last step decides what is seen."""
OWN_SHARE = 0.85
"""Of training, on exactly those levels; the rest spreads over all, for other step counts."""
SMALL_SHARE = 0.2
"""Of the time, at its start, on 128 × 128 alone: nouns and places are learned there four times as fast."""
SHORT_TEXT = 48


@dataclass(frozen=True)
class Curriculum:
    """The kind of batch drawn at each point of the training.

    examples: in a batch at 256 × 256. At 128 × 128 there are twice as many.
    native_size: of the nano, whose square and other shapes are practised. text_length: its own, in tokens.
    """

    examples: int
    native_size: int = 2 * SQUARE
    text_length: int = 96

    @property
    def frames(self) -> tuple[Frame, ...]:
        """Return every canvas that is drawn."""
        square, shapes = canvases(self.native_size)
        return tuple(dict.fromkeys((SMALL_SQUARE, square, *shapes)))

    def __call__(self, done: float, draws: random.Random) -> BatchKind:
        square, shapes = canvases(self.native_size)
        early = square != SMALL_SQUARE and done < SMALL_SHARE
        if early:
            shares = {("generate", 0): 0.52, ("edit", 1): 0.34, ("compose", 2): 0.14}
        elif done < 0.6:
            shares = {("generate", 0): 0.40, ("edit", 1): 0.42, ("compose", 2): 0.14, ("compose", 3): 0.03,
                      ("compose", 4): 0.01}  # fmt: skip
        else:
            shares = {("generate", 0): 0.36, ("edit", 1): 0.45, ("compose", 2): 0.14, ("compose", 3): 0.03,
                      ("compose", 4): 0.02}  # fmt: skip
        (task, references), *_ = draws.choices(tuple(shares), tuple(shares.values()))
        frame, chance = square, draws.random()
        # At 128 × 128 things have other tokens: practice there teaches nothing at the native size.
        if early or chance < 0.04:
            frame = SMALL_SQUARE
        elif chance < 0.30 and (task != "generate" or square != SMALL_SQUARE):
            # Where references show the canvas. From words alone the small nano did not learn where a shape's middle is:
            # 60 k samples, a third of them in other shapes, brought 8 % right to 10 %.
            frame = draws.choice(shapes)
        count = self.examples * (1 if frame.scale == NATIVE.scale else 2) // (2 if references > 2 else 1)
        return BatchKind(frame, task, references, SHORT_TEXT if early else self.text_length, max(1, count))


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
