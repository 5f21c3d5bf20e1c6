"""WeightDelta: a change of some rows of one parameter."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowRange:
    """Rows of one of our parameters.

    swap: its halves change places, as in the key maps.
    """

    layer: str
    begin: int
    end: int
    swap: bool = False
    leaf: str = "weight"


class Matrix(Protocol):
    """A matrix that is kept in factors.

    Written out, those of a whole model would take as much memory as the model.
    """

    @property
    def shape(self) -> tuple[int, int]: ...

    def rows(self, begin: int, end: int) -> Tensor:
        """Return these rows in fp32."""
        ...


@dataclass(frozen=True, slots=True)
class LowRank:
    """LoRA: up @ down."""

    up: Tensor
    down: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    def rows(self, begin: int, end: int) -> Tensor:
        return self.up[begin:end] @ self.down


@dataclass(frozen=True, slots=True)
class Dense:
    """A matrix that is written out."""

    matrix: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1]

    def rows(self, begin: int, end: int) -> Tensor:
        return self.matrix[begin:end]


@dataclass(frozen=True, slots=True)
class Hadamard:
    """LoHa: the elementwise product of two low-rank matrices."""

    first: LowRank
    second: LowRank

    @property
    def shape(self) -> tuple[int, int]:
        return self.first.shape

    def rows(self, begin: int, end: int) -> Tensor:
        return self.first.rows(begin, end) * self.second.rows(begin, end)


@dataclass(frozen=True, slots=True)
class Kronecker:
    """LoKr: the Kronecker product of two matrices."""

    first: Tensor
    second: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        (a, b), (c, d) = self.first.shape, self.second.shape
        return a * c, b * d

    def rows(self, begin: int, end: int) -> Tensor:
        height = self.second.shape[0]
        first, last = begin // height, -(-end // height)
        product = torch.kron(self.first[first:last].contiguous(), self.second)
        return product[begin - first * height : end - first * height]


@dataclass(frozen=True, slots=True)
class WeightDelta:
    """A change of the weight W of some rows.

    Added is scale · matrix. With `magnitude` (DoRA) W + scale · matrix is normalised and multiplied by it, by rows
    [out] or by columns [in]. With `replaces` the matrix is the new W.
    """

    rows: RowRange
    matrix: Matrix
    scale: float = 1.0
    strength: float = 1.0
    magnitude: Tensor | None = None
    by_columns: bool = False
    replaces: bool = False

    @property
    def is_low_rank(self) -> bool:
        """Whether it can be computed beside a layer."""
        return isinstance(self.matrix, LowRank) and self.magnitude is None

    @property
    def branch_size(self) -> int:
        """Numbers that are kept where it is computed beside a layer."""
        if not self.is_low_rank:
            return 0
        assert isinstance(self.matrix, LowRank)
        return self.matrix.up.numel() + self.matrix.down.numel()

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return up and down, scaled, in the order of our rows."""
        assert isinstance(self.matrix, LowRank)
        up = self.matrix.up * (self.scale * self.strength)
        return torch.cat(tuple(reversed(up.chunk(2)))) if self.rows.swap else up, self.matrix.down

    def change(self, weight: Tensor, begin: int, end: int, column_norms: Tensor | None) -> Tensor:
        """Return the change of `weight`, rows begin … end, in fp32."""
        matrix = self._rows(begin, end).to(weight.device)
        if self.replaces:
            return self.strength * (matrix - weight)
        if self.magnitude is None:
            return (self.scale * self.strength) * matrix
        target = weight + self.scale * matrix
        magnitude = self.magnitude.to(weight.device)
        if self.by_columns:
            assert column_norms is not None
            target = target * (magnitude / column_norms.clamp_min(_TINY))
        else:
            rows = self._our_order(magnitude)[begin:end]
            target = target * (rows / target.norm(dim=1).clamp_min(_TINY))[:, None]
        return self.strength * (target - weight)

    def squared_columns(self, weight: Tensor, begin: int, end: int) -> Tensor:
        """Return the column sums of squares of W + scale · matrix."""
        return (weight + self.scale * self._rows(begin, end).to(weight.device)).square().sum(dim=0)

    def _rows(self, begin: int, end: int) -> Tensor:
        if not self.rows.swap:
            return self.matrix.rows(begin, end)
        half = (self.rows.end - self.rows.begin) // 2
        parts = []
        if begin < half:
            parts.append(self.matrix.rows(begin + half, min(end, half) + half))
        if end > half:
            parts.append(self.matrix.rows(max(begin, half) - half, end - half))
        return torch.cat(parts)

    def _our_order(self, rows: Tensor) -> Tensor:
        return torch.cat(tuple(reversed(rows.chunk(2)))) if self.rows.swap else rows


_TINY = 1e-30
"""Keeps a row of zeros from being divided by its norm."""
