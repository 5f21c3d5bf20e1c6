"""Atomic writes of small private files."""

import contextlib
import os
from pathlib import Path


def atomic_write(path: Path, text: str) -> None:
    """Replace `path` atomically with mode 600.

    Raises OSError; then the old content is still there, and no temporary file is left.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        # A leftover of a dead process: no other process has our number.
        temporary.unlink(missing_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


write = atomic_write  # until every caller uses the new name
