"""fp8: weights as float8_e4m3fn with a scale a layer or a row.

Layout of BFL's files: `weight` F8_E4M3 [out, in], `weight_scale` and `input_scale` F32 []. W = weight · weight_scale.
Converters also write a scale a row, [out] or [out, 1].
"""

import logging
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.checkpoints.files.header import Entry
from engine.checkpoints.quant.checks import FLOATS, check_scale
from engine.checkpoints.quant.scheme import Marker, QuantLinear, StoredWeight
from engine.memory.device import multiplies_fp8

log = logging.getLogger(__name__)

CODE = torch.float8_e4m3fn
LARGEST = 448.0
"""Of float8_e4m3fn."""


def _scale(values: Tensor) -> Tensor:
    """Scale that maps the largest absolute value to the largest fp8 code."""
    low, high = torch.aminmax(values)
    return (torch.maximum(-low, high).float() / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)


def _scale_rows(rows: Tensor) -> Tensor:
    """Return the scale of each row of [n, width], [n, 1]."""
    largest = torch.linalg.vector_norm(rows, float("inf"), dim=1, keepdim=True, dtype=torch.float32)
    return (largest / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)


def encode(weight: Tensor, *, by_rows: bool = False) -> dict[str, Tensor]:
    """Quantise [out, in] with one scale, or one for each row."""
    scale = _scale_rows(weight) if by_rows else _scale(weight)
    codes = torch.empty(weight.shape, dtype=CODE, device=weight.device)
    for rows, into, factor in zip(weight.split(_ROWS), *_by_rows(codes, scale.reshape(-1, 1)), strict=True):
        into.copy_((rows.float() / factor).clamp(-LARGEST, LARGEST))
    return {"weight": codes, "weight_scale": scale.flatten() if by_rows else scale}


