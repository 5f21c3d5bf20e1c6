"""Read the header of a GGUF file: its metadata and tensors.

Layout (little endian): `GGUF`, u32 version, u64 tensors, u64 keys; keys (string, u32 type, value); tensors (string,
u32 dimensions, u64 each with the fastest first, u32 type, u64 offset); data from the next multiple of
`general.alignment`. Source: ggml's gguf.md. Every count comes from a file that may be hostile, so each is compared
with the bytes that are left before anything is allocated.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from engine.checkpoints.files.header import Entry, Header
from engine.contract import BadWeights

SUFFIXES: tuple[str, ...] = (".gguf",)
_MAGIC = b"GGUF"

TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
"""Type id -> name, weights a block, bytes a block. Source: ggml.h and the gguf package, version 0.19."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

_MAX_TENSORS, _MAX_KEYS, _MAX_NAME, _MAX_DIMENSIONS = 20_000, 10_000, 1024, 4
_MAX_STRINGS = 1_000_000
"""Strings in the arrays of a file: Qwen3 has 151,936 words and about as many merges. A million take half a second."""
_KEPT_ITEMS = 16
"""Items of an array that are kept: a shape has a few, a tokenizer's 150,000 words are skipped."""
_KEPT_CHARS = 4096

_ORIGINAL_SHAPE = "comfy.gguf.orig_shape."


def matches(start: bytes, size: int) -> bool:
    """Return whether the file begins with GGUF's magic number."""
    return start.startswith(_MAGIC)


class _Malformed(ValueError):
    """The reason for which a header cannot be read."""


