"""GGUF block formats, decoded as they are read.

A block holds 32 or 256 weights with scales of its own: value = d·q, d·q + m, or with a second level of scales.
Layouts: ggml's quants; checked in tests against the gguf package. Matrices of these formats are always widened, to
the model's dtype or to fp8: kernels that multiply blocks are not worth their upkeep here.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from engine.checkpoints.files.gguf import TYPES
from engine.checkpoints.files.header import Entry
from engine.checkpoints.quant.scheme import Marker, StoredWeight
from engine.contract import BadWeights

Decoder = Callable[[Tensor], Tensor]
"""Blocks [n, bytes] uint8 -> values [n, weights] fp32."""


def _half(blocks: Tensor, begin: int) -> Tensor:
    """Read the fp16 number at byte `begin` of every block."""
    return blocks[:, begin : begin + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """Unpack bytes: the low nibbles first, then the high ones."""
    return torch.cat((packed & 15, packed >> 4), dim=-1)


def _bits(packed: Tensor, count: int, width: int) -> Tensor:
    """Unpack fields of `width` bits, the lowest of all bytes first."""
    fields = [packed >> (width * i) & ((1 << width) - 1) for i in range(count)]
    return torch.stack(fields, dim=-2)


def _fifth_bits(blocks: Tensor, begin: int) -> Tensor:
    """Unpack 32 bits: bit i belongs to weight i."""
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    return (blocks[:, begin : begin + 4, None] >> shifts & 1).flatten(1)


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8).float() * _half(blocks, 0)


def _q4_0(blocks: Tensor) -> Tensor:
    return (_nibbles(blocks[:, 2:]).float() - 8) * _half(blocks, 0)


def _q4_1(blocks: Tensor) -> Tensor:
    return torch.addcmul(_half(blocks, 2), _nibbles(blocks[:, 4:]).float(), _half(blocks, 0))


def _q5_0(blocks: Tensor) -> Tensor:
    return ((_nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2) << 4).float() - 16) * _half(blocks, 0)


def _q5_1(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4) << 4
    return torch.addcmul(_half(blocks, 2), codes.float(), _half(blocks, 0))


def _q2_k(blocks: Tensor) -> Tensor:
    scales, packed = blocks[:, :16], blocks[:, 16:80]
    scale = (scales & 15).float() * _half(blocks, 80)
    least = (scales >> 4).float() * _half(blocks, 82)
    # Two halves of 128 weights: 32 bytes each, four fields of two bits.
    codes = _bits(packed.unflatten(1, (2, 32)), 4, 2).reshape(-1, 16, 16)
    return (codes.float() * scale[..., None] - least[..., None]).flatten(1)


def _q3_k(blocks: Tensor) -> Tensor:
    high, packed, scales = blocks[:, :32], blocks[:, 32:96], blocks[:, 96:108]
    low, top = _nibbles(scales[:, :8]), _bits(scales[:, 8:], 4, 2).flatten(1)
    scale = ((low | top << 4).float() - 32) * _half(blocks, 108)
    codes = _bits(packed.unflatten(1, (2, 32)), 4, 2).flatten(1)
    # A high bit that is not set takes four away; bit g of the 32 bytes is of the g-th group of 32 weights.
    missing = _bits(high, 8, 1).flatten(1) ^ 1
    values = codes.float() - 4 * missing.float()
    return (values.unflatten(1, (16, 16)) * scale[..., None]).flatten(1)


def _six_bit_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Unpack 12 bytes into 8 scales and 8 minima of six bits."""
    first, second, third = packed.split(4, dim=1)
    scales = torch.cat((first & 63, third & 15 | first >> 6 << 4), dim=1)
    least = torch.cat((second & 63, third >> 4 | second >> 6 << 4), dim=1)
    return scales.float(), least.float()


def _k_groups(blocks: Tensor, codes: Tensor) -> Tensor:
    """Scale eight groups of 32 codes, as Q4_K and Q5_K do."""
    scales, least = _six_bit_scales(blocks[:, 4:16])
    scale, shift = scales * _half(blocks, 0), least * _half(blocks, 2)
    return torch.addcmul(-shift[..., None], codes.unflatten(1, (8, 32)).float(), scale[..., None]).flatten(1)


def _q4_k(blocks: Tensor) -> Tensor:
    return _k_groups(blocks, _nibbles(blocks[:, 16:].unflatten(1, (4, 32))).flatten(1))


def _q5_k(blocks: Tensor) -> Tensor:
    fifth = _bits(blocks[:, 16:48], 8, 1).flatten(1)
    return _k_groups(blocks, _nibbles(blocks[:, 48:].unflatten(1, (4, 32))).flatten(1) | fifth << 4)


def _q6_k(blocks: Tensor) -> Tensor:
    low, top = blocks[:, :128].unflatten(1, (2, 64)), blocks[:, 128:192].unflatten(1, (2, 32))
    codes = _nibbles(low).flatten(1) | _bits(top, 4, 2).flatten(1) << 4
    scale = blocks[:, 192:208].contiguous().view(torch.int8).float() * _half(blocks, 208)
    return ((codes.float() - 32).unflatten(1, (16, 16)) * scale[..., None]).flatten(1)


DECODERS: dict[str, Decoder] = {
    "Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip
_BLOCKS = {name: (weights, width) for name, weights, width in TYPES.values() if weights > 1}
"""Block type -> weights and bytes of a block, those that are not read among them."""


class _GgufBlocks:
    name = "gguf"
    markers = frozenset[str]()
    siblings = frozenset[str]()

    def detect(self, weight: Entry, siblings: Mapping[str, Entry]) -> bool:
        return weight.storage_dtype in _BLOCKS

    def store(self, weight: Entry, siblings: Mapping[str, Entry], marker: Marker) -> StoredWeight:
        kind = weight.storage_dtype
        if kind not in DECODERS:
            raise BadWeights(f"{weight.name} is stored as {kind}, which is not read; read are {', '.join(DECODERS)}.")
        rows, columns = weight.shape
        weights, width = _BLOCKS[kind]
        if columns % weights:
            raise BadWeights(f"{weight.name} is {kind} of {rows}×{columns}, which is no whole number of its blocks.")
        packed = replace(weight, storage_dtype="U8", shape=(rows, columns // weights * width))
        return StoredWeight(self, {"weight": packed}, (rows, columns), {"label": kind}, by_rows=True)

    def decode(self, tensors: dict[str, Tensor], dtype: torch.dtype, options: Mapping[str, Any]) -> Tensor:
        kind, packed = options["label"], tensors["weight"]
        blocks = packed.view(-1, _BLOCKS[kind][1])
        return DECODERS[kind](blocks).to(dtype).view(packed.shape[0], -1)

    def memory_scheme(self, stored: StoredWeight, device: torch.device) -> str | None:
        return None


SCHEME = _GgufBlocks()
