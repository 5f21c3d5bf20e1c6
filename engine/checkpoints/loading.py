"""Load tensors into modules, strictly, each straight to its place."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.checkpoints.files import Shape
from engine.checkpoints.key_map import KeyMap, ParamSlice
from engine.checkpoints.narrow import held_dtype
from engine.checkpoints.quant import MEMORY_SCHEMES, QuantLinear, StoredWeight, shape_of
from engine.checkpoints.reader import CODE_DTYPES, DTYPES, TensorReader
from engine.checkpoints.tensors import Tensors
from engine.contract import BadWeights
from engine.memory.device import Device

Allocator = Callable[[str, Shape, torch.dtype], Tensor]
"""(our name, shape, dtype) -> uninitialised memory for it: the placement plan says where each tensor goes."""

_DECODED_AT_ONCE = 1 << 22
"""Weights decoded at once: 16 MB in fp32, so that the intermediates stay small and in the processor's cache."""


def allocate_on(device: torch.device) -> Allocator:
    """Allocate everything on one device."""
    return lambda name, shape, dtype: torch.empty(shape, dtype=dtype, device=device)


def load_into(
    module: nn.Module,
    tensors: Tensors,
    key_map: KeyMap,
    device: Device,
    *,
    what: str,
    ignore: Callable[[str], bool] = lambda name: False,
    allocate: Allocator | None = None,
) -> Iterator[int]:
    """Fill a module, yielding bytes as they are read.

    what: names the component in errors. ignore: names that are known and not needed.
    Raises BadWeights for a missing, extra or misshapen tensor, before anything is read.
    """
    allocate = allocate or allocate_on(device.device)
    shapes = param_shapes(module)
    key_map = {source: place for source, place in key_map.items() if place.name in shapes}
    check_tensors(module, tensors, key_map, what, ignore)
    pieces: dict[str, list[tuple[str, ParamSlice]]] = {}
    # In the order of the files: a disk, or a network behind it, reads ahead.
    for source in sorted(key_map, key=lambda name: (tensors.entries[name].file, tensors.entries[name].begin)):
        pieces.setdefault(key_map[source].name, []).append((source, key_map[source]))
    with TensorReader(device.device) as reader:
        for name, parts in pieces.items():
            yield from _ParamLoader(module, name, shapes[name], device, allocate, what).load(reader, tensors, parts)


@dataclass(frozen=True, slots=True)
class _ParamLoader:
    """Loads one of our parameters, or one quantised layer."""

    module: nn.Module
    name: str
    shape: Shape
    device: Device
    allocate: Allocator
    what: str

    def load(self, reader: TensorReader, tensors: Tensors, parts: list[tuple[str, ParamSlice]]) -> Iterator[int]:
        owner = self.module.get_submodule(self.name.rpartition(".")[0])
        if not isinstance(owner, QuantLinear):
            tensor = self.allocate(self.name, self.shape, held_dtype(owner, self.device.dtype))
            yield from self._widen(tensor, reader, tensors, parts)
            self._check_finite(tensor)
            _assign(self.module, self.name, tensor)
            return
        scheme = MEMORY_SCHEMES[owner.scheme]
        source, place = parts[0]
        stored = tensors.quantised.get(source)
        if stored is not None and place.parts == 1 and not place.swap and scheme.keeps(stored):
            codes = {}
            for name, entry in stored.entries.items():
                codes[name] = self.allocate(f"{self.name}:{name}", entry.shape, CODE_DTYPES[entry.storage_dtype])
                yield from reader.read(entry, codes[name])
                self._check_finite(codes[name])
            owner.load_tensors(codes)
            return
        # Another scheme than the file's: widened for a moment on the device, one layer at a time.
        tensor = torch.empty(self.shape, dtype=self.device.dtype, device=self.device.device)
        yield from self._widen(tensor, reader, tensors, parts)
        self._check_finite(tensor)
        owner.load_tensors({
            name: self._moved(f"{self.name}:{name}", value) for name, value in scheme.encode(tensor).items()
        })  # fmt: skip

    def _check_finite(self, tensor: Tensor) -> None:
        if not is_finite(tensor):
            raise BadWeights(f"In the {self.what}, {self.name} has numbers that are not finite.", hint=_DAMAGED)

    def _moved(self, name: str, value: Tensor) -> Tensor:
        return self.allocate(name, tuple(value.shape), value.dtype).copy_(value)

    def _widen(
        self, tensor: Tensor, reader: TensorReader, tensors: Tensors, parts: list[tuple[str, ParamSlice]]
    ) -> Iterator[int]:
        for source, place in parts:
            rows = tensor if place.parts == 1 else tensor.tensor_split(place.parts)[place.part]
            # The halves change places where they are written: first and second half of the file, then of our rows.
            halves = tuple(reversed(rows.chunk(2))) if place.swap else (rows,)
            stored = tensors.quantised.get(source)
            begin = 0
            for target in halves:
                if stored is None:
                    columns = target[0].numel() if target.ndim else 1
                    yield from reader.read(tensors.entries[source], target, start=begin * columns)
                elif stored.by_rows:
                    yield from _decode_rows(stored, reader, target, begin)
                begin += len(target) if target.ndim else 1
            if stored is not None and not stored.by_rows:
                codes = {name: reader.load(entry) for name, entry in stored.entries.items()}
                weight = stored.scheme.decode(codes, tensor.dtype, stored.options)
                for target, source_rows in zip(halves, weight.chunk(len(halves)), strict=True):
                    target.copy_(source_rows)
                yield stored.bytes


_DAMAGED = "The file is damaged, or its conversion failed: take another."


def is_finite(tensor: Tensor) -> bool:
    """Return whether all numbers are finite, without a copy."""
    if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel() or tensor.itemsize == 1:
        # Codes of one byte would have to be widened for it; their scales are looked at, and the latent at the end.
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _decode_rows(stored: StoredWeight, reader: TensorReader, target: Tensor, offset: int) -> Iterator[int]:
    """Decode rows into `target`, some at a time, without a second copy."""
    for begin, end in stored.pieces(_DECODED_AT_ONCE):
        first, last = max(begin, offset), min(end, offset + len(target))
        if first < last:
            entries = stored.rows(first, last)
            codes = {name: reader.load(entry) for name, entry in entries.items()}
            target[first - offset : last - offset].copy_(stored.scheme.decode(codes, target.dtype, stored.options))
            # A scale of the whole matrix is read for every piece, and counts once.
            yield sum(e.bytes for name, e in entries.items() if first == 0 or e is not stored.entries[name])


def param_shapes(module: nn.Module) -> dict[str, Shape]:
    """Return the shape of every parameter and buffer to load.

    A quantised layer counts as the one weight that it means.
    """
    found: dict[str, Shape] = {}
    for path, owner in module.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(owner, QuantLinear):
            found[f"{prefix}weight"] = shape_of(owner)
            continue
        found |= {prefix + name: tuple(p.shape) for name, p in owner._parameters.items() if p is not None}
        skipped = owner._non_persistent_buffers_set
        buffers = owner._buffers.items() if owner._buffers else ()
        found |= {prefix + name: tuple(b.shape) for name, b in buffers if b is not None and name not in skipped}
    return found


def check_tensors(
    module: nn.Module, tensors: Tensors, key_map: KeyMap, what: str, ignore: Callable[[str], bool]
) -> None:
    """Raise BadWeights for a missing, extra, misshapen or unreadable tensor."""
    shapes = param_shapes(module)
    key_map = {source: place for source, place in key_map.items() if place.name in shapes}
    for source, place in key_map.items():
        expected = _part_shape(shapes[place.name], place)
        if source in tensors.absent:
            raise BadWeights(
                f"The {what} lacks the file {tensors.absent[source]}, which its index names.", hint="Download it again."
            )
        if source not in tensors.shapes:
            raise BadWeights(f"The {what} lacks the tensor {source}.", hint="Download it again.")
        if source not in tensors.quantised and (stored := tensors.entries[source].storage_dtype) not in DTYPES:
            raise BadWeights(
                f"In the {what}, {source} is stored as {stored}, which is not read; read are {', '.join(DTYPES)}."
            )
        if not _shape_matches(tensors.shapes[source], expected):
            raise BadWeights(f"In the {what}, {source} is {tensors.shapes[source]}; expected {expected}.")
    for source in tensors.shapes:
        if source not in key_map and not ignore(source):
            raise BadWeights(
                f"The {what} has a tensor klein does not know: {source[:100]}.", hint="Is it another model?"
            )
    if missing := shapes.keys() - {place.name for place in key_map.values()}:
        raise BadWeights(f"The {what} lacks the tensor {min(missing)}.", hint="Download it again.")


def _part_shape(shape: Shape, place: ParamSlice) -> Shape:
    return shape if place.parts == 1 else (shape[0] // place.parts, *shape[1:])


def _shape_matches(found: Shape, expected: Shape) -> bool:
    """Return whether they are equal, or a 1×1 convolution and a matrix."""
    return found == expected or found == (*expected, 1, 1)


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor
