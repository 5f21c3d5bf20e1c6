"""Inputs of an image's steps besides the canvas itself."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from engine.families.klein.transformer import KVPair
from engine.nn.ops import Rope

TokenSize = tuple[int, int]
"""Rows and columns of an image in tokens."""

StepKey = tuple[TokenSize, tuple[TokenSize, ...]]
"""Sizes of the canvas and of each reference that takes part in the steps: a graph of a step serves equal ones."""


@dataclass(frozen=True, slots=True)
class Conditioning:
    """The inputs of every step besides the canvas.

    References are tokens that take part in the steps, or keys and values. canvas: its size. sizes: those of the
    references that take part.
    """

    canvas: TokenSize
    text: Tensor
    rope: Rope
    sizes: tuple[TokenSize, ...] = ()
    references: Tensor | None = None
    reference_kv: Sequence[KVPair] | None = None

    @property
    def key(self) -> StepKey:
        return self.canvas, self.sizes
