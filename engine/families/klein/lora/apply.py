"""Apply LoRAs: merge into plain weights, compute beside quantised ones."""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.checkpoints import quant
from engine.checkpoints.quant import QuantLinear
from engine.families.klein.lora.deltas import WeightDelta
from engine.families.klein.transformer import Transformer

_ROWS = 2048
"""Rows that are changed at once, in fp32."""


@torch.no_grad()
def apply(transformer: Transformer, deltas: Iterable[WeightDelta]) -> None:
    """Apply deltas, summed in fp32 before the layer's format rounds them."""
    by_parameter: dict[tuple[str, str], list[WeightDelta]] = {}
    for delta in deltas:
        by_parameter.setdefault((delta.rows.layer, delta.rows.leaf), []).append(delta)
    for (name, leaf), group in by_parameter.items():
        layer = transformer.get_submodule(name)
        if not isinstance(layer, QuantLinear):
            _merge(layer.get_parameter(leaf), group)
            continue
        if dense := [delta for delta in group if not delta.is_low_rank]:
            weight = quant.decode_layer(layer, transformer.img_in.weight.dtype)
            _merge(weight, dense)
            quant.encode_into(layer, weight)
        if low_rank := [delta for delta in group if delta.is_low_rank]:
            transformer.set_submodule(name, LoraLinear(layer, low_rank, transformer.img_in.weight))


def _merge(weight: Tensor, deltas: list[WeightDelta]) -> None:
    matrix = weight if weight.ndim == 2 else weight[:, None]
    norms = [_column_norms(matrix, delta) for delta in deltas]
    for begin in range(0, matrix.shape[0], _ROWS):
        end = min(begin + _ROWS, matrix.shape[0])
        base = matrix[begin:end].float()
        total = base.clone()
        for delta, columns in zip(deltas, norms, strict=True):
            for first, last in _overlap(delta, begin, end):
                rows = base[first - begin : last - begin]
                offset = delta.rows.begin
                total[first - begin : last - begin] += delta.change(rows, first - offset, last - offset, columns)
        matrix[begin:end].copy_(total)


def _column_norms(matrix: Tensor, delta: WeightDelta) -> Tensor | None:
    """Return the column norms that a DoRA by columns divides by."""
    if delta.magnitude is None or not delta.by_columns:
        return None
    total = torch.zeros(matrix.shape[1], device=matrix.device)
    for first in range(delta.rows.begin, delta.rows.end, _ROWS):
        last = min(first + _ROWS, delta.rows.end)
        rows = matrix[first:last].float()
        total += delta.squared_columns(rows, first - delta.rows.begin, last - delta.rows.begin)
    return total.sqrt()


def _overlap(delta: WeightDelta, begin: int, end: int) -> Iterator[tuple[int, int]]:
    first, last = max(begin, delta.rows.begin), min(end, delta.rows.end)
    if first < last:
        yield first, last


class LoraLinear(nn.Module):
    """A quantised layer with low-rank changes computed beside it."""

    def __init__(self, layer: QuantLinear, deltas: list[WeightDelta], like: Tensor) -> None:
        """like: has the device and the dtype to compute in."""
        super().__init__()
        self.layer = layer
        self.rows = [(delta.rows.begin, delta.rows.end) for delta in deltas]
        for i, delta in enumerate(deltas):
            up, down = delta.factors()
            self.register_buffer(f"up_{i}", up.to(like))
            self.register_buffer(f"down_{i}", down.to(like))

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        for i, (begin, end) in enumerate(self.rows):
            out[..., begin:end] += F.linear(F.linear(x, getattr(self, f"down_{i}")), getattr(self, f"up_{i}"))
        return out
