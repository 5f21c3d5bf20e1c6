"""Checkpoint: the files of one model."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from engine.families.klein.variants import Variant


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The file or folder of each component of a model.

    An all-in-one checkpoint is the file of several components.
    """

    variant: Variant
    transformer: Path
    vae: Path
    text_encoder: Path
    tokenizer: Path

    @property
    def parts(self) -> tuple[Path, ...]:
        """Its files and folders, each once."""
        return tuple(dict.fromkeys((self.transformer, self.vae, self.text_encoder, self.tokenizer)))


@dataclass(frozen=True, slots=True)
class FileState:
    """Files, and those in folders, by size and time of modification."""

    paths: tuple[Path, ...]
    files: tuple[tuple[Path, int, int], ...]

    @classmethod
    def of(cls, paths: tuple[Path, ...]) -> "FileState":
        """Return the present state, without files that cannot be looked at."""
        found: list[tuple[Path, int, int]] = []
        for path in paths:
            with suppress(OSError):
                for file in sorted(path.iterdir()) if path.is_dir() else (path,):
                    status = file.stat()
                    found.append((file, status.st_size, status.st_mtime_ns))
        return cls(paths, tuple(found))

    def are_unchanged(self) -> bool:
        """Return whether the files are as they were."""
        return FileState.of(self.paths) == self
