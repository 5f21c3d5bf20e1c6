"""Scheme: a quantisation's form in files and in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from engine.checkpoints.files.header import Entry, Shape

Marker = Mapping[str, Any]
"""What a file says of one layer: ComfyUI's `comfy_quant` tensor, or the header's `_quantization_metadata`."""


class QuantLinear(nn.Module):
    """A linear layer without bias whose weights stay quantised in memory.

    scheme: the name of the scheme whose tensors it holds. native: multiply the codes as they are, else widen them.
    """

    scheme: str
    in_features: int
    out_features: int
    native: bool

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Hold what the scheme's `encode` returned or a file stores."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """One quantised weight matrix as a file holds it.

    entries: by our names, `weight` among them. shape: of the matrix that is meant. options: what decoding needs.
    by_rows: every entry is a scalar or has a row for each row of the matrix, so that some rows can be read alone.
    full_precision: the layer is never to be multiplied in its own format.
    """

    scheme: Scheme
    entries: dict[str, Entry]
    shape: Shape
    options: Mapping[str, Any] = field(default_factory=dict)
    by_rows: bool = False
    full_precision: bool = False

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.entries.values())

    @property
    def label(self) -> str:
        """Its common name: the scheme's, or the block type of GGUF."""
        return str(self.options.get("label", self.scheme.name))

    def rows(self, begin: int, end: int) -> dict[str, Entry]:
        """The entries of the rows begin … end alone."""
        return {name: _rows(entry, self.shape[0], begin, end) for name, entry in self.entries.items()}

    def pieces(self, weights: int) -> Iterator[tuple[int, int]]:
        """Yield row ranges of about `weights` numbers, or the whole matrix."""
        rows, columns = self.shape
        step = max(1, weights // max(1, columns)) if self.by_rows else rows
        for begin in range(0, rows, step):
            yield begin, min(begin + step, rows)


def _rows(entry: Entry, total: int, begin: int, end: int) -> Entry:
    if not entry.shape or entry.shape[0] != total:
        return entry
    row = entry.bytes // total
    return replace(
        entry, shape=(end - begin, *entry.shape[1:]), begin=entry.begin + begin * row, end=entry.begin + end * row
    )


class Scheme(Protocol):
    """A quantisation of matrices.

    name: ours. markers: the names that files give it. siblings: suffixes of the tensors beside `weight`.
    """

    name: str
    markers: frozenset[str]
    siblings: frozenset[str]

    def detect(self, weight: Entry, siblings: Mapping[str, Entry]) -> bool:
        """Return whether a weight without a marker is stored this way."""
        ...

    def store(self, weight: Entry, siblings: Mapping[str, Entry], marker: Marker) -> StoredWeight:
        """Describe a weight. Raises BadWeights for scales of another kind."""
        ...

    def decode(self, tensors: dict[str, Tensor], dtype: torch.dtype, options: Mapping[str, Any]) -> Tensor:
        """Return the matrix, [out, in] in `dtype`."""
        ...

    def memory_scheme(self, stored: StoredWeight, device: torch.device) -> str | None:
        """Return the scheme that holds it in memory, None for plain."""
        ...


class MemoryScheme(Scheme, Protocol):
    """A scheme whose layers can also be computed with."""

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Quantise [out, in]."""
        ...

    def fits(self, layer: nn.Linear) -> bool:
        """Return whether a layer of this size can be held."""
        ...

    def make(self, layer: nn.Linear, device: torch.device, *, full_precision: bool) -> QuantLinear:
        """Make an empty layer of this scheme in place of `layer`."""
        ...

    def keeps(self, stored: StoredWeight) -> bool:
        """Return whether the file's own codes can be held as they are."""
        ...

    def bytes_for(self, weights: int) -> int:
        """Bytes that a matrix of so many numbers takes."""
        ...
