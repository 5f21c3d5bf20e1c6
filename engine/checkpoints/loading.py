"""Safetensors into modules: every tensor straight to its place, strictly; what is amiss is named."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.checkpoints import quant
from engine.checkpoints.files.safetensors import Entry, Header, Shape
from engine.checkpoints.quant import QuantLinear, Stored
from engine.contract import BadWeights
from engine.families.klein.key_maps import KeyMap, ParamSlice
from engine.memory.device import CopyStream, Device, StreamEvent, has_own_memory, host_memory, stores_fp8

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
}  # fmt: skip
"""The formats that klein's files use, and torch's names for them."""


@dataclass(frozen=True, slots=True)
class Tensors:
    """The tensors of one or several safetensors files, by name; nothing is read until asked for.

    shapes: what is meant, whatever it is stored as. quantised: by the weight's name. absent: files that an index
    names and that are not there, by tensor.
    """

    files: tuple[Path, ...]
    entries: dict[str, Entry]
    shapes: dict[str, Shape]
    quantised: dict[str, Stored]
    absent: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(
        cls, files: Iterable[Path], rename: Callable[[str], str] = str, absent: Mapping[str, str] | None = None
    ) -> "Tensors":
        """Read the headers. Raises BadWeights for a file that is not whole safetensors."""
        headers = [Header.read(file) for file in files]
        entries = {rename(name): entry for header in headers for name, entry in header.entries.items()}
        metadata = {key: value for header in headers for key, value in header.metadata.items()}
        quantised, used = quant.stored_layers(entries, metadata, _small)
        shapes = {name: entry.shape for name, entry in entries.items() if name not in used}
        shapes |= {name: stored.shape for name, stored in quantised.items()}
        return cls(tuple(header.file for header in headers), entries, shapes, quantised, dict(absent or {}))

    @classmethod
    def folder(cls, folder: Path, rename: Callable[[str], str] = str) -> "Tensors":
        """All safetensors of a diffusers or transformers folder, sharded or not."""
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            pickles = [file.name for kind in ("*.bin", "*.pt", "*.ckpt") for file in folder.glob(kind)]
            found = f"only {pickles[0]}, which is a pickle and could run code" if pickles else "nothing"
            raise BadWeights(f"No *.safetensors in {folder}: {found}.", hint="Only safetensors are read.")
        index = next(iter(folder.glob("*.safetensors.index.json")), None)
        if index is None:
            # Beside the whole model there may be a copy in another precision.
            whole = [file for file in files if file.stem in ("model", "diffusion_pytorch_model")]
            return cls.open(whole or files, rename)
        shards = _shards(index)
        there = {file.name for file in files}
        absent = {rename(name): shard for name, shard in shards.items() if shard not in there}
        return cls.open([file for file in files if file.name in set(shards.values())], rename, absent)

    def bytes(self, name: str) -> int:
        """Of a tensor as it lies in its file, scales included."""
        if name in self.quantised:
            return self.quantised[name].bytes
        return self.entries[name].bytes if name in self.entries else 0

    def fingerprint(self) -> str:
        """Tells these weights from others: headers and a sample of every file, not gigabytes of hashing."""
        digest = hashlib.sha256()
        for file in self.files:
            size = file.stat().st_size
            with file.open("rb") as stream:
                for offset in (0, size // 3, size // 2, max(0, size - _SAMPLE)):
                    stream.seek(offset)
                    digest.update(stream.read(_SAMPLE))
            digest.update(str(size).encode())
        return digest.hexdigest()


_SAMPLE = 1 << 20


def _shards(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError, OSError) as problem:
        raise BadWeights(f"{index} makes no sense: {problem}.", hint="Download it again.") from None


def _small(entry: Entry) -> bytes:
    with entry.file.open("rb") as stream:
        stream.seek(entry.begin)
        return stream.read(entry.bytes)


class Reader:
    """Reads tensors straight into memory that is already theirs, without a copy in between where none is needed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._open: dict[Path, FileIO] = {}
        self._closing = ExitStack()
        self._courier = CopyStream(device)
        self._stage: list[tuple[Tensor, StreamEvent]] = []

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def read(self, entry: Entry, into: Tensor, *, start: int = 0) -> Iterator[int]:
        """Fill the contiguous `into` with the elements of `entry` from `start` on; yields bytes as they are read."""
        dtype = DTYPES[entry.format]
        flat = into.reshape(-1) if into.is_contiguous() else _not_contiguous()
        at = entry.begin + start * dtype.itemsize
        if flat.device.type == "cpu" and flat.dtype == dtype:
            for part in flat.split(_PIECE // dtype.itemsize):
                self._fill(entry.file, at, part)
                at += part.nbytes
                yield part.nbytes
            return
        for part in flat.split(_STAGE // dtype.itemsize):
            count = part.numel() * dtype.itemsize
            self._through_stage(entry.file, at, count, dtype, part)
            at += count
            yield count

    def load(self, entry: Entry) -> Tensor:
        """A whole tensor as it is stored: on the device, or in the host's memory where the device knows no fp8."""
        where = self._device if stores_fp8(self._device) else _HOST
        tensor = torch.empty(entry.shape, dtype=DTYPES[entry.format], device=where)
        for _ in self.read(entry, tensor):
            pass
        return tensor

    def _through_stage(self, file: Path, at: int, count: int, dtype: torch.dtype, target: Tensor) -> None:
        """By way of a small buffer, because the target is on a device or in another format."""
        if not self._stage:
            # Two where the device copies by itself: one is read into while the other is on its way.
            buffers = 2 if has_own_memory(self._device) else 1
            self._stage = [(host_memory((_STAGE,), torch.uint8, self._device), None) for _ in range(buffers)]
        buffer, sent = self._stage.pop(0)
        self._courier.settle(sent)
        self._fill(file, at, buffer[:count])
        # Where no mark tells that a copy has arrived, it is waited for: Metal too would copy behind our back.
        target.copy_(buffer[:count].view(dtype), non_blocking=has_own_memory(self._device))
        self._stage.append((buffer, self._courier.mark()))

    def _fill(self, file: Path, at: int, target: Tensor) -> None:
        stream = self._open.get(file)
        if stream is None:
            stream = self._open[file] = self._closing.enter_context(file.open("rb", buffering=0))
        view = memoryview(target.view(torch.uint8).numpy())  # type: ignore[arg-type]
        stream.seek(at)
        while view.nbytes:
            count = stream.readinto(view)
            if not count:
                raise BadWeights(f"{file.name} ends while it is being read.", hint="Is it still being written?")
            view = view[count:]


_HOST = torch.device("cpu")
_PIECE = 64 << 20
"""Bytes read between two words of progress."""
_STAGE = 16 << 20
"""Bytes of a buffer between file and device: it should stay in the processor's cache when only the format changes."""


def _not_contiguous() -> Tensor:
    raise AssertionError("only whole row ranges are filled")


Home = Callable[[str, Shape, torch.dtype], Tensor]
"""(our name, shape, dtype) -> memory for it, uninitialised: where a tensor lives is the memory plan's to say."""


def on(device: torch.device) -> Home:
    """Everything on one device."""
    return lambda name, shape, dtype: torch.empty(shape, dtype=dtype, device=device)


def fill(
    module: nn.Module,
    tensors: Tensors,
    table: KeyMap,
    placement: Device,
    *,
    what: str,
    ignore: Callable[[str], bool] = lambda name: False,
    home: Home | None = None,
) -> Iterator[int]:
    """Fill `module` (made on the meta device) with `tensors`, placed by `table`; yields bytes as they are read.

    what: names the part in errors. ignore: published names that are known and not needed.
    Raises BadWeights for a missing, extra or misshapen tensor, before anything is read.
    """
    home = home or on(placement.device)
    ours = slots(module)
    table = {their: place for their, place in table.items() if place.name in ours}
    _verify(ours, tensors, table, what, ignore)
    pieces: dict[str, list[tuple[str, ParamSlice]]] = {}
    # In the order of the files: a disk, or a network behind it, reads ahead.
    for their in sorted(table, key=lambda name: (tensors.entries[name].file, tensors.entries[name].begin)):
        pieces.setdefault(table[their].name, []).append((their, table[their]))
    with Reader(placement.device) as reader:
        for name, parts in pieces.items():
            yield from _ParamLoader(module, name, ours[name], placement, home).fill(reader, tensors, parts)


@dataclass(frozen=True, slots=True)
class _ParamLoader:
    """One of our tensors, or one quantised layer, and how it is filled."""

    module: nn.Module
    name: str
    shape: Shape
    placement: Device
    home: Home

    def fill(self, reader: Reader, tensors: Tensors, parts: list[tuple[str, ParamSlice]]) -> Iterator[int]:
        owner = self.module.get_submodule(self.name.rpartition(".")[0])
        if not isinstance(owner, QuantLinear):
            tensor = self.home(self.name, self.shape, self.placement.dtype)
            yield from self._widened(tensor, reader, tensors, parts)
            _put(self.module, self.name, tensor)
            return
        their, place = parts[0]
        stored = tensors.quantised.get(their)
        if stored is not None and place.parts == 1 and not place.swap and _same_codes(stored, owner):
            held = {}
            for name, entry in stored.entries.items():
                held[name] = self.home(f"{self.name}:{name}", entry.shape, DTYPES[entry.format])
                yield from reader.read(entry, held[name])
            owner.take(held)
            return
        # Another format than the file's: widened for a moment on the device, one layer at a time.
        tensor = torch.empty(self.shape, dtype=self.placement.dtype, device=self.placement.device)
        yield from self._widened(tensor, reader, tensors, parts)
        owner.take({
            name: self._moved(f"{self.name}:{name}", value) for name, value in quant.ENCODE[owner.kind](tensor).items()
        })  # fmt: skip

    def _moved(self, name: str, value: Tensor) -> Tensor:
        return self.home(name, tuple(value.shape), value.dtype).copy_(value)

    def _widened(
        self, tensor: Tensor, reader: Reader, tensors: Tensors, parts: list[tuple[str, ParamSlice]]
    ) -> Iterator[int]:
        for their, place in parts:
            rows = tensor if place.parts == 1 else tensor.tensor_split(place.parts)[place.part]
            stored = tensors.quantised.get(their)
            if stored is not None:
                codes = {name: reader.load(entry) for name, entry in stored.entries.items()}
                weight = quant.DECODE[stored.kind](codes, tensor.dtype)
                rows.copy_(torch.cat(tuple(reversed(weight.chunk(2)))) if place.swap else weight)
                yield stored.bytes
            elif place.swap:
                first, second = rows.chunk(2)
                yield from reader.read(tensors.entries[their], second)
                yield from reader.read(tensors.entries[their], first, start=second.numel())
            else:
                yield from reader.read(tensors.entries[their], rows)


def _same_codes(stored: Stored, layer: QuantLinear) -> bool:
    scale = stored.entries.get("weight_scale")
    if layer.kind == "fp8":
        one_scale = scale is None or math.prod(scale.shape) == 1
        return stored.kind == "fp8" and one_scale and stored.entries["weight"].format == "F8_E4M3"
    return stored.kind == layer.kind


def slots(module: nn.Module) -> dict[str, Shape]:
    """What has to be filled, by name; a quantised layer counts as the one weight that it means."""
    found: dict[str, Shape] = {}
    for path, owner in module.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(owner, QuantLinear):
            found[f"{prefix}weight"] = (owner.out_features, owner.in_features)
            continue
        found |= {prefix + name: tuple(p.shape) for name, p in owner._parameters.items() if p is not None}
        kept = owner._buffers.items() if owner._buffers else ()
        skipped = owner._non_persistent_buffers_set
        found |= {prefix + name: tuple(b.shape) for name, b in kept if b is not None and name not in skipped}
    return found


def _verify(ours: dict[str, Shape], tensors: Tensors, table: KeyMap, what: str, ignore: Callable[[str], bool]) -> None:
    for their, place in table.items():
        want = _shape(ours[place.name], place)
        if their in tensors.absent:
            raise BadWeights(
                f"The {what} lacks the file {tensors.absent[their]}, which its index names.", hint="Download it again."
            )
        if their not in tensors.shapes:
            raise BadWeights(f"The {what} lacks the tensor {their}.", hint="Download it again.")
        if their not in tensors.quantised and (stored := tensors.entries[their].format) not in DTYPES:
            raise BadWeights(
                f"In the {what}, {their} is stored as {stored}, which is not read; read are {', '.join(DTYPES)}."
            )
        if not _fits(tensors.shapes[their], want):
            raise BadWeights(f"In the {what}, {their} is {tensors.shapes[their]}; expected {want}.")
    for their in tensors.shapes:
        if their not in table and not ignore(their):
            raise BadWeights(f"The {what} has a tensor klein does not know: {their}.", hint="Is it another model?")
    if unfilled := ours.keys() - {place.name for place in table.values()}:
        raise BadWeights(f"The {what} lacks the tensor {min(unfilled)}.", hint="Download it again.")


def _shape(whole: Shape, place: ParamSlice) -> Shape:
    return whole if place.parts == 1 else (whole[0] // place.parts, *whole[1:])


def _fits(theirs: Shape, ours: Shape) -> bool:
    """Equal, or a 1×1 convolution where we keep a matrix."""
    return theirs == ours or theirs == (*ours, 1, 1)


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor
