"""The published files to the byte: every name, format and shape, in sparse files that hold no weights."""

import json
import math
from pathlib import Path

import pytest
import torch

from engine import headers, parts
from engine.find import Shelf
from engine.headers import Header
from engine.model.transformer import Transformer, TransformerShape
from engine.quant import QuantLinear
from engine.variants import VARIANTS, File
from tests.engine.published import BLOCK_LINEAR

SHAPES = {
    3072: TransformerShape(3072, 128, 7680, 5, 20, 9216),
    4096: TransformerShape(4096, 128, 12288, 8, 24, 12288),
}
# In the order in which the library that wrote the files sorts them, and the bits of an element.
ORDER = {"F32": (0, 32), "BF16": (1, 16), "F8_E4M3": (2, 8), "U8": (3, 8)}
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


def tensors(shape: TransformerShape, kind: str) -> tuple[list[Tensor], dict[str, str]]:
    with torch.device("meta"):
        net = Transformer(shape)
    found: list[Tensor] = []
    layers = {}
    for name, parameter in net.named_parameters():
        if kind != "bf16" and BLOCK_LINEAR.fullmatch(name):
            layer = name.removesuffix(".weight")
            layers[layer] = {"format": NAMES[kind]}
            found += quantised(layer, kind, *parameter.shape)
        else:
            found.append((name, "BF16", tuple(parameter.shape)))
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})} if layers else {}
    return found, metadata


def sparse(file: Path, row_width: int, kind: str) -> Path:
    found, metadata = tensors(SHAPES[row_width], kind)
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
def test_a_published_file_is_known_to_the_byte(row, file: File, tmp_path: Path) -> None:
    path = sparse(tmp_path / file.name, row.hidden, file.format)
    assert path.stat().st_size == file.bytes
    header = Header.read(path)
    assert headers.kind(header) == "transformer"
    assert headers.storage(header) == file.format
    part = parts.transformer(path)
    assert part.module.shape == SHAPES[row.hidden]
    blocks = [layer for layer in part.module.modules() if isinstance(layer, QuantLinear)]
    assert len(blocks) == (0 if file.format == "bf16" else 80 if row.hidden == 3072 else 112)
    assert part.bytes == file.bytes - 8 - int.from_bytes(path.open("rb").read(8), "little")


def test_a_folder_of_all_published_files_is_told_apart_by_names(tmp_path: Path) -> None:
    for row, file in EXACT:
        sparse(tmp_path / file.name, row.hidden, file.format)
    sources = {(source.name, source.format) for source in Shelf((tmp_path,)).sources()}
    assert sources - {("nano", "bf16")} == {(row.name, file.format) for row, file in EXACT}
