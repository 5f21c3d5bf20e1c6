"""TensorReader: reads tensors straight into memory that is theirs."""

from collections.abc import Iterator
from contextlib import ExitStack
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoints.files import Entry
from engine.contract import BadWeights
from engine.memory.device import CopyStream, StreamEvent, has_own_memory, host_memory, stores_fp8

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
}  # fmt: skip
"""The dtypes that a plain tensor of klein may have in a file, and torch's."""

CODE_DTYPES = DTYPES | {"I8": torch.int8, "F8_E8M0": torch.uint8, "I32": torch.int32, "I16": torch.int16}
"""Those that quantised weights, and the small numbers of LoRAs, may have besides."""

_HOST = torch.device("cpu")
_PIECE = 64 << 20
"""Bytes read between two progress events."""
_STAGING = 16 << 20
"""Bytes of a buffer between file and device: it should stay in the processor's cache when only the dtype changes."""


class TensorReader:
    """Reads tensors into memory that is theirs, without needless copies."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._open: dict[Path, FileIO] = {}
        self._closing = ExitStack()
        self._copies = CopyStream(device)
        self._staging_buffers: list[tuple[Tensor, StreamEvent]] = []

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def read(self, entry: Entry, target: Tensor, *, start: int = 0) -> Iterator[int]:
        """Fill a contiguous target, yielding bytes as they are read.

        start: the first element of `entry` that is wanted.
        """
        dtype = CODE_DTYPES[entry.storage_dtype]
        assert target.is_contiguous(), "only whole row ranges are filled"
        flat = target.view(-1)
        offset = entry.begin + start * dtype.itemsize
        if flat.device.type == "cpu" and flat.dtype == dtype:
            for part in flat.split(_PIECE // dtype.itemsize):
                self._fill(entry.file, offset, part)
                offset += part.nbytes
                yield part.nbytes
            return
        for part in flat.split(_STAGING // dtype.itemsize):
            count = part.numel() * dtype.itemsize
            self._read_staged(entry.file, offset, count, dtype, part)
            offset += count
            yield count

    def load(self, entry: Entry) -> Tensor:
        """Read a whole tensor as it is stored.

        It is on the device or, where that has no fp8, in host memory.
        """
        where = self._device if stores_fp8(self._device) else _HOST
        tensor = torch.empty(entry.shape, dtype=CODE_DTYPES[entry.storage_dtype], device=where)
        for _ in self.read(entry, tensor):
            pass
        return tensor

    def _read_staged(self, file: Path, offset: int, count: int, dtype: torch.dtype, target: Tensor) -> None:
        """Read through a small buffer, to a device or another dtype."""
        if not self._staging_buffers:
            # Two where the device copies asynchronously: one is read into while the other is being copied.
            buffers = 2 if has_own_memory(self._device) else 1
            self._staging_buffers = [
                (host_memory((_STAGING,), torch.uint8, self._device), None) for _ in range(buffers)
            ]
        buffer, copied = self._staging_buffers.pop(0)
        self._copies.synchronize(copied)
        self._fill(file, offset, buffer[:count])
        # Without an event that tells when a copy has arrived, wait for it: Metal too would copy behind our back.
        target.copy_(buffer[:count].view(dtype), non_blocking=has_own_memory(self._device))
        self._staging_buffers.append((buffer, self._copies.record_event()))

    def _fill(self, file: Path, offset: int, target: Tensor) -> None:
        stream = self._open.get(file)
        if stream is None:
            stream = self._open[file] = self._closing.enter_context(file.open("rb", buffering=0))
        # An array has the buffer protocol; numpy's stubs say so from Python 3.12 on.
        view = memoryview(target.view(torch.uint8).numpy())  # type: ignore[arg-type]
        stream.seek(offset)
        while view.nbytes:
            count = stream.readinto(view)
            if not count:
                raise BadWeights(f"{file.name} ends while it is being read.", hint="Is it still being written?")
            view = view[count:]
