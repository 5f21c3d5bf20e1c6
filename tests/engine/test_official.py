"""Tests the published files to the byte.

Sparse files have every name, format and shape, but no weights.
"""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from engine.checkpoints.files import read_header
from engine.checkpoints.quant import QuantLinear
from engine.families.klein import components
from engine.families.klein.companions import stored_format
from engine.families.klein.signatures import component
from engine.families.klein.transformer import Transformer, TransformerShape
from engine.families.klein.variants import VARIANTS, File
from engine.nn.autoencoder import Autoencoder, AutoencoderShape
from engine.registry import ModelRegistry
from tests.engine.published import BLOCK_LINEAR

SHAPES = {
    3072: TransformerShape(3072, 128, 7680, 5, 20, 9216),
    4096: TransformerShape(4096, 128, 12288, 8, 24, 12288),
}
# Bits per element, in the order in which the library that wrote the files sorts the formats.
ORDER = {"I64": (0, 64), "F32": (1, 32), "BF16": (2, 16), "F8_E4M3": (3, 8), "U8": (4, 8)}
NAMES = {"fp8": "float8_e4m3fn", "nvfp4": "nvfp4"}

Tensor = tuple[str, str, tuple[int, ...]]

EXACT = [(row, file) for row in VARIANTS.values() for file in row.files if file.bytes and "base" not in row.name]
"""The two quantised base models leave some layers in bf16, and nothing published says which."""


def quantised(layer: str, kind: str, rows: int, columns: int) -> list[Tensor]:
    scale, more = (f"{layer}.weight_scale", (f"{layer}.input_scale", "F32", ()))
    if kind == "fp8":
        return [(f"{layer}.weight", "F8_E4M3", (rows, columns)), (scale, "F32", ()), more]
    return [(f"{layer}.weight", "U8", (rows, columns // 2)), (scale, "F8_E4M3", (rows, columns // 16)),
            (f"{layer}.weight_scale_2", "F32", ()), more]  # fmt: skip


def tensors(shape: TransformerShape, kind: str, keep: str = r"(?!)") -> tuple[list[Tensor], dict[str, str]]:
    with torch.device("meta"):
        net = Transformer(shape)
    found: list[Tensor] = []
    layers = {}
    for name, parameter in net.named_parameters():
        if kind != "bf16" and BLOCK_LINEAR.fullmatch(name) and not re.match(keep, name):
            layer = name.removesuffix(".weight")
            layers[layer] = {"format": NAMES[kind]}
            found += quantised(layer, kind, *parameter.shape)
        else:
            found.append((name, "BF16", tuple(parameter.shape)))
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})} if layers else {}
    return found, metadata


def sparse(file: Path, found: list[Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Write a sparse file of these tensors, all zeros, that takes no disk space."""
    entries: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, dtype, shape in sorted(found, key=lambda tensor: (ORDER[tensor[1]][0], tensor[0])):
        end = at + math.prod(shape) * ORDER[dtype][1] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with file.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + at)
    return file


@pytest.mark.parametrize(("row", "file"), EXACT, ids=[file.name for _, file in EXACT])
def test_published_file_is_known_to_the_byte(row, file: File, tmp_path: Path) -> None:
    path = sparse(tmp_path / file.name, *tensors(SHAPES[row.hidden], file.format))
    assert path.stat().st_size == file.bytes
    header = read_header(path)
    assert component(header) == "transformer"
    assert stored_format(header)[0] == file.format
    part = components.transformer(path)
    assert part.module.shape == SHAPES[row.hidden]
    blocks = [layer for layer in part.module.modules() if isinstance(layer, QuantLinear)]
    assert len(blocks) == (0 if file.format == "bf16" else 80 if row.hidden == 3072 else 112)
    assert part.bytes == file.bytes - 8 - int.from_bytes(path.open("rb").read(8), "little")


def test_all_published_files_in_one_folder_are_identified_by_name(tmp_path: Path) -> None:
    for row, file in EXACT:
        sparse(tmp_path / file.name, *tensors(SHAPES[row.hidden], file.format))
    sources = {(source.name, source.format) for source in ModelRegistry((tmp_path,)).installed_models()}
    assert sources - {("nano", "bf16")} == {(row.name, file.format) for row, file in EXACT}


@pytest.mark.parametrize(
    ("row", "kept", "keep"),
    [
        # Sizes show how much stays in bf16, not which layers. Any layers with these shapes and name lengths fit.
        ("klein-base-4b", 2, r"double_blocks\.[01]\.img_attn\.proj"),
        ("klein-base-9b", 4, r"double_blocks\.0\.(?:img|txt)_attn\."),
    ],
)
def test_quantised_base_models_keep_some_layers_in_bf16(row: str, kept: int, keep: str, tmp_path: Path) -> None:
    file = next(file for file in VARIANTS[row].files if file.format == "fp8")
    path = sparse(tmp_path / file.name, *tensors(SHAPES[VARIANTS[row].hidden], "fp8", keep))
    assert path.stat().st_size == file.bytes
    part = components.transformer(path)
    assert sum(isinstance(part.module.get_submodule(layer), QuantLinear) for layer in part.layers) == (
        len(part.layers) - kept
    )


def test_published_autoencoder_is_known_to_the_byte(tmp_path: Path) -> None:
    """Check flux2-vae.safetensors.

    It is fp32, has BFL's names, and has 1×1 convolutions where we have matrices.
    """
    with torch.device("meta"):
        net = Autoencoder(AutoencoderShape())
    matrix = re.compile(r".*\.attn_1\.(?:q|k|v|proj_out)\.weight")
    found = [(name, "F32", (*t.shape, 1, 1) if matrix.fullmatch(name) else tuple(t.shape))
             for name, t in net.state_dict().items()]  # fmt: skip
    path = sparse(tmp_path / "flux2-vae.safetensors", [*found, ("bn.num_batches_tracked", "I64", ())])
    assert path.stat().st_size == 336_211_292
    assert component(read_header(path)) == "autoencoder"
    assert components.autoencoder(path).module.shape == AutoencoderShape()


def test_27_of_36_layers_of_the_published_encoder_are_read(tmp_path: Path) -> None:
    """Check ComfyUI's qwen_3_4b.safetensors and an 8B in one file.

    The head of the 8B is a separate matrix.
    """
    for name, hidden, mlp, size, read in (
        ("qwen_3_4b", 2560, 9728, 8_044_982_048, 6.23e9),
        ("qwen_3_8b", 4096, 12288, pytest.approx(16.4e9, rel=2e-3), 11.66e9),
    ):
        config = Qwen3Config(
            hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=36, num_attention_heads=32,
            num_key_value_heads=8, head_dim=128, vocab_size=151936,
        )  # fmt: skip
        with torch.device("meta"):
            net = Qwen3ForCausalLM(config)
        tied = name == "qwen_3_4b"
        found = [(n, "BF16", tuple(t.shape)) for n, t in net.state_dict().items() if not (tied and "lm_head" in n)]
        path = sparse(tmp_path / f"{name}.safetensors", found)
        assert path.stat().st_size == size
        part = components.text_encoder(path, (9, 18, 27))
        assert part.module.width == 3 * hidden
        assert part.bytes == pytest.approx(read, rel=1e-3)
