"""Jobs and their events as bytes, for executors elsewhere.

Frames of a JSON header and raw RGB8.
"""

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from typing import Any

import numpy as np

from engine.contract import (
    Aspect,
    BadWeights,
    Busy,
    ChangeMask,
    DeviceLost,
    EngineError,
    EngineFailed,
    Event,
    Exact,
    Fix,
    InvalidJob,
    Job,
    KeepSource,
    Loading,
    ModelNotFound,
    Native,
    OutOfMemory,
    Queued,
    Result,
    Size,
    Stage,
    Step,
)

Message = Job | Event | EngineError

_PREFIX = struct.Struct("!II")  # bytes of the header, bytes of pixels behind it
_KINDS: dict[str, type] = {kind.__name__: kind for kind in (Job, Queued, Loading, Stage, Step, Result)}
_SIZES: dict[str, type[Size]] = {kind.__name__: kind for kind in (Native, Exact, Aspect, KeepSource)}
_ERRORS: dict[str, type[EngineError]] = {
    kind.__name__: kind
    for kind in (EngineError, InvalidJob, ModelNotFound, BadWeights, OutOfMemory, Busy, EngineFailed, DeviceLost)
}

MAX_FRAME = 512 * 2**20
"""Bytes: ten references of 16 MP, the most a front end lets in, are 480 MB."""


class BadFrame(ValueError):
    """The bytes are not a message of this protocol."""


def encode(message: Message) -> bytes:
    """Write one frame. Raises BadFrame if it would be longer than MAX_FRAME."""
    pixels: list[bytes] = []

    def set_aside(value: object) -> object:
        if isinstance(value, np.ndarray):
            pixels.append(np.ascontiguousarray(value, np.uint8).tobytes())
            return {"rgb8" if value.ndim == 3 else "grey8": value.shape[:2]}
        if isinstance(value, ChangeMask):
            return {"change_mask": _fields(value)}
        if isinstance(value, Size):
            return {"size": {"kind": type(value).__name__, **asdict(value)}}
        if isinstance(value, Mapping):
            return dict(value)
        raise TypeError(f"{type(value).__name__} cannot cross the wire")

    content = {"kind": type(message).__name__, **_fields(message)}
    header = json.dumps(content, default=set_aside, separators=(",", ":")).encode()
    body = b"".join(pixels)
    if len(header) + len(body) > MAX_FRAME:
        raise BadFrame(f"{(len(header) + len(body)) // 2**20} MiB in one message; at most {MAX_FRAME // 2**20}.")
    return _PREFIX.pack(len(header), len(body)) + header + body


def decode(frame: bytes) -> Message:
    """Read the message of exactly one frame. Raises BadFrame."""
    try:
        header_length, body_length = _PREFIX.unpack_from(frame)
        if len(frame) != _PREFIX.size + header_length + body_length:
            raise BadFrame("A frame of another length than it says.")
        pixels = _Pixels(memoryview(frame)[_PREFIX.size + header_length :])
        content = json.loads(frame[_PREFIX.size : _PREFIX.size + header_length], object_hook=pixels.put_back)
        message = _message(content.pop("kind"), content)
    except (struct.error, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as exc:
        raise exc if isinstance(exc, BadFrame) else BadFrame(f"Not a message: {exc}") from exc
    if pixels.left:
        raise BadFrame("More pixels than the header speaks of.")
    return message


class Frames:
    """Cuts a stream of bytes into frames."""

    def __init__(self, limit: int = MAX_FRAME) -> None:
        """limit: bytes of a frame.

        A peer that announces more is refused before it is read.
        """
        self._limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the frames that `data` completes. Raises BadFrame."""
        self._buffer += data
        while len(self._buffer) >= _PREFIX.size:
            length = _PREFIX.size + sum(_PREFIX.unpack_from(self._buffer))
            if length > _PREFIX.size + self._limit:
                raise BadFrame(f"A frame of {length / 2**20:.1f} MiB; at most {self._limit / 2**20:.1f}.")
            if len(self._buffer) < length:
                return
            yield bytes(self._buffer[:length])
            del self._buffer[:length]


class _Pixels:
    """Hands out the raw bytes in the order they were written."""

    def __init__(self, left: memoryview) -> None:
        self.left = left

    def put_back(self, value: dict[str, Any]) -> object:
        if value.keys() == {"change_mask"}:
            return ChangeMask(**_tuples(value["change_mask"]))
        if value.keys() == {"size"} and isinstance(value["size"], dict):
            return _size(value["size"])
        if value.keys() not in ({"rgb8"}, {"grey8"}):
            return value
        ((kind, (height, width)),) = value.items()
        shape = (height, width, 3) if kind == "rgb8" else (height, width)
        size = math.prod(shape)
        if not 0 < size <= len(self.left):
            raise BadFrame("Fewer pixels than the header speaks of.")
        image = np.frombuffer(self.left[:size], np.uint8).reshape(shape)
        self.left = self.left[size:]
        return image


def _size(content: dict[str, Any]) -> Size:
    kind = content.pop("kind")
    if not all(isinstance(number, int) for number in content.values()):
        raise BadFrame("A size that is no number.")
    return _SIZES[kind](**content)


def _tuples(content: dict[str, Any]) -> dict[str, Any]:
    """Turn lists back into tuples, which JSON lacks."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}


def _fields(message: Message | ChangeMask) -> dict[str, Any]:
    if isinstance(message, EngineError):
        return {**vars(message), "fix": message.fix and asdict(message.fix)}
    return {field.name: getattr(message, field.name) for field in fields(message)}


def _message(kind: str, content: dict[str, Any]) -> Message:
    if kind in _ERRORS:
        if fix := content.get("fix"):
            content["fix"] = Fix(**{**fix, "choices": tuple(fix["choices"])})
        return _ERRORS[kind](content.pop("message"), **content)
    return _KINDS[kind](**_tuples(content))