@dataclass
class _Cursor:
    """A stream that refuses to read past the end of its file."""

    stream: BinaryIO
    size: int
    offset: int = 0
    strings: int = 0

    def take(self, count: int, what: str) -> bytes:
        """Read `count` bytes of `what`."""
        if count > self.size - self.offset:
            raise _Malformed(f"{what} is {count:,} bytes long and {self.size - self.offset:,} are left")
        data = self.stream.read(count)
        if len(data) < count:
            raise _Malformed("it ends in its header")
        self.offset += count
        return data

    def skip(self, count: int, what: str) -> None:
        if count > self.size - self.offset:
            raise _Malformed(f"{what} is {count:,} bytes long and {self.size - self.offset:,} are left")
        self.stream.seek(count, 1)
        self.offset += count

    def number(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def name(self, what: str) -> str:
        length = self.number("Q", what)
        if length > _MAX_NAME:
            raise _Malformed(f"{what} is {length:,} bytes long")
        return self.take(length, what).decode("utf-8", "replace")


def read(file: Path, size: int, stream: BinaryIO) -> Header:
    """Read the header. Raises BadWeights for anything but a complete file."""
    cursor = _Cursor(stream, size)
    try:
        cursor.take(4, "the magic number")
        version = cursor.number("I", "the version")
        if version not in (2, 3):
            raise _Malformed(f"its version is {version}; 2 and 3 are read")
        tensors, keys = cursor.number("Q", "the tensor count"), cursor.number("Q", "the key count")
        if tensors > _MAX_TENSORS or keys > _MAX_KEYS:
            raise _Malformed(f"it declares {tensors:,} tensors and {keys:,} keys")
        metadata = dict(_read_key(cursor) for _ in range(keys))
        declared = [_read_tensor(cursor) for _ in range(tensors)]
        entries = _place(file, size, cursor.offset, metadata, declared)
    except _Malformed as error:
        raise BadWeights(
            f"{file.name} ({size:,} bytes) is not a whole GGUF file: {error}.", hint="Download it again."
        ) from None
    return Header(file, entries, {key: value for key, value in metadata.items() if isinstance(value, str)})


def _read_key(cursor: _Cursor) -> tuple[str, Any]:
    name = cursor.name("the name of a key")
    return name, _read_value(cursor, cursor.number("I", name), name[:60])


def _read_value(cursor: _Cursor, kind: int, what: str) -> Any:
    if kind in _SCALARS:
        return cursor.number(_SCALARS[kind], what)
    if kind == _STRING:
        return _read_string(cursor, what)
    if kind == _ARRAY:
        return _read_array(cursor, what)
    raise _Malformed(f"{what} has the value type {kind}")


def _read_string(cursor: _Cursor, what: str) -> str:
    length = cursor.number("Q", what)
    kept = cursor.take(min(length, _KEPT_CHARS), what)
    cursor.skip(length - len(kept), what)
    return kept.decode("utf-8", "replace")


def _read_array(cursor: _Cursor, what: str) -> list[Any]:
    kind, count = cursor.number("I", what), cursor.number("Q", what)
    if kind in _SCALARS:
        width = struct.calcsize("<" + _SCALARS[kind])
        kept = [cursor.number(_SCALARS[kind], what) for _ in range(min(count, _KEPT_ITEMS))]
        cursor.skip((count - len(kept)) * width, what)
        return kept
    if kind != _STRING:
        # Arrays of arrays are in the specification and in no file; nesting is what a hostile one would use.
        raise _Malformed(f"{what} is an array of the value type {kind}")
    cursor.strings += count
    if cursor.strings > _MAX_STRINGS or 8 * count > cursor.size - cursor.offset:
        raise _Malformed(f"{what} has {count:,} strings")
    for _ in range(count):
        cursor.skip(cursor.number("Q", what), what)
    return []


def _read_tensor(cursor: _Cursor) -> tuple[str, list[int], int, int]:
    name = cursor.name("the name of a tensor")
    dimensions = cursor.number("I", name)
    if dimensions > _MAX_DIMENSIONS:
        raise _Malformed(f"{name[:60]} has {dimensions:,} dimensions")
    shape = [cursor.number("Q", name) for _ in range(dimensions)]
    return name, shape, cursor.number("I", name), cursor.number("Q", name)


def _place(
    file: Path, size: int, header: int, metadata: dict[str, Any], declared: list[tuple[str, list[int], int, int]]
) -> dict[str, Entry]:
    """Turn offsets of the data into offsets of the file, checked."""
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment not in (2**n for n in range(3, 17)):
        raise _Malformed(f"its alignment is {str(alignment)[:20]}")
    start = -(-header // alignment) * alignment
    entries: dict[str, Entry] = {}
    for name, shape, kind, offset in declared:
        if name in entries:
            raise _Malformed(f"it has {name[:60]} twice")
        if kind not in TYPES:
            raise BadWeights(
                f"{file.name} is not read: {name[:60]} has the GGUF type {kind}, which is not known.",
                hint="Get the model as Q8_0, Q4_K_M or another common type.",
            )
        dtype, weights, width = TYPES[kind]
        count = math.prod(shape)
        if count >= 2**48 or (shape[0] if shape else 1) % weights:
            raise _Malformed(f"{name[:60]} is {str(shape)[:60]}, which is no shape of {dtype}")
        length = count // weights * width
        if offset % alignment or start + offset + length > size:
            raise _Malformed(f"{name[:60]} does not lie where its header says")
        begin = start + offset
        entries[name] = Entry(file, name, dtype, _shape(name, shape, metadata), begin, begin + length)
    _check_overlaps(entries)
    return entries


def _check_overlaps(entries: dict[str, Entry]) -> None:
    offset = 0
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.end)):
        if entry.begin < offset:
            raise _Malformed(f"{entry.name[:60]} lies in another tensor")
        offset = entry.end


def _shape(name: str, shape: list[int], metadata: dict[str, Any]) -> tuple[int, ...]:
    """Return the shape, the slowest dimension first.

    ComfyUI's converter keeps a shape that GGUF cannot hold in the metadata.
    """
    original = metadata.get(_ORIGINAL_SHAPE + name)
    if isinstance(original, list) and all(isinstance(n, int) and n >= 0 for n in original):
        if math.prod(original) != math.prod(shape):
            raise _Malformed(f"{name[:60]} is {shape} and was {original[:8]}")
        return tuple(original)
    return tuple(reversed(shape))
