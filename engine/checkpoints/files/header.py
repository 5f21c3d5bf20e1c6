"""Header and Entry: the tensors that a weights file declares."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor in a file.

    name: as written there. begin, end: byte offsets from the start of the file.
    """

    file: Path
    name: str
    storage_dtype: str
    shape: Shape
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Header:
    """The tensors and the metadata that a file declares."""

    file: Path
    entries: dict[str, Entry]
    metadata: dict[str, str] = field(default_factory=dict)


class Container(Protocol):
    """A container format. A module that has these names is one."""

    SUFFIXES: tuple[str, ...]

    @staticmethod
    def matches(start: bytes, size: int) -> bool:
        """Return whether a file with these first bytes is in this format."""
        ...

    @staticmethod
    def read(file: Path, size: int, stream: BinaryIO) -> Header:
        """Read the header. Raises BadWeights for anything but a complete file."""
        ...
