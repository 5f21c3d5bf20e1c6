"""mxfp8: float8_e4m3fn with a power of two for 32 weights.

ComfyUI's layout: `weight` F8_E4M3 [out, in], `weight_scale` E8M0 [out, in/32] as F8_E8M0 or U8, in cuBLAS's 128 × 4
blocks like nvfp4's, since its kernels read them so. W = weight · 2^(scale − 127).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engine.checkpoints.files.header import Entry
from engine.checkpoints.quant.checks import check_scale, check_weight
from engine.checkpoints.quant.nvfp4 import linear_order
from engine.checkpoints.quant.scheme import Marker, StoredWeight
from engine.contract import BadWeights

GROUP = 32
_BIAS = 127


class _Mxfp8:
    name = "mxfp8"
    markers = frozenset({"mxfp8"})
    siblings = frozenset({"weight_scale", "input_scale"})

    def detect(self, weight: Entry, siblings: Mapping[str, Entry]) -> bool:
        scale = siblings.get("weight_scale")
        return weight.storage_dtype == "F8_E4M3" and scale is not None and scale.storage_dtype in ("F8_E8M0", "U8")

    def store(self, weight: Entry, siblings: Mapping[str, Entry], marker: Marker) -> StoredWeight:
        rows, columns = weight.shape
        check_weight(weight, "F8_E4M3", self.name)
        if "weight_scale" not in siblings:
            raise BadWeights(f"{weight.name} is mxfp8 without a weight_scale.", hint="Download it again.")
        if rows % 128 or columns % (4 * GROUP):
            raise BadWeights(f"{weight.name} is mxfp8 of {rows}×{columns}, which is no whole number of its blocks.")
        check_scale(siblings["weight_scale"], ("F8_E8M0", "U8"), {rows * columns // GROUP})
        entries = {"weight": weight, "weight_scale": siblings["weight_scale"]}
        return StoredWeight(self, entries, weight.shape)

    def decode(self, tensors: dict[str, Tensor], dtype: torch.dtype, options: Mapping[str, Any]) -> Tensor:
        codes = tensors["weight"]
        rows, columns = codes.shape
        exponents = linear_order(tensors["weight_scale"].view(torch.uint8).reshape(rows, columns // GROUP))
        out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
        for begin in range(0, rows, 1024):
            some = slice(begin, begin + 1024)
            scale = torch.exp2(exponents[some].float() - _BIAS)
            out[some] = (codes[some].float().unflatten(1, (-1, GROUP)) * scale[..., None]).flatten(1)
        return out

    def memory_scheme(self, stored: StoredWeight, device: torch.device) -> str | None:
        return None


SCHEME = _Mxfp8()
