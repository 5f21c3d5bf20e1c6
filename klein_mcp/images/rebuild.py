"""Rebuild the library's index from its files."""

import time
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from klein_mcp.images import recovery
from klein_mcp.images.index import DATABASE
from klein_mcp.images.library import Store
from klein_mcp.images.schema import BUSY_TIMEOUT, LibraryDamaged


@dataclass(frozen=True, slots=True)
class Repair:
    """Result of a repair. moved: the damaged index, if any."""

    found: int
    added: int
    moved: Path | None
    unreadable: tuple[Path, ...]


def repair(folder: Path) -> Repair:
    """Replace a damaged index and take in unknown files.

    Lineage, prompts and recipes come from the files. Which client made an image is not in them.
    """
    moved = None
    try:
        store = Store(folder)
    except LibraryDamaged:
        moved = _move_away(folder)
        store = Store(folder)
    try:
        return _take_in_files(store, moved)
    finally:
        store.close()


def _move_away(folder: Path) -> Path:
    target = folder / f"{DATABASE}.damaged-{time.strftime('%Y%m%d-%H%M%S')}"
    with FileLock(folder / "open.lock", timeout=BUSY_TIMEOUT):
        (folder / DATABASE).rename(target)
        for suffix in ("-wal", "-shm"):
            (folder / f"{DATABASE}{suffix}").unlink(missing_ok=True)
    return target


def _take_in_files(store: Store, moved: Path | None) -> Repair:
    found = 0
    unreadable, records = [], []
    for path in recovery.orphans(store.files.root):
        found += 1
        if store.recovery.knows_file(path.stem):
            continue
        record = recovery.record_in(path)
        if record is None:
            unreadable.append(path)
            continue
        records.append(record)
    for record in sorted(records, key=lambda record: record.created):  # lists go by the order of rows
        store.recovery.take_in(record)
    return Repair(found, len(records), moved, tuple(unreadable))
