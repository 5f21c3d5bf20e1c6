"""Copies in memory of an index that cannot be written.

A full disk has no room for SQLite's shared memory, a read-only one no place for it; images can still be listed.
"""

import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from klein_mcp.images.schema import migrate

_PATIENCE = 1.0
"""Seconds to wait for another process that reads in the same way, which takes milliseconds."""


def read_only_copy(path: Path) -> sqlite3.Connection | None:
    """Return a copy that refuses writes, None if unreadable."""
    if not path.exists():
        return None
    for source in (_alone, _shared, _untouched, _elsewhere):
        memory = sqlite3.connect(":memory:", check_same_thread=False)
        with suppress(sqlite3.Error, OSError):
            with source(path) as database:
                database.backup(memory)
            migrate(memory, path)
            memory.execute("PRAGMA query_only = ON")
            return memory
        memory.close()
    return None


@contextmanager
def _alone(path: Path) -> Iterator[sqlite3.Connection]:
    """Open without shared memory, for a full disk that nobody else uses."""
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=_PATIENCE)) as database:
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        yield database


@contextmanager
def _shared(path: Path) -> Iterator[sqlite3.Connection]:
    """Open beside a process that writes."""
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=_PATIENCE)) as database:
        yield database


@contextmanager
def _untouched(path: Path) -> Iterator[sqlite3.Connection]:
    """Open what nobody writes. Raises OSError if changes lie beside it."""
    log = path.with_name(f"{path.name}-wal")
    if log.exists() and log.stat().st_size:
        raise OSError("its last changes are in another file")
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?immutable=1", uri=True)) as database:
        yield database


@contextmanager
def _elsewhere(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a copy of what a process left that died."""
    with tempfile.TemporaryDirectory() as folder:
        for name in (path.name, f"{path.name}-wal"):
            shutil.copyfile(path.with_name(name), Path(folder, name))
        with closing(sqlite3.connect(Path(folder, path.name))) as database:
            yield database
