"""Answers: facts about files, kept between runs."""

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Answers:
    """Variants named and hashes computed, by file, in one JSON file.

    An answer holds as long as the file's size and time of modification do. Without a path nothing is kept; what
    cannot be read or written is done without, since everything in it can be found out again.
    """

    path: Path | None = None

    def variant(self, file: Path) -> str:
        """Return the variant that the user named for this file, or ""."""
        return str(self._entry(file).get("variant", ""))

    def sha256(self, file: Path) -> str:
        """Return the hash that was computed of this file, or ""."""
        return str(self._entry(file).get("sha256", ""))

    def remember(self, file: Path, **facts: str) -> None:
        """Add facts about a file."""
        if self.path is None:
            return
        with suppress(OSError):
            entries = self._read()
            entries[str(file.resolve())] = self._entry(file) | facts | _stamp(file)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
            temporary.write_text(json.dumps(entries, indent=1))
            temporary.replace(self.path)

    def _entry(self, file: Path) -> dict[str, Any]:
        try:
            entry = self._read().get(str(file.resolve()), {})
            stamp = _stamp(file)
        except OSError:
            return {}
        fresh = isinstance(entry, dict) and all(entry.get(key) == value for key, value in stamp.items())
        return entry if fresh else {}

    def _read(self) -> dict[str, Any]:
        if self.path is None or not self.path.is_file():  # reading a FIFO would wait for ever
            return {}
        try:
            entries = json.loads(self.path.read_text())
        except (OSError, ValueError, RecursionError):
            return {}
        return entries if isinstance(entries, dict) else {}


def _stamp(file: Path) -> dict[str, int]:
    status = file.stat()
    return {"bytes": status.st_size, "modified": status.st_mtime_ns}
