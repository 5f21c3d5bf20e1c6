"""nvfp4: two weights a byte, one fp8 scale for sixteen.

Layout of BFL's files: `weight` U8 [out, in/2], the element of even index in the high nibble; `weight_scale` F8_E4M3
[out, in/16], lying in cuBLAS's 128 × 4 blocks whatever its shape reads; `weight_scale_2` F32 [].
W = value · weight_scale · weight_scale_2. `pre_quant_scale` [in], where there is one, multiplies the inputs (AWQ): the
same as multiplying the columns of W. Source: comfy-kitchen; sglang found the same two traps.
"""

import itertools
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from engine.checkpoints.files.header import Entry
from engine.checkpoints.quant import fp8
from engine.checkpoints.quant.checks import FLOATS, check_scale, check_weight
from engine.checkpoints.quant.scheme import Marker, QuantLinear, StoredWeight
from engine.contract import BadWeights
from engine.memory.device import multiplies_fp4

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of the low three bits of a nibble; the fourth is the sign."""

GROUP = 16
"""Weights that share a scale."""

_ROWS = 1024
"""Rows that are widened at once; a multiple of the 128 rows of a block of scales."""


def value_pairs(device: torch.device) -> Tensor:
    """Return both values of every byte, the high nibble's first: [256, 2]."""
    table = torch.tensor([*VALUES, *(-value for value in VALUES)], device=device)
    return torch.stack([table.repeat_interleave(16), table.repeat(16)], dim=-1)


def middles_of_values(device: torch.device) -> Tensor:
    """Return the numbers half-way between two values."""
    return torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(VALUES)], device=device)


def unpack(codes: Tensor, pairs: Tensor) -> Tensor:
    """Unpack [rows, in/2] bytes into [rows, in] values of `pairs`."""
    return F.embedding(codes.int(), pairs).flatten(-2)


