"""Random inputs of the networks, of the right shapes."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from engine.contract import GRID
from engine.diffusion.canvas import size_for_aspect
from engine.families.klein.transformer import SingleBlock, Transformer
from engine.families.klein.variants import Variant
from engine.memory.device import Device

ASPECTS = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16))
"""Shapes of images that are likely to be asked for."""


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


def attention_inputs(
    variant: Variant, transformer: Transformer, device: Device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield queries, keys and values as blocks pass them, of likely sizes.

    Strides count too: only a double block's values are contiguous, others are columns of a wider matrix.
    """
    *_, last = transformer.single_blocks
    assert isinstance(last, SingleBlock)
    hidden, token = transformer.shape.hidden, variant.pixels_per_token
    for aspect in ASPECTS:
        width, height = size_for_aspect(aspect, variant.native_size**2, token)
        canvas = width * height // token**2
        for references in (0, canvas):
            cached = references if variant.kv else 0
            keys = variant.text_length + canvas + references
            # Beside cached keys and values those of the canvas are joined with them, into a matrix of their own.
            passed = [(keys - cached, hidden), (keys - cached, hidden if cached else sum(last.widths))]
            if last.can_split:
                passed.append((canvas, hidden if cached else 2 * hidden))
            for queries, columns in dict.fromkeys(passed):
                q, k = heads(transformer, device, queries), heads(transformer, device, keys)
                yield q, k, heads(transformer, device, keys, columns)


def heads(transformer: Transformer, device: Device, tokens: int, columns: int = 0) -> Tensor:
    """Return [1, tokens, heads, head_dim], cut from a matrix of `columns`."""
    shape = transformer.shape
    whole = torch.randn(1, tokens, columns or shape.hidden, device=device.device, dtype=device.dtype)
    return whole[..., : shape.hidden].unflatten(-1, (-1, shape.head_dim))
