"""Small files that are there whole or not at all, for their owner alone."""

import contextlib
import os
from pathlib import Path


def write(path: Path, text: str) -> None:
    """Raises OSError; then what stood at `path` still does, and nothing lies beside it."""
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        # Whatever lies there is nobody's: no other process has our number.
        beside.unlink(missing_ok=True)
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
        beside.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise
