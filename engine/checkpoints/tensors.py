"""Tensors: the tensors of one or several files by name, unread."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from engine.checkpoints import quant
from engine.checkpoints.files import Entry, Shape, read_header, read_regular
from engine.checkpoints.quant import StoredWeight
from engine.contract import BadWeights

Rename = Callable[[str], str]
"""Name in the file -> name that a key map knows; "" for a tensor of another component or a leftover."""

_MAX_MARKER = 1 << 16
_SAMPLE = 1 << 20


@dataclass(frozen=True, slots=True)
class Tensors:
    """The tensors of one or several files, by name.

    shapes: of what is meant, whatever it is stored as. quantised: by the weight's name. absent: files that an index
    names and that are not there, by tensor.
    """

    files: tuple[Path, ...]
    entries: dict[str, Entry]
    shapes: dict[str, Shape]
    quantised: dict[str, StoredWeight]
    absent: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, files: Iterable[Path], rename: Rename = str, absent: Mapping[str, str] | None = None) -> "Tensors":
        """Read the headers. Raises BadWeights for a file that is not complete."""
        headers = [read_header(file) for file in files]
        entries: dict[str, Entry] = {}
        for header in headers:
            for name, entry in header.entries.items():
                ours = rename(name)
                if ours and ours in entries:
                    raise BadWeights(f"{header.file.name} has {ours} twice: as {entries[ours].name} and as {name}.")
                if ours:
                    entries[ours] = entry
        # Layers are named as the tensors of their file are, or without the prefix of those.
        markers = {
            ours: marker
            for header in headers
            for layer, marker in quant.declared_markers(header.metadata).items()
            if (ours := rename(f"{layer}.weight").removesuffix(".weight"))
        }
        quantised, used = quant.quantised_weights(entries, markers, _read_marker)
        shapes = {name: entry.shape for name, entry in entries.items() if name not in used}
        shapes |= {name: stored.shape for name, stored in quantised.items()}
        return cls(tuple(header.file for header in headers), entries, shapes, quantised, dict(absent or {}))

    @classmethod
    def folder(cls, folder: Path, rename: Rename = str) -> "Tensors":
        """Open all safetensors of a diffusers or transformers folder, sharded or not."""
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            pickles = [file.name for kind in ("*.bin", "*.pt", "*.ckpt") for file in folder.glob(kind)]
            found = f"only {pickles[0]}, which is a pickle and could run code" if pickles else "nothing"
            raise BadWeights(f"No *.safetensors in {folder}: {found}.", hint="Only safetensors are read.")
        index = next(iter(folder.glob("*.safetensors.index.json")), None)
        if index is None:
            # Beside the whole model there may be a copy in another precision.
            named = [file for file in files if file.stem in ("model", "diffusion_pytorch_model")]
            return cls.open(named or files, rename)
        shards = _shards(index)
        available = {file.name for file in files}
        absent = {rename(name): shard for name, shard in shards.items() if shard not in available}
        return cls.open([file for file in files if file.name in set(shards.values())], rename, absent)

    def bytes(self, name: str) -> int:
        """Bytes of a tensor in its file, scales included."""
        if name in self.quantised:
            return self.quantised[name].bytes
        return self.entries[name].bytes if name in self.entries else 0

    def fingerprint(self) -> str:
        """Hash headers and samples of every file, not gigabytes."""
        digest = hashlib.sha256()
        for file in self.files:
            size = file.stat().st_size
            with file.open("rb") as stream:
                for offset in (0, size // 3, size // 2, max(0, size - _SAMPLE)):
                    stream.seek(offset)
                    digest.update(stream.read(_SAMPLE))
            digest.update(str(size).encode())
        return digest.hexdigest()


def _shards(index: Path) -> dict[str, str]:
    try:
        return {str(name): str(shard) for name, shard in json.loads(read_regular(index))["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        reason = " ".join(str(error).split())[:100]
        raise BadWeights(f"{index} makes no sense: {reason}.", hint="Download it again.") from None


def _read_marker(entry: Entry) -> bytes:
    if entry.bytes > _MAX_MARKER:
        raise ValueError(f"{entry.name} is {entry.bytes:,} bytes long")
    with entry.file.open("rb") as stream:
        stream.seek(entry.begin)
        return stream.read(entry.bytes)