def linear_order(scales: Tensor) -> Tensor:
    """Reorder scales [out, groups] from cuBLAS's 128 × 4 blocks into rows."""
    rows, groups = scales.shape
    blocks = scales.reshape(rows // 128, groups // 4, 32, 4, 4)
    return rearrange(blocks, "R C low high c -> (R high low) (C c)")


def blocked_order(scales: Tensor) -> Tensor:
    """Reverse `linear_order`."""
    blocks = rearrange(scales, "(R high low) (C c) -> R C low high c", high=4, low=32, c=4)
    return blocks.reshape(scales.shape)


def encode(weight: Tensor, tensor_scale: Tensor | None = None, middles: Tensor | None = None) -> dict[str, Tensor]:
    """Quantise [out, in] into the layout of the published files.

    tensor_scale: None for the one that maps the largest weight to the largest value. middles: `middles_of_values`,
    made here by default. Some rows at a time: the intermediates are many times as large as the result.
    """
    rows, columns = weight.shape
    middles = middles_of_values(weight.device) if middles is None else middles
    scale = _tensor_scale(weight) if tensor_scale is None else tensor_scale
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(rows, columns // GROUP, dtype=torch.float8_e4m3fn, device=weight.device)
    for some, packed, blocks in zip(weight.split(_ROWS), codes.split(_ROWS), scales.split(_ROWS), strict=True):
        steps = _group_scales(some.float(), scale)
        packed.copy_(_pack(some.float(), steps.float() * scale, middles))
        blocks.copy_(_reorder(steps, blocked_order))
    return {"weight": codes, "weight_scale": scales, "weight_scale_2": scale}


def _tensor_scale(weight: Tensor) -> Tensor:
    low, high = torch.aminmax(weight)
    return (torch.maximum(-low, high).float() / (448.0 * VALUES[-1])).clamp_min(torch.finfo(torch.float32).tiny)


def _group_scales(weight: Tensor, tensor_scale: Tensor) -> Tensor:
    """Return the scale of each group, for its largest weight."""
    largest = weight.unflatten(-1, (-1, GROUP)).abs().amax(-1)
    return (largest / VALUES[-1] / tensor_scale).clamp(max=448.0).to(torch.float8_e4m3fn)


def _pack(weight: Tensor, steps: Tensor, middles: Tensor) -> Tensor:
    """Pack [rows, in] with the step of each group into bytes."""
    groups = weight.unflatten(-1, (-1, GROUP)) / steps.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    nibbles = torch.bucketize(groups.abs(), middles, out_int32=True).to(torch.uint8) | (groups < 0).to(torch.uint8) << 3
    high, low = nibbles.flatten(-2).unflatten(-1, (-1, 2)).unbind(-1)
    return high << 4 | low


def decode(stored: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Return [out, in] in `dtype`.

    stored: of a file or of a layer, which also holds `pairs`.
    """
    codes, scales, columns = stored["weight"], stored["weight_scale"], stored.get("pre_quant_scale")
    pairs = stored["pairs"] if "pairs" in stored else value_pairs(codes.device)
    out = torch.empty(codes.shape[0], 2 * codes.shape[1], dtype=dtype, device=codes.device)
    for into, rows, blocks in zip(out.split(_ROWS), codes.split(_ROWS), scales.split(_ROWS), strict=True):
        values = _widen(rows, blocks, stored["weight_scale_2"], pairs)
        into.copy_(values if columns is None else values * columns.float().reshape(1, -1))
    return out


def _widen(codes: Tensor, scales: Tensor, tensor_scale: Tensor, pairs: Tensor) -> Tensor:
    steps = _reorder(scales, linear_order).float() * tensor_scale.float()
    return (unpack(codes, pairs).unflatten(-1, (-1, GROUP)) * steps[..., None]).flatten(-2)


def _reorder(scales: Tensor, order: Callable[[Tensor], Tensor]) -> Tensor:
    """Reorder scales as bytes: devices copy uint8 where they cannot copy fp8."""
    return order(scales.view(torch.uint8)).contiguous().view(torch.float8_e4m3fn)


@lru_cache
def multiplies(device: torch.device) -> bool:
    """Return whether the device multiplies natively, by trying one product.

    A library that cannot, or that expects another order of scales, must not cost an image.
    """
    if not multiplies_fp4(device):
        return False
    weight, x = (torch.randn(128, 64, dtype=torch.bfloat16, device=device) for _ in range(2))
    layer = Nvfp4Linear(64, 128, native=True)
    layer.load_tensors(encode(weight))
    wanted = F.linear(decode(encode(x), x.dtype), decode(encode(weight), x.dtype)).float()
    try:
        return bool((layer(x).float() - wanted).norm() < 0.02 * wanted.norm())
    except RuntimeError:
        return False


class Nvfp4Linear(QuantLinear):
    """A linear layer whose weights stay in nvfp4.

    pairs, middles: constants, made as it is loaded. No CUDA graph can capture their copy from host memory.
    """

    scheme = "nvfp4"
    weight: Tensor
    weight_scale: Tensor
    weight_scale_2: Tensor
    input_scale: Tensor | None
    pairs: Tensor
    middles: Tensor

    def __init__(self, in_features: int, out_features: int, *, native: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features, self.native = in_features, out_features, native
        self.register_buffer("weight", torch.empty(out_features, in_features // 2, dtype=torch.uint8))
        scales = torch.empty(out_features, in_features // GROUP, dtype=torch.float8_e4m3fn)
        self.register_buffer("weight_scale", scales)
        self.register_buffer("weight_scale_2", torch.empty((), dtype=torch.float32))
        self.register_buffer("input_scale", None)
        self.register_buffer("pairs", None, persistent=False)
        self.register_buffer("middles", None, persistent=False)

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Hold what `encode` returned or a file stores."""
        self.weight, self.weight_scale = tensors["weight"], tensors["weight_scale"]
        self.weight_scale_2 = tensors["weight_scale_2"].float().reshape(())
        scale = tensors.get("input_scale")
        self.input_scale = None if scale is None else scale.float().reshape(())
        self.pairs, self.middles = value_pairs(self.weight.device), middles_of_values(self.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        # The product of codes rounds its inputs, too: a model in fp32 asks for more.
        if self.native and x.dtype == torch.bfloat16:
            return self._multiply(x)
        stored = {
            "weight": self.weight, "weight_scale": self.weight_scale, "weight_scale_2": self.weight_scale_2,
            "pairs": self.pairs,
        }  # fmt: skip
        return F.linear(x, decode(stored, x.dtype))

    def _multiply(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        # Pad to whole blocks of scales. Both sides keep even elements in the high nibbles, so the sum is the same.
        packed = encode(F.pad(rows, (0, 0, 0, -len(rows) % 128)), self.input_scale, self.middles)
        out = torch._scaled_mm(
            packed["weight"].view(_PAIR),
            self.weight.view(_PAIR).t(),
            scale_a=packed["weight_scale"],
            scale_b=self.weight_scale,
            out_dtype=x.dtype,
        )
        out = out[: len(rows)] * (packed["weight_scale_2"] * self.weight_scale_2)
        return out.reshape(*x.shape[:-1], self.out_features)


_PAIR = torch.float4_e2m1fn_x2
"""torch's name for a byte of two values."""


class _Nvfp4:
    name = "nvfp4"
    markers = frozenset({"nvfp4"})
    siblings = frozenset({"weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale"})

    def detect(self, weight: Entry, siblings: Mapping[str, Entry]) -> bool:
        return weight.storage_dtype == "U8" and {"weight_scale", "weight_scale_2"} <= siblings.keys()

    def store(self, weight: Entry, siblings: Mapping[str, Entry], marker: Marker) -> StoredWeight:
        rows, columns = weight.shape[0], 2 * weight.shape[1]
        check_weight(weight, "U8", self.name)
        for name in ("weight_scale", "weight_scale_2"):
            if name not in siblings:
                raise BadWeights(f"{weight.name} is nvfp4 without a {name}.", hint="Download it again.")
        if rows % 128 or columns % (4 * GROUP):
            raise BadWeights(f"{weight.name} is nvfp4 of {rows}×{columns}, which is no whole number of its blocks.")
        check_scale(siblings["weight_scale"], ("F8_E4M3",), {rows * columns // GROUP})
        check_scale(siblings["weight_scale_2"], FLOATS, {1})
        check_scale(siblings.get("input_scale"), FLOATS, {1})
        check_scale(siblings.get("pre_quant_scale"), FLOATS, {columns})
        full = bool(marker.get("full_precision_matrix_mult", False))
        return StoredWeight(self, {"weight": weight, **siblings}, (rows, columns), full_precision=full)

    def decode(self, tensors: dict[str, Tensor], dtype: torch.dtype, options: Mapping[str, Any]) -> Tensor:
        return decode(tensors, dtype)

    def memory_scheme(self, stored: StoredWeight, device: torch.device) -> str | None:
        if "pre_quant_scale" in stored.entries:
            # Folded into the columns it is no nvfp4 any more, and rounding a second time would cost 5 %.
            return None
        # Widening four bits at every step costs more than it saves where fp8 is multiplied natively, and packing the
        # activations, on Blackwell, is not yet one kernel. A user who lacks the memory for fp8 asks for nvfp4.
        return fp8.SCHEME.name if fp8.multiplies(device, by_rows=True) else self.name

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        return encode(weight)

    def fits(self, layer: nn.Linear) -> bool:
        return layer.out_features % 128 == 0 and layer.in_features % (4 * GROUP) == 0

    def make(self, layer: nn.Linear, device: torch.device, *, full_precision: bool) -> QuantLinear:
        native = multiplies(device) and not full_precision
        return Nvfp4Linear(layer.in_features, layer.out_features, native=native)

    def keeps(self, stored: StoredWeight) -> bool:
        return stored.scheme is self and "pre_quant_scale" not in stored.entries

    def bytes_for(self, weights: int) -> int:
        return weights // 2 + weights // GROUP + 4


SCHEME = _Nvfp4()
