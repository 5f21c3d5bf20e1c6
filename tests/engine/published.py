"""Writes checkpoints in the published layouts.

Weights are quantised by the published formulas, not by the engine's code.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2
from safetensors.torch import save_file
from torch import Tensor

from tests import toys
from tests.parity.test_layouts import bfl_autoencoder, bfl_transformer

BLOCK_LINEAR = re.compile(
    r"double_blocks\.\d+\.(?:img|txt)_(?:attn\.(?:qkv|proj)|mlp\.[02])\.weight|single_blocks\.\d+\.linear[12]\.weight"
)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)

Quantise = Callable[[Tensor], dict[str, Tensor]]


def fp8(weight: Tensor) -> dict[str, Tensor]:
    """Return the tensors stored under `X.` in BFL's fp8 files."""
    scale = weight.float().abs().max() / 448
    return {
        "weight": (weight.float() / scale).to(torch.float8_e4m3fn),
        "weight_scale": scale,
        "input_scale": torch.tensor(0.02),
    }


def nvfp4(weight: Tensor) -> dict[str, Tensor]:
    """Return the tensors stored under `X.` in BFL's nvfp4 files.

    The high nibble comes first, and scales are in cuBLAS's order.
    """
    w = weight.float().numpy()
    rows, columns = w.shape
    whole = np.float32(np.abs(w).max() / (448 * 6))
    groups = w.reshape(rows, columns // 16, 16)
    wanted = torch.from_numpy(np.abs(groups).max(-1) / 6 / whole).to(torch.float8_e4m3fn)
    steps = groups / np.maximum(wanted.float().numpy() * whole, 1e-30)[..., None]
    code = np.abs(np.abs(steps)[..., None] - E2M1).argmin(-1) + 8 * (steps < 0)
    code = code.reshape(rows, columns).astype(np.uint8)
    scales = wanted.view(torch.uint8).numpy()
    stored = np.empty(scales.size, dtype=np.uint8)
    for r in range(rows):
        for c in range(columns // 16):
            offset = ((r // 128) * (columns // 64) + c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4
            stored[offset] = scales[r, c]
    return {
        "weight": torch.from_numpy(code[:, 0::2] << 4 | code[:, 1::2]),
        "weight_scale": torch.from_numpy(stored).reshape(rows, columns // 16).view(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(whole),
        "input_scale": torch.tensor(0.001),
    }


FORMATS: dict[str, tuple[str, Quantise]] = {"fp8": ("float8_e4m3fn", fp8), "nvfp4": ("nvfp4", nvfp4)}


def quantised(tensors: dict[str, Tensor], kind: str, keep: str = r"(?!)") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return BFL's tensors with quantised block linears, and the header's metadata.

    Layers that match `keep` are not quantised.
    """
    name_of, quantise = FORMATS[kind]
    out, layers = {}, {}
    for name, tensor in tensors.items():
        if not BLOCK_LINEAR.fullmatch(name) or re.search(keep, name):
            out[name] = tensor.to(torch.bfloat16)
            continue
        layer = name.removesuffix(".weight")
        out |= {f"{layer}.{leaf}": value.contiguous() for leaf, value in quantise(tensor).items()}
        layers[layer] = {"format": name_of}
    return out, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


def small_decoder(work: Path) -> dict[str, Tensor]:
    """Return BFL's autoencoder tensors with a decoder narrower than the encoder."""
    narrow = AutoencoderKLFlux2(**toys.AUTOENCODER, decoder_block_out_channels=(32, 32, 32, 32))
    narrow.save_pretrained(work / "vae")
    return bfl_autoencoder(work)


def toy(folder: Path, **changes: object) -> Path:
    """Create a toy diffusers folder whose hidden size, 128, fits nvfp4's blocks."""
    return toys.save(folder, **({"num_attention_heads": 4} | changes))


def write(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata)
    return file


__all__ = ["bfl_autoencoder", "bfl_transformer", "fp8", "nvfp4", "quantised", "toy", "write"]
