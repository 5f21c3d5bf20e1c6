"""Read the header of a safetensors file."""

import json
import math
from pathlib import Path
from typing import Any, BinaryIO

from engine.checkpoints.files.header import Entry, Header
from engine.contract import BadWeights

SUFFIXES: tuple[str, ...] = (".safetensors", ".sft")

BITS = {
    "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8, "F4": 4,
}  # fmt: skip
"""Bits of an element, by the dtype's name in a header. Source: the safetensors crate."""

_MAX_HEADER, _MAX_TENSORS = 25_000_000, 20_000
"""Bytes and tensors of a header.

Every file in a folder of models is looked at, also for a call that names none. The crate allows 100 MB.
A klein in nvfp4 has 2,000 tensors, and the longest training metadata in a LoRA are a few MB.
"""

_MAX_SIDE = 2**48
"""Of one dimension: more than any disk holds, and far from an overflow in torch."""


def matches(start: bytes, size: int) -> bool:
    """Return whether a header's length and opening brace come first.

    The length alone would not do: 640, 896 and 1,152 begin with the bytes of a pickle, 67,324,752 with those of a zip.
    """
    return len(start) > 8 and start[8:9] == b"{" and 8 + int.from_bytes(start[:8], "little") <= size


def read(file: Path, size: int, stream: BinaryIO) -> Header:
    """Read the header. Raises BadWeights for anything but a complete file."""
    start = stream.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > _MAX_HEADER or 8 + length > size:
        raise _broken(file, size, "its header is cut short or invalid")
    try:
        declared: dict[str, Any] = json.loads(stream.read(length))
        if not isinstance(declared, dict) or len(declared) > _MAX_TENSORS:
            raise ValueError("it is no object" if not isinstance(declared, dict) else f"{len(declared):,} tensors")
        metadata = {str(key): str(value) for key, value in declared.pop("__metadata__", {}).items()}
        entries = {name: _entry(file, name, entry, 8 + length) for name, entry in declared.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error)[:100] if not isinstance(error, RecursionError) else "it is nested too deep"
        raise _broken(file, size, f"its header makes no sense ({reason})") from None
    _check_offsets(file, size, 8 + length, entries)
    return Header(file, entries, metadata)


def _check_offsets(file: Path, size: int, start: int, entries: dict[str, Entry]) -> None:
    offset = start
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != offset or entry.bytes * 8 != math.prod(entry.shape) * BITS[entry.storage_dtype]:
            raise _broken(file, size, f"{entry.name[:100]} does not lie where its header says")
        offset = entry.end
    if offset != size:
        raise _broken(file, size, f"{offset:,} bytes are named in its header")


def _entry(file: Path, name: str, declared: dict[str, Any], base: int) -> Entry:
    begin, end = declared["data_offsets"]
    dtype, shape = declared["dtype"], declared["shape"]
    if dtype not in BITS:
        raise ValueError(f"{name[:60]} is {str(dtype)[:20]}")
    if not isinstance(shape, list) or len(shape) > 8 or not all(type(n) is int and 0 <= n < _MAX_SIDE for n in shape):
        raise ValueError(f"{name[:60]} has an invalid shape")
    if not (type(begin) is int and type(end) is int and 0 <= begin <= end):
        raise ValueError(f"{name[:60]} has invalid offsets")
    return Entry(file, name, dtype, tuple(shape), base + begin, base + end)


def _broken(file: Path, size: int, reason: str) -> BadWeights:
    return BadWeights(
        f"{file.name} ({size:,} bytes) is not a whole safetensors file: {reason}.", hint="Download it again."
    )
