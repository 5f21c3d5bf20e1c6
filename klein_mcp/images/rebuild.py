"""Rebuild the library's index from its files."""

import contextlib
import hashlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock

from klein_mcp.images import recovery
from klein_mcp.images.index import DATABASE
from klein_mcp.images.library import Record, Store
from klein_mcp.images.schema import BUSY_TIMEOUT, LibraryDamaged, LibraryUnwritable


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
    try:
        return _repaired(folder)
    except LibraryDamaged:
        pass
    moved = _move_away(folder)
    return replace(_repaired(folder), moved=moved)


def _repaired(folder: Path) -> Repair:
    """Take in unknown files. Raises LibraryDamaged."""
    with contextlib.closing(Store(folder)) as store:
        store.check()
        store.everything()
        return _take_in_files(store)


def _move_away(folder: Path) -> Path:
    """Move a damaged index away. Raises LibraryUnwritable.

    Processes that have it open follow to the one that is made in its place.
    """
    target = folder / f"{DATABASE}.damaged-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        with FileLock(folder / "open.lock", timeout=BUSY_TIMEOUT):
            (folder / DATABASE).rename(target)
            for suffix in ("-wal", "-shm"):
                (folder / f"{DATABASE}{suffix}").unlink(missing_ok=True)
    except OSError as error:
        raise LibraryUnwritable(
            f"The damaged index {folder / DATABASE} cannot be moved away: {error.strerror or error}.",
            hint="Close the clients, run klein-mcp stop, make its folder writable, then try again.",
        ) from None
    return target


def _take_in_files(store: Store) -> Repair:
    found = 0
    unreadable: list[Path] = []
    records: dict[Path, Record] = {}
    for path in recovery.image_files(store.files.root):
        found += 1
        if store.recovery.knows_file(path.stem):
            continue
        record = _record_in(path)
        if record is None:
            unreadable.append(path)
        else:
            records[path] = record
    settled = list(_settled(store, records))
    for record in sorted(settled, key=lambda record: record.created):  # lists go by the order of rows
        store.recovery.take_in(record)
    return Repair(found, len(records), None, tuple(unreadable))


def _record_in(path: Path) -> Record | None:
    try:
        return recovery.record_in(path)
    except Exception:  # whatever is in one file, the others are taken in
        return None


def _settled(store: Store, records: Mapping[Path, Record]) -> Iterator[Record]:
    """Yield the records, copies of a generated image as opened ones.

    A copy holds the recipe of its original. One that was opened by an older klein-mcp has no mark: the original is
    known by its readable name then, else it is the older file.
    """
    names = dict(_named_files(store))
    originals: dict[str, Path] = {}
    for path in sorted(records, key=lambda path: (names.get(path.stem) != records[path].handle, path.stat().st_mtime)):
        if records[path].tool != "open":
            originals.setdefault(records[path].handle, path)
    for path, record in records.items():
        made = record.provenance or {}
        original = store.original(made)
        named = originals.get(str(made.get("image", "")), path)
        if original is None and named != path:
            original = records[named]
        if original is not None:
            same = recovery.same_recipe(original.provenance, made)
            record = recovery.as_opened(record, path, original if same else None)
        yield replace(record, handle=names.get(path.stem, record.handle))


def _named_files(store: Store) -> Iterator[tuple[str, str]]:
    """Yield SHA-256 and handle of each file with a readable name."""
    for path in store.files.short_path("").parent.glob("*.png"):
        with contextlib.suppress(OSError):
            yield hashlib.sha256(path.read_bytes()).hexdigest(), path.stem
