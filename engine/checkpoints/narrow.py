"""Layers whose weights have 16 bits and are widened for each product.

For devices that compute in fp32: half the memory, and the same bits, because widening is exact.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NARROW_FROM = 1 << 20
"""Numbers from which a matrix stays narrow. Small ones save no memory, and widening them would cost time."""


class NarrowLinear(nn.Linear):
    """A linear layer without bias whose weight has 16 bits.

    held: dtype of the weight in memory. It is computed with in the dtype of the input.
    """

    def __init__(self, in_features: int, out_features: int, held: torch.dtype) -> None:
        super().__init__(in_features, out_features, bias=False, dtype=held)
        self.held = held

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype))


class NarrowEmbedding(nn.Embedding):
    """An embedding table of 16 bits that widens the rows it reads."""

    def __init__(self, rows: int, width: int, held: torch.dtype) -> None:
        # A given weight, because torch would draw one.
        super().__init__(rows, width, _weight=torch.empty(rows, width, dtype=held))
        self.held = held

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, self.weight).float()


def narrowed(layer: nn.Module, held: torch.dtype) -> nn.Module | None:
    """Return an empty narrow layer like `layer`, None if it stays wide."""
    if isinstance(layer, nn.Linear) and layer.bias is None and layer.weight.numel() >= NARROW_FROM:
        return NarrowLinear(layer.in_features, layer.out_features, held)
    if isinstance(layer, nn.Embedding) and layer.weight.numel() >= NARROW_FROM:
        return NarrowEmbedding(layer.num_embeddings, layer.embedding_dim, held)
    return None


def held_dtype(layer: nn.Module, wide: torch.dtype) -> torch.dtype:
    """Return the dtype in which the tensors of a layer are held."""
    return layer.held if isinstance(layer, NarrowLinear | NarrowEmbedding) else wide
