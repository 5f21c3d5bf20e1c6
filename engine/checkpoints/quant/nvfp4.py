"""nvfp4: two weights a byte, one fp8 scale for sixteen of them, one fp32 scale a layer; multiplied as they are where
the device can, else widened.

Layout of BFL's files: `weight` U8 [out, in/2], the element of even index in the high nibble; `weight_scale` F8_E4M3
[out, in/16], lying in cuBLAS's 128 × 4 blocks whatever its shape reads; `weight_scale_2` F32 [].
W = value · weight_scale · weight_scale_2. Source: comfy-kitchen; sglang found the same two traps.
"""

import itertools
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from engine.memory.device import multiplies_fp4

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of the low three bits of a nibble; the fourth is the sign."""

GROUP = 16
"""Weights that share a scale."""

_ROWS = 1024
"""Rows that are widened at once; a multiple of the 128 rows of a block of scales."""


def unpack(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, in/2] bytes -> [rows, in] values."""
    table = torch.tensor([*VALUES, *(-value for value in VALUES)], dtype=dtype, device=codes.device)
    # One look-up gives both values of a byte: 256 pairs, high nibble first.
    pairs = torch.stack([table.repeat_interleave(16), table.repeat(16)], dim=-1)
    return F.embedding(codes.int(), pairs).flatten(-2)


def linear_order(scales: Tensor) -> Tensor:
    """Scales [out, groups] from cuBLAS's order into reading order; out a multiple of 128, groups of 4."""
    rows, groups = scales.shape
    blocks = scales.reshape(rows // 128, groups // 4, 32, 4, 4)
    return rearrange(blocks, "R C low high c -> (R high low) (C c)")


def blocked_order(scales: Tensor) -> Tensor:
    """The reverse of `linear_order`."""
    blocks = rearrange(scales, "(R high low) (C c) -> R C low high c", high=4, low=32, c=4)
    return blocks.reshape(scales.shape)


def encode(weight: Tensor, whole: Tensor | None = None) -> dict[str, Tensor]:
    """[out, in] in the layout of the published files, each weight rounded to the nearest value.

    whole: the scale of all, None for the one that makes the largest of `weight` the largest value. Some rows at a
    time: what is computed on the way is many times as large as what comes of it.
    """
    rows, columns = weight.shape
    whole = _whole(weight) if whole is None else whole
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(rows, columns // GROUP, dtype=torch.float8_e4m3fn, device=weight.device)
    for some, packed, blocks in zip(weight.split(_ROWS), codes.split(_ROWS), scales.split(_ROWS), strict=True):
        steps = _scales(some.float(), whole)
        packed.copy_(_pack(some.float(), steps.float() * whole))
        blocks.copy_(_bytes_moved(steps, blocked_order))
    return {"weight": codes, "weight_scale": scales, "weight_scale_2": whole}


def _whole(weight: Tensor) -> Tensor:
    low, high = torch.aminmax(weight)
    return (torch.maximum(-low, high).float() / (448.0 * VALUES[-1])).clamp_min(torch.finfo(torch.float32).tiny)


def _scales(weight: Tensor, whole: Tensor) -> Tensor:
    """Of each group, what makes its largest weight the largest value."""
    largest = weight.unflatten(-1, (-1, GROUP)).abs().amax(-1)
    return (largest / VALUES[-1] / whole).clamp(max=448.0).to(torch.float8_e4m3fn)


def _pack(weight: Tensor, steps: Tensor) -> Tensor:
    """[rows, in] and the step of each group -> bytes."""
    groups = weight.unflatten(-1, (-1, GROUP)) / steps.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    middles = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(VALUES)], device=weight.device)
    nibbles = torch.bucketize(groups.abs(), middles, out_int32=True).to(torch.uint8) | (groups < 0).to(torch.uint8) << 3
    high, low = nibbles.flatten(-2).unflatten(-1, (-1, 2)).unbind(-1)
    return high << 4 | low


def decode(stored: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """[out, in] in `dtype`."""
    codes, scales = stored["weight"], stored["weight_scale"]
    out = torch.empty(codes.shape[0], 2 * codes.shape[1], dtype=dtype, device=codes.device)
    for into, rows, blocks in zip(out.split(_ROWS), codes.split(_ROWS), scales.split(_ROWS), strict=True):
        into.copy_(_widen(rows, blocks, stored["weight_scale_2"]))
    return out


def _widen(codes: Tensor, scales: Tensor, whole: Tensor) -> Tensor:
    steps = _bytes_moved(scales, linear_order).float() * whole.float()
    return (unpack(codes, torch.float32).unflatten(-1, (-1, GROUP)) * steps[..., None]).flatten(-2)


def _bytes_moved(scales: Tensor, order: Callable[[Tensor], Tensor]) -> Tensor:
    """Reordered as bytes: devices copy uint8 where they cannot copy fp8."""
    return order(scales.view(torch.uint8)).contiguous().view(torch.float8_e4m3fn)


@lru_cache
def multiplies(device: torch.device) -> bool:
    """Whether the device multiplies these layers as they are. It is asked for one product, and that is looked at:
    a library that cannot, or that expects another order of scales, must not cost a picture.
    """
    if not multiplies_fp4(device):
        return False
    weight, x = (torch.randn(128, 64, dtype=torch.bfloat16, device=device) for _ in range(2))
    layer = Nvfp4Linear(64, 128, native=True)
    layer.take(encode(weight))
    wanted = F.linear(decode(encode(x), x.dtype), decode(encode(weight), x.dtype)).float()
    try:
        return bool((layer(x).float() - wanted).norm() < 0.02 * wanted.norm())
    except RuntimeError:
        return False


class Nvfp4Linear(nn.Module):
    """A linear layer without bias whose weights stay in nvfp4.

    native: multiply in nvfp4, activations too; else widen this layer's weights for the moment of use.
    """

    kind = "nvfp4"
    weight: Tensor
    weight_scale: Tensor
    weight_scale_2: Tensor
    input_scale: Tensor | None

    def __init__(self, in_features: int, out_features: int, *, native: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features, self.native = in_features, out_features, native
        self.register_buffer("weight", torch.empty(out_features, in_features // 2, dtype=torch.uint8))
        scales = torch.empty(out_features, in_features // GROUP, dtype=torch.float8_e4m3fn)
        self.register_buffer("weight_scale", scales)
        self.register_buffer("weight_scale_2", torch.empty((), dtype=torch.float32))
        self.register_buffer("input_scale", None)

    def take(self, stored: dict[str, Tensor]) -> None:
        """Hold what `encode` gave or a file held."""
        self.weight, self.weight_scale = stored["weight"], stored["weight_scale"]
        self.weight_scale_2 = stored["weight_scale_2"].float().reshape(())
        scale = stored.get("input_scale")
        self.input_scale = None if scale is None else scale.float().reshape(())

    def forward(self, x: Tensor) -> Tensor:
        if self.native:
            return self._multiply(x)
        stored = {"weight": self.weight, "weight_scale": self.weight_scale, "weight_scale_2": self.weight_scale_2}
        return F.linear(x, decode(stored, x.dtype))

    def _multiply(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        # Whole blocks of scales. Both sides have their even elements in the high nibbles, so their sum does not ask.
        packed = encode(F.pad(rows, (0, 0, 0, -len(rows) % 128)), self.input_scale)
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
