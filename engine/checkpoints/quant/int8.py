"""int8: weights as signed bytes, maybe rotated (ConvRot), widened when read.

ComfyUI's int8_tensorwise: `weight` I8 [out, in], `weight_scale` F32 [], [out] or [out, 1]. W = weight · weight_scale.
With `convrot` in the marker the columns were rotated by an orthonormal symmetric H in groups, stored = W·H, so
W = stored·H again. Source: ComfyUI-INT8-Fast and ComfyUI, which agree on H.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from engine.checkpoints.files.header import Entry
from engine.checkpoints.quant.checks import FLOATS, check_scale, check_weight
from engine.checkpoints.quant.scheme import Marker, StoredWeight
from engine.contract import BadWeights

_H4 = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))


@lru_cache(maxsize=8)
def rotation(size: int) -> Tensor:
    """Return H of a group, orthonormal and symmetric."""
    matrix, base = torch.ones(1, 1), torch.tensor(_H4, dtype=torch.float32) / 2
    while matrix.shape[0] < size:
        matrix = torch.kron(matrix, base)
    return matrix


class _Int8:
    name = "int8"
    markers = frozenset({"int8_tensorwise"})
    siblings = frozenset({"weight_scale", "input_scale"})

    def detect(self, weight: Entry, siblings: Mapping[str, Entry]) -> bool:
        return weight.storage_dtype == "I8" and "weight_scale" in siblings

    def store(self, weight: Entry, siblings: Mapping[str, Entry], marker: Marker) -> StoredWeight:
        rows, columns = weight.shape
        check_weight(weight, "I8", self.name)
        if "weight_scale" not in siblings:
            raise BadWeights(f"{weight.name} is int8 without a weight_scale.", hint="Download it again.")
        check_scale(siblings["weight_scale"], FLOATS, {1, rows})
        group = marker.get("convrot_groupsize", 256) if marker.get("convrot") else 0
        if group and (group not in (4, 16, 64, 256, 1024) or columns % group):
            raise BadWeights(f"{weight.name} is rotated in groups of {str(group)[:20]}, which is not read.")
        entries = {"weight": weight, "weight_scale": siblings["weight_scale"]}
        label = "int8 convrot" if group else self.name
        return StoredWeight(self, entries, weight.shape, {"label": label, "group": group}, by_rows=True)

    def decode(self, tensors: dict[str, Tensor], dtype: torch.dtype, options: Mapping[str, Any]) -> Tensor:
        values = tensors["weight"].float() * tensors["weight_scale"].float().reshape(-1, 1)
        if group := options.get("group", 0):
            values = (values.unflatten(1, (-1, group)) @ rotation(group).to(values.device)).flatten(1)
        return values.to(dtype)

    def memory_scheme(self, stored: StoredWeight, device: torch.device) -> str | None:
        return None


SCHEME = _Int8()
