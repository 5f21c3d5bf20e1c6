"""Write GGUF files: the container by the gguf package, K blocks by quantisers of our own, since it has none."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from torch import Tensor

Blocks = npt.NDArray[np.uint8]

SIMPLE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
PLAIN = ("F32", "F16", "BF16")


def _halves(values: npt.NDArray[np.float32]) -> Blocks:
    return values.astype(np.float16).view(np.uint8).reshape(len(values), 2)


def _super_blocks(weight: Tensor) -> npt.NDArray[np.float32]:
    return weight.float().numpy().reshape(-1, 256).astype(np.float32)


def _affine(blocks: npt.NDArray[np.float32], levels: int) -> tuple[npt.NDArray[np.float32], ...]:
    """One scale and minimum a block of 256, and the nearest codes."""
    least = np.minimum(blocks.min(1), 0)
    step = np.maximum((blocks.max(1) - least) / (levels - 1), 1e-7)
    return step, -least, np.clip(np.rint((blocks - least[:, None]) / step[:, None]), 0, levels - 1)


def _pack_scales() -> Blocks:
    """Twelve bytes of eight scales and eight minima, all of them one."""
    return np.array([1] * 4 + [1] * 4 + [0x11] * 4, dtype=np.uint8)


def _nibble_groups(codes: npt.NDArray[np.float32]) -> Blocks:
    groups = codes.astype(np.uint8).reshape(-1, 4, 2, 32)
    return ((groups[:, :, 0] & 15) | (groups[:, :, 1] & 15) << 4).reshape(-1, 128).astype(np.uint8)


def _sum_of_bits(groups: Blocks) -> Blocks:
    """Pack eight groups of bits [n, 8, 32] into 32 bytes, one bit a group."""
    return np.packbits(groups, axis=1, bitorder="little")[:, 0]


def _q4_k(weight: Tensor) -> Blocks:
    step, least, codes = _affine(_super_blocks(weight), 16)
    scales = np.tile(_pack_scales(), (len(codes), 1))
    return np.concatenate([_halves(step), _halves(least), scales, _nibble_groups(codes)], axis=1)


def _q5_k(weight: Tensor) -> Blocks:
    step, least, codes = _affine(_super_blocks(weight), 32)
    fifth = (codes.astype(np.uint8) >> 4).reshape(-1, 8, 32)
    high = _sum_of_bits(fifth)  # type: ignore
    scales = np.tile(_pack_scales(), (len(codes), 1))
    return np.concatenate([_halves(step), _halves(least), scales, high, _nibble_groups(codes)], axis=1)


def _two_bits(codes: npt.NDArray[np.uint8]) -> Blocks:
    """256 fields of two bits as 64 bytes: two halves of 32 bytes, four fields each."""
    halves = codes.reshape(-1, 2, 4, 32)
    packed = halves[:, :, 0] | halves[:, :, 1] << 2 | halves[:, :, 2] << 4 | halves[:, :, 3] << 6
    return packed.reshape(-1, 64).astype(np.uint8)


def _q2_k(weight: Tensor) -> Blocks:
    step, least, codes = _affine(_super_blocks(weight), 4)
    scales = np.full((len(codes), 16), 0x11, dtype=np.uint8)
    return np.concatenate([scales, _two_bits(codes.astype(np.uint8)), _halves(step), _halves(least)], axis=1)


def _q3_k(weight: Tensor) -> Blocks:
    blocks = _super_blocks(weight)
    step = np.maximum(np.abs(blocks).max(1) / 4, 1e-7)
    codes = np.clip(np.rint(blocks / step[:, None]), -4, 3).astype(np.int8) + 4
    high = (codes >> 2).astype(np.uint8).reshape(-1, 8, 32)
    mask = _sum_of_bits(high)
    # Sixteen six-bit scales of 33, which stands for one: the low nibble 1, the two high bits 2.
    scales = np.tile(np.array([0x11] * 8 + [0xAA] * 4, dtype=np.uint8), (len(codes), 1))
    return np.concatenate([mask, _two_bits((codes & 3).astype(np.uint8)), scales, _halves(step)], axis=1)


def _q6_k(weight: Tensor) -> Blocks:
    blocks = _super_blocks(weight)
    step = np.maximum(np.abs(blocks).max(1) / 31, 1e-7)
    codes = (np.clip(np.rint(blocks / step[:, None]), -32, 31) + 32).astype(np.uint8)
    halves = codes.reshape(-1, 2, 4, 32)
    low = np.concatenate([(halves[:, :, i] & 15) | (halves[:, :, i + 2] & 15) << 4 for i in (0, 1)], axis=2)
    scales = np.ones((len(codes), 16), dtype=np.uint8)
    return np.concatenate([low.reshape(-1, 128), _two_bits(codes >> 4), scales, _halves(step)], axis=1)


K_QUANTISERS: dict[str, Callable[[Tensor], Blocks]] = {
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip
BLOCK_TYPES = (*SIMPLE, *K_QUANTISERS)


def quantise(weight: Tensor, kind: str) -> Blocks:
    """Rows of blocks, as bytes."""
    if kind in K_QUANTISERS:
        return K_QUANTISERS[kind](weight).reshape(weight.shape[0], -1)
    return quants.quantize(weight.float().numpy(), GGMLQuantizationType[kind]).view(np.uint8)


def widen(data: Blocks, kind: str, shape: tuple[int, ...]) -> Tensor:
    """Widen a tensor with the gguf package."""
    return torch.from_numpy(quants.dequantize(data, GGMLQuantizationType[kind]).astype(np.float32)).reshape(shape)


def write(
    tensors: dict[str, Tensor], kinds: Callable[[str, Tensor], str], file: Path, architecture: str | None = "flux"
) -> dict[str, Tensor]:
    """Write `tensors`, each in the format that `kinds` says, and return what they mean in fp32."""
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(file, architecture or "flux")
    meant: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        kind = kinds(name, tensor)
        data = quantise(tensor, kind)
        meant[name] = widen(data, kind, tuple(tensor.shape))
        raw = GGMLQuantizationType[kind]
        if kind in ("F32", "F16"):
            writer.add_tensor(name, data.view(np.float32 if kind == "F32" else np.float16).reshape(tuple(tensor.shape)))
        else:
            writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant
