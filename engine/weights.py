"""Safetensors into modules: read shapes, place every tensor, strictly. A missing, extra or misshapen one is named."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from engine.contract import BadWeights
from engine.device import Placement
from engine.layouts import Place, Table

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tensors:
    """The tensors of one or several safetensors files, by name; nothing is read until asked for.

    where: the file that holds a tensor, and what it is called there.
    """

    files: tuple[Path, ...]
    shapes: dict[str, Shape]
    bytes: dict[str, int]
    where: dict[str, tuple[Path, str]]

    @classmethod
    def open(cls, files: Iterable[Path], rename: Callable[[str], str] = str) -> "Tensors":
        """Read the headers. Raises BadWeights for a file that is not whole safetensors."""
        found = cls(tuple(files), {}, {}, {})
        for file in found.files:
            for raw, entry in _header(file).items():
                if raw == "__metadata__":
                    continue
                begin, end = entry["data_offsets"]
                name = rename(raw)
                found.shapes[name] = tuple(entry["shape"])
                found.bytes[name] = end - begin
                found.where[name] = (file, raw)
        return found

    @classmethod
    def folder(cls, folder: Path) -> "Tensors":
        """All safetensors of a diffusers or transformers folder, sharded or not."""
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            pickles = [file.name for kind in ("*.bin", "*.pt", "*.ckpt") for file in folder.glob(kind)]
            found = f"only {pickles[0]}, which is a pickle and could run code" if pickles else "nothing"
            raise BadWeights(f"No *.safetensors in {folder}: {found}.", hint="Only safetensors are read.")
        index = next(iter(folder.glob("*.safetensors.index.json")), None)
        if index is not None:
            named = set(json.loads(index.read_text())["weight_map"].values())
            if missing := sorted(named - {file.name for file in files}):
                raise BadWeights(f"{folder} lacks {missing[0]}, which its index names.", hint="Download it again.")
            files = [file for file in files if file.name in named]
        return cls.open(files)

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The named tensors, file by file, one in memory at a time."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.where[name][0], []).append(name)
        for file, there in by_file.items():
            with safe_open(file, framework="pt") as tensors:
                for name in there:
                    yield name, tensors.get_tensor(self.where[name][1])

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


def _header(file: Path) -> dict[str, Any]:
    """The JSON header, after checking that the file is as long as it says."""
    size = file.stat().st_size
    try:
        with safe_open(file, framework="pt"):
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            return json.loads(stream.read(length))
    except (SafetensorError, ValueError, KeyError) as error:
        raise BadWeights(
            f"{file.name} ({size:,} bytes) is not a whole safetensors file: {error}.", hint="Download it again."
        ) from None


def fill(
    module: nn.Module,
    tensors: Tensors,
    table: Table,
    placement: Placement,
    *,
    what: str,
    ignore: Callable[[str], bool] = lambda name: False,
) -> Iterator[int]:
    """Fill `module` (made on the meta device) with `tensors`, placed by `table`; yields bytes as they are read.

    what: names the part in errors. ignore: published names that are known and not needed.
    Raises BadWeights for a missing, extra or misshapen tensor, before anything is read.
    """
    ours = dict(_slots(module))
    table = {their: place for their, place in table.items() if place.name in ours}
    _verify(ours, tensors, table, what, ignore)
    filled = {
        name: torch.empty(slot.shape, dtype=placement.dtype, device=placement.device) for name, slot in ours.items()
    }
    for their, tensor in tensors.read(table):
        place = table[their]
        if place.swap:
            tensor = torch.cat(tuple(reversed(tensor.chunk(2))))
        target = _rows(filled[place.name], place)
        target.copy_(tensor.reshape(target.shape))
        yield tensor.nbytes
    for name, tensor in filled.items():
        _put(module, name, tensor)


def _slots(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    for name, buffer in module.named_buffers():
        owner, _, leaf = name.rpartition(".")
        if leaf not in module.get_submodule(owner)._non_persistent_buffers_set:
            yield name, buffer


def _rows(tensor: Tensor, place: Place) -> Tensor:
    return tensor if place.parts == 1 else tensor.tensor_split(place.parts)[place.part]


def _verify(ours: dict[str, Tensor], tensors: Tensors, table: Table, what: str, ignore: Callable[[str], bool]) -> None:
    for their, place in table.items():
        if their not in tensors.shapes:
            raise BadWeights(f"The {what} lacks the tensor {their}.", hint="Download it again.")
        if not _fits(tensors.shapes[their], tuple(_rows(ours[place.name], place).shape)):
            want = tuple(_rows(ours[place.name], place).shape)
            raise BadWeights(f"In the {what}, {their} is {tensors.shapes[their]}; expected {want}.")
    for their in tensors.shapes:
        if their not in table and not ignore(their):
            raise BadWeights(f"The {what} has a tensor klein does not know: {their}.", hint="Is it another model?")
    if unfilled := ours.keys() - {place.name for place in table.values()}:
        raise BadWeights(f"The {what} lacks the tensor {min(unfilled)}.", hint="Download it again.")


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
