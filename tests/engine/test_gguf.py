"""GGUF files are read block by block as the gguf package reads them, and hostile ones are refused."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from engine.checkpoints.files import read_header
from engine.checkpoints.files.gguf import TYPES
from engine.checkpoints.quant import declared_markers, gguf_blocks, quantised_weights
from engine.contract import BadWeights
from tests.files import gguf_files

HALVES = {
    "Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip
"""The bytes of a block at which its fp16 numbers stand: random ones would not be finite."""


@pytest.mark.parametrize("kind", HALVES)
def test_blocks_decode_exactly_as_the_gguf_package_does(kind: str) -> None:
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (512, gguf_blocks._BLOCKS[kind][1]), dtype=np.uint8)
    for offset in HALVES[kind]:
        blocks[:, offset : offset + 2] = random.normal(size=(512, 1)).astype(np.float16).view(np.uint8)
    ours = gguf_blocks.DECODERS[kind](torch.from_numpy(blocks))
    assert np.array_equal(ours.numpy(), quants.dequantize(blocks, GGMLQuantizationType[kind]))


def test_all_block_types_of_the_table_are_decoded() -> None:
    assert set(gguf_blocks.DECODERS) == set(HALVES) == set(gguf_files.BLOCK_TYPES)


def header(*, version: int = 3, tensors: int = 1, keys: int = 0, body: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + body


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes = b"a.weight", shape: tuple[int, ...] = (32, 2), kind: int = 0, offset: int = 0) -> bytes:
    dimensions = struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", n & (2**64 - 1)) for n in shape)
    return text(name) + dimensions + struct.pack("<IQ", kind, offset)


HUGE = 2**63
HOSTILE: dict[str, tuple[bytes, str]] = {
    "nothing after the magic": (b"GGUF", "the version is 4 bytes long and 0 are left"),
    "version of the other byte order": (header(version=3 << 24), r"its version is 50331648; 2 and 3 are read"),
    "countless tensors": (header(tensors=HUGE), "it declares 9,223,372,036,854,775,808 tensors"),
    "countless keys": (header(keys=HUGE), "and 9,223,372,036,854,775,808 keys"),
    "an endless name": (header(body=struct.pack("<Q", HUGE)), "the name of a tensor is 9,223,.* bytes"),
    "an endless string": (header(keys=1, body=text(b"k") + struct.pack("<IQ", 8, HUGE)), "k is .* bytes long and"),
    "an endless array": (header(keys=1, body=text(b"k") + struct.pack("<IIQ", 9, 6, HUGE)), "k is 4 bytes long and 0"),
    "endless strings": (header(keys=1, body=text(b"k") + struct.pack("<IIQ", 9, 8, HUGE)), "k has .*strings"),
    "too many strings": (
        header(keys=2, body=2 * (text(b"k") + struct.pack("<IIQ", 9, 8, 500_001) + bytes(8 * 500_001))), "k has .*str"),
    "arrays in arrays": (header(keys=1, body=text(b"k") + struct.pack("<IIQ", 9, 9, 1)), "array of the value type 9"),
    "a value of no type": (header(keys=1, body=text(b"k") + struct.pack("<I", 99)), "has the value type 99"),
    "a cube of cubes": (header(body=tensor(shape=(2,) * 5)), "has 5 dimensions"),
    "dimensions that overflow": (header(body=tensor(shape=(2**33, 2**33))), "which is no shape of F32"),
    "a negative dimension": (header(body=tensor(shape=(-1, 2))), "which is no shape of F32"),
    "a part of a block": (header(body=tensor(shape=(100, 2), kind=12)), "which is no shape of Q4_K"),
    "data past the end": (header(body=tensor()) + b"\0" * 40, "does not lie where its header says"),
    "an offset past the end": (header(body=tensor(offset=2**40)) + b"\0" * 400, "does not lie where its header says"),
    "an offset that overflows": (header(body=tensor(offset=2**64 - 32)) + b"\0" * 400, "does not lie where"),
    "an offset off its alignment": (header(body=tensor(offset=8)) + b"\0" * 400, "does not lie where its header says"),
    "two tensors in one place": (
        header(tensors=2, body=tensor() + tensor(b"b.weight")) + b"\0" * 600, "lies in another tensor"),
    "a name twice": (header(tensors=2, body=tensor() + tensor(offset=256)) + b"\0" * 900, "has a.weight twice"),
    "an alignment of zero": (
        header(keys=1, body=text(b"general.alignment") + struct.pack("<II", 4, 0) + tensor()), "its alignment is 0"),
    "a shape that does not fit": (
        header(keys=1, body=text(b"comfy.gguf.orig_shape.a.weight") + struct.pack("<IIQii", 9, 5, 2, 7, 7) + tensor())
        + b"\0" * 400, r"is \[32, 2\] and was \[7, 7\]"),
}  # fmt: skip


def test_table_of_types_is_the_one_of_the_gguf_package() -> None:
    # Q8_1 is never stored; the package counts it as ggml did before its scales were fp16.
    theirs = {kind: (kind.name, *size) for kind, size in GGML_QUANT_SIZES.items() if kind.name != "Q8_1"}
    assert {kind: row for kind, row in TYPES.items() if row[0] != "Q8_1"} == theirs


@pytest.mark.parametrize(("kind", "says"), [(250, "the GGUF type 250"), (40, "is stored as NVFP4"), (41, "as Q1_0")])
def test_block_type_that_is_not_read_is_named_with_others(kind: int, says: str, tmp_path: Path) -> None:
    file = tmp_path / "klein.gguf"
    file.write_bytes(header(body=tensor(shape=(128, 2), kind=kind)) + bytes(400))
    with pytest.raises(BadWeights, match=says) as caught:
        quantised_weights(read_header(file).entries, {}, lambda entry: b"{}")
    assert "Q8_0" in str(caught.value)
    assert "Download it again" not in str(caught.value)


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_header_is_refused_in_one_line(what: str, tmp_path: Path) -> None:
    data, reason = HOSTILE[what]
    file = tmp_path / "klein.gguf"
    file.write_bytes(data)
    with pytest.raises(BadWeights, match=rf"klein\.gguf .* is not a whole GGUF file: .*{reason}") as caught:
        read_header(file)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_every_prefix_of_a_file_is_refused(tmp_path: Path) -> None:
    whole = tmp_path / "whole.gguf"
    gguf_files.write({"a.weight": torch.randn(4, 32), "b": torch.randn(3)}, lambda name, tensor: "F32", whole)
    data = whole.read_bytes()
    assert set(read_header(whole).entries) == {"a.weight", "b"}
    cut = tmp_path / "cut.gguf"
    for length in range(4, len(data) - 32, 7):
        cut.write_bytes(data[:length])
        with pytest.raises(BadWeights):
            read_header(cut)


def test_a_random_change_of_a_header_never_breaks_the_reader(tmp_path: Path) -> None:
    whole = tmp_path / "whole.gguf"
    gguf_files.write({"a.weight": torch.randn(4, 256)}, lambda name, tensor: "Q4_K", whole, "qwen3")
    data, random = whole.read_bytes(), np.random.default_rng(0)
    file = tmp_path / "changed.gguf"
    for _ in range(400):
        changed = bytearray(data)
        for at in random.integers(4, 200, 3):
            changed[at] = random.integers(256)
        file.write_bytes(changed)
        try:
            header = read_header(file)
            quantised_weights(header.entries, declared_markers(header.metadata), lambda entry: b"{}")
        except BadWeights:
            continue


def test_a_type_that_is_not_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "klein.gguf"
    file.write_bytes(header(body=tensor(shape=(256, 2), kind=23)) + b"\0" * 600)
    entries = read_header(file).entries
    with pytest.raises(BadWeights, match=r"a\.weight is stored as IQ4_XS, which is not read; read are Q8_0"):
        quantised_weights(entries, {}, lambda entry: b"{}")
