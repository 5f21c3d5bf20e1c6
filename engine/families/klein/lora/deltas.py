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

    @property
    def rank(self) -> int:
        """Rank of the same matrix as one product of two."""
        return self.first.down.shape[0] * self.second.down.shape[0]

    def low_rank(self) -> LowRank:
        """Return the same matrix as one product of two."""
        up = self.first.up[:, :, None] * self.second.up[:, None, :]
        down = self.first.down[:, None, :] * self.second.down[None, :, :]
        return LowRank(up.flatten(1), down.flatten(0, 1))


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
    def is_factored(self) -> bool:
        """Whether it is computed beside a layer in its factors."""
        rows, columns = self.matrix.shape
        match self.matrix:
            case _ if self.magnitude is not None or self.replaces:
                return False
            case LowRank():
                return True
            case Hadamard():
                return self.matrix.rank * (rows + columns) < rows * columns
            case Kronecker():
                return not self.rows.swap
        return False

    def factored(self) -> LowRank | Kronecker | None:
        """Return scaled factors in our row order, None for others."""
        if not self.is_factored:
            return None
        if isinstance(self.matrix, Kronecker):
            return Kronecker(self.matrix.first * (self.scale * self.strength), self.matrix.second)
        matrix = self.matrix.low_rank() if isinstance(self.matrix, Hadamard) else self.matrix
        assert isinstance(matrix, LowRank)
        return LowRank(self._our_order(matrix.up * (self.scale * self.strength)), matrix.down)

    def branch_bytes(self, itemsize: int) -> int:
        """Return the bytes that it takes beside a layer.

        itemsize: bytes of a number of its factors. A whole matrix is held in fp8.
        """
        rows, columns = self.matrix.shape
        match self.matrix:
            case _ if not self.is_factored:
                return rows * columns + 4 * rows
            case Kronecker(first, second):
                return itemsize * (first.numel() + second.numel())
            case Hadamard():
                return itemsize * self.matrix.rank * (rows + columns)
            case LowRank(up, down):
                return itemsize * (up.numel() + down.numel())
        raise AssertionError

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
