"""Random inputs of the networks, of the right shapes."""

from typing import Any

import torch
from torch import Tensor

from engine.diffusion.canvas import GRID
from engine.families.klein.transformer import Transformer
from engine.memory.device import Device


class SampleInputs:
    """Inputs of the networks for one shape.

    They serve to compile, to capture or to warm up.
    """

    def __init__(
        self, transformer: Transformer, device: Device, text: int, rows: int, columns: int, pixels_per_token: int = GRID
    ) -> None:
        self._transformer, self._device, self._token = transformer, device, pixels_per_token
        self._text, self._rows, self._columns = text, rows, columns

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self._device.device, dtype=self._device.dtype)

    def latent(self) -> Tensor:
        """Return a latent of the canvas."""
        return self._randn(1, self._transformer.shape.channels, self._rows, self._columns)

    def image(self) -> Tensor:
        """Return pixels of the canvas."""
        return self._randn(1, 3, self._token * self._rows, self._token * self._columns).clamp(-1, 1)

    def step(self, references: int, kv: bool = False) -> tuple[Any, ...]:
        """Return the arguments of Transformer.forward.

        references: number of their tokens, which take part in the steps or (kv) give keys and values.
        """
        shape, canvas = self._transformer.shape, self._rows * self._columns
        tokens = self._text + canvas + (0 if kv else references)
        angles = torch.rand(tokens, shape.head_dim // 2, device=self._device.device)
        seen = self._randn(1, references, shape.hidden) if references and not kv else None
        heads = (1, references, shape.hidden // shape.head_dim, shape.head_dim)
        blocks = shape.double_blocks + shape.single_blocks
        pairs = [(self._randn(*heads), self._randn(*heads))] * blocks if kv and references else None
        mods = self._transformer.modulations(torch.ones(1, device=self._device.device, dtype=self._device.dtype))
        rope = (angles.cos(), angles.sin())
        return self._randn(1, canvas, shape.channels), self._randn(1, self._text, shape.hidden), mods, rope, seen, pairs
