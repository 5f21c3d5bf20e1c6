"""fp8: weights as float8_e4m3fn with one scale a layer; multiplied as they are where the device can, else widened.

Layout of BFL's files: `weight` F8_E4M3 [out, in], `weight_scale` and `input_scale` F32 []. W = weight · weight_scale.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CODE = torch.float8_e4m3fn
LARGEST = 448.0
"""Of float8_e4m3fn."""


def _scale(values: Tensor) -> Tensor:
    """What makes the largest of `values` the largest code."""
    low, high = torch.aminmax(values)
    return (torch.maximum(-low, high).float() / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)


def encode(weight: Tensor) -> dict[str, Tensor]:
    """Codes and scale of [out, in]; the largest value becomes the largest code. A row at a time: no second copy."""
    scale = _scale(weight)
    codes = torch.empty(weight.shape, dtype=CODE, device=weight.device)
    for rows, into in zip(weight.split(_ROWS), codes.split(_ROWS), strict=True):
        into.copy_((rows.float() / scale).clamp(-LARGEST, LARGEST))
    return {"weight": codes, "weight_scale": scale}


def decode(stored: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """[out, in] in `dtype`. A scale may be one number or one a row; without one the codes are the values."""
    codes, scale = stored["weight"], stored.get("weight_scale")
    if scale is None:
        return codes.to(dtype)
    scale = scale.reshape(-1, 1)
    return torch.cat([(part.float() * s).to(dtype) for part, s in zip(*_by_rows(codes, scale), strict=True)])


_ROWS = 2048
"""Rows that are widened to fp32 at once."""


def _by_rows(codes: Tensor, scale: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return codes.split(_ROWS), scale.expand(codes.shape[0], 1).split(_ROWS)


class Fp8Linear(nn.Module):
    """A linear layer without bias whose weights stay in fp8.

    native: multiply in fp8, activations too; else widen this layer's weights for the moment of use.
    """

    kind = "fp8"
    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None

    def __init__(self, in_features: int, out_features: int, *, native: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features, self.native = in_features, out_features, native
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=CODE))
        self.register_buffer("weight_scale", torch.empty((), dtype=torch.float32))
        self.register_buffer("input_scale", None)

    def take(self, stored: dict[str, Tensor]) -> None:
        """Hold what `encode` gave or a file held."""
        self.weight = stored["weight"]
        self.weight_scale = stored.get("weight_scale", torch.ones((), device=self.weight.device)).float().reshape(())
        scale = stored.get("input_scale")
        self.input_scale = None if scale is None else scale.float().reshape(())

    def forward(self, x: Tensor) -> Tensor:
        if self.native:
            return self._multiply(x)
        # The scale on the way out: the codes widen exactly, and a row of outputs is shorter than a matrix.
        return F.linear(x, self.weight.to(x.dtype)) * self.weight_scale

    def _multiply(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        scale = self.input_scale
        if scale is None:
            scale = _scale(rows)
        codes = (rows / scale).clamp(-LARGEST, LARGEST).to(CODE)
        out = torch._scaled_mm(
            codes, self.weight.t(), scale_a=scale, scale_b=self.weight_scale, out_dtype=x.dtype, use_fast_accum=True
        )
        return out.reshape(*x.shape[:-1], self.out_features)