def decode(stored: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Return [out, in] in `dtype`. Without scale codes are values."""
    codes, scale = stored["weight"], stored.get("weight_scale")
    if scale is None:
        return codes.to(dtype)
    scale = scale.reshape(-1, 1)
    return torch.cat([(part.float() * s).to(dtype) for part, s in zip(*_by_rows(codes, scale), strict=True)])


_ROWS = 2048
"""Rows that are widened to fp32 at once."""


def _by_rows(codes: Tensor, scale: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return codes.split(_ROWS), scale.expand(codes.shape[0], 1).split(_ROWS)


@lru_cache
def multiplies(device: torch.device, *, by_rows: bool) -> bool:
    """Return whether the device multiplies natively, by trying one product.

    by_rows: with a scale for each row. torch's wheels for Windows are built without that kernel.
    """
    if not multiplies_fp8(device):
        return False
    weight, x = (torch.randn(128, 64, dtype=torch.bfloat16, device=device) for _ in range(2))
    stored = encode(weight) if by_rows else encode(weight) | {"input_scale": _scale(x)}
    layer = Fp8Linear(64, 128, native=True)
    layer.load_tensors(stored)
    codes, scale = quantise_rows(x, layer.input_scale)
    wanted = F.linear(codes.float() * scale, decode(stored, torch.float32))
    try:
        return bool((layer(x).float() - wanted).norm() < 0.02 * wanted.norm())
    except torch.OutOfMemoryError:
        raise  # is not kept: the next load tries again
    except RuntimeError as exc:
        log.warning("fp8 weights are widened on %s: %s", device, exc)
        return False


class Fp8Linear(QuantLinear):
    """A linear layer whose weights stay in fp8.

    by_rows: a native product may have a scale for each row. Without it a layer that needs one widens its weights.
    """

    scheme = "fp8"
    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None

    def __init__(self, in_features: int, out_features: int, *, native: bool = False, by_rows: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features, self.native = in_features, out_features, native
        self._by_rows = by_rows
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=CODE))
        self.register_buffer("weight_scale", torch.empty(out_features if native else (), dtype=torch.float32))
        self.register_buffer("input_scale", None)

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Hold what `encode` returned or a file stores."""
        self.weight = tensors["weight"]
        scale = tensors.get("weight_scale", torch.ones((), device=self.weight.device)).float()
        self.weight_scale = scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1)
        input_scale = tensors.get("input_scale")
        self.input_scale = None if input_scale is None else input_scale.float().reshape(())
        if self.input_scale is None or self.weight_scale.ndim:
            self.native = self.native and self._by_rows
        if self.native and self.input_scale is None:
            # A product with a scale for each row of its input wants one for each output too. Made once, not each time.
            self.weight_scale = self.weight_scale.expand(self.out_features).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        # The product of codes rounds its inputs, too: a model in fp32 asks for more.
        if self.native and x.dtype == torch.bfloat16:
            return self._multiply(x)
        # Scale the outputs: the codes widen exactly, and a row of outputs is shorter than a matrix.
        return (F.linear(x, self.weight.to(x.dtype)) * self.weight_scale).to(x.dtype)

    def _multiply(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        codes, scale = quantise_rows(rows, self.input_scale)
        weight_scale = self.weight_scale
        if scale.ndim or weight_scale.ndim:  # both scales have to be of one kind: by rows, or one number each
            scale = scale.expand(len(rows), 1).contiguous()
            weight_scale = weight_scale.reshape(1, -1).expand(1, self.out_features).contiguous()
        out = torch._scaled_mm(
            codes, self.weight.t(), scale_a=scale, scale_b=weight_scale, out_dtype=x.dtype, use_fast_accum=True
        )
        return out.reshape(*x.shape[:-1], self.out_features)


def quantise_rows(rows: Tensor, static: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantise [n, width] with a static scale or one for each row.

    A scale for each row costs nothing more than one for all, and rows of small values keep their precision.
    """
    if static is not None:
        return (rows * static.reciprocal()).clamp(-LARGEST, LARGEST).to(CODE), static
    scale = _scale_rows(rows)
    # Nothing to clamp: a row's largest value misses 448 by rounding alone, and up to 464 all of it becomes 448. The
    # values are multiplied, not divided: compiled, a division and a clamp are most of the instructions for a value.
    return (rows * scale.reciprocal()).to(CODE), scale


class _Fp8:
    name = "fp8"
    markers = frozenset({"float8_e4m3fn", "float8_e5m2", "float8_e4m3fn_rowwise"})
    siblings = frozenset({"weight_scale", "input_scale"})

    def detect(self, weight: Entry, siblings: Mapping[str, Entry]) -> bool:
        return weight.storage_dtype in ("F8_E4M3", "F8_E5M2")

    def store(self, weight: Entry, siblings: Mapping[str, Entry], marker: Marker) -> StoredWeight:
        rows = weight.shape[0]
        check_scale(siblings.get("weight_scale"), FLOATS, {1, rows})
        check_scale(siblings.get("input_scale"), FLOATS, {1})
        full = bool(marker.get("full_precision_matrix_mult", False))
        return StoredWeight(self, {"weight": weight, **siblings}, weight.shape, by_rows=True, full_precision=full)

    def decode(self, tensors: dict[str, Tensor], dtype: torch.dtype, options: Mapping[str, Any]) -> Tensor:
        return decode(tensors, dtype)

    def memory_scheme(self, stored: StoredWeight, device: torch.device) -> str | None:
        return self.name

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        return encode(weight)

    def fits(self, layer: nn.Linear) -> bool:
        return True

    def make(self, layer: nn.Linear, device: torch.device, *, full_precision: bool) -> QuantLinear:
        native = not full_precision and multiplies(device, by_rows=False)
        by_rows = native and multiplies(device, by_rows=True)
        return Fp8Linear(layer.in_features, layer.out_features, native=native, by_rows=by_rows)

    def keeps(self, stored: StoredWeight) -> bool:
        return stored.scheme is self and stored.entries["weight"].storage_dtype == "F8_E4M3"

    def bytes_for(self, weights: int) -> int:
        return weights + 4


SCHEME = _Fp8()
