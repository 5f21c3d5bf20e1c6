"""Recovery of images whose save or deletion was cut off."""

import contextlib
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from engine.contract import MAX_SEED, image_hash
from klein_mcp.errors import BadImage, NotEnoughMemory
from klein_mcp.images.files import ImageFiles
from klein_mcp.images.index import Index
from klein_mcp.images.record import ALPHABET, HANDLE_LENGTH, MEASURED, OPENED, Record

log = logging.getLogger(__name__)

_FOLDER = "unsaved"
_HANDLE = re.compile(rf"[{ALPHABET}]{{{HANDLE_LENGTH}}}")


class Recovery:
    """Finishes the saves and deletions of processes that died during them.

    lock: held by the process that opens, recovers or claims a folder.
    """

    def __init__(self, index: Index, files: ImageFiles, lock: FileLock) -> None:
        self._index = index
        self._files = files
        self._lock = lock

    def run(self) -> None:
        """Finish everything that is unfinished."""
        with self._index.lock, self._lock:
            for incoming in self._files.abandoned():
                self._finish_save(incoming)
            self.take_in_waiting()
            self.finish_deletions()

    def _finish_save(self, incoming: Path) -> None:
        """Move, take in or delete the file of a dead process."""
        if self.knows_file(incoming.stem):
            self._files.move(incoming)
            return
        try:
            record = record_in(incoming)
        except (OSError, NotEnoughMemory):  # the next start tries again
            return
        except Exception:  # no file may keep a library from opening
            log.exception("%s, which another process left, could not be taken in", incoming)
            return
        # A foreign file is still where it was opened, and so is a copy of an image of ours.
        if record is not None and record.tool != "open" and self.original(record.recipe) is None:
            self.take_in(record)
            self._files.move(incoming)
        else:
            incoming.unlink()

    def has_waiting(self) -> bool:
        """Return whether there are images that could not be saved."""
        return any((self._files.folder / _FOLDER).glob("*.png"))

    def take_in_waiting(self) -> None:
        """Insert what could not be saved while the index was locked."""
        with self._index.lock, self._lock:
            for record, file in waiting(self._files.folder):
                if not self.knows_file(record.file):
                    self.take_in(record)
                self._files.move(file)
                forget(file)

    def finish_deletions(self) -> None:
        """Unlink files of deleted images and empty their `file` column.

        A process that dies before that leaves the rest to the next recovery.
        """
        deleted = "SELECT handle, file FROM pictures WHERE deleted IS NOT NULL AND file != ''"
        with self._index.transaction(exclusive=True):
            for handle, name in self._index.rows(deleted):
                self._files.delete_beside(handle)  # its readable name is a link, and would keep the room taken
                if not self.knows_file(name):
                    self._files.delete(name)
                self._index.execute("UPDATE pictures SET file = '' WHERE file = ? AND deleted IS NOT NULL", name)

    def take_in(self, record: Record) -> Record:
        """Insert a record, under a new handle if its own is taken.

        An image that was made from this one is none of its parents, whatever its file claims.
        """
        taken = self._index.first("handle = ?", record.handle) is not None
        if taken or not _HANDLE.fullmatch(record.handle):
            record = replace(record, handle=self._index.new_handle())
        descendants = self._index.rows(
            "WITH RECURSIVE line (handle) AS (SELECT ? UNION SELECT child FROM parents JOIN line"
            " ON parent = line.handle) SELECT handle FROM line",
            record.handle,
        )
        parents = tuple(parent for parent in record.parents if (parent,) not in descendants)
        record = replace(record, parents=parents)
        self._index.insert(record)
        return record

    def original(self, recipe: Mapping[str, Any]) -> Record | None:
        """Return the image a recipe names, if the recipe is its own.

        A handle alone proves nothing: any file can name one. Seed and time are known only from a file of ours.
        """
        record = self._index.first("handle = ?", str(recipe.get("image", "")))
        return record if record is not None and same_recipe(record.provenance, recipe) else None

    def knows_file(self, name: str) -> bool:
        """Return whether an image that is not deleted has this file."""
        return self._index.row("SELECT 1 FROM pictures WHERE file = ? AND deleted IS NULL", name) is not None


def set_aside(folder: Path, record: Record, file: Path) -> None:
    """Keep a file that could not be recorded, with its record."""
    waiting = folder / _FOLDER
    waiting.mkdir(mode=0o700, exist_ok=True)
    note = waiting / f"{file.stem}.json"
    note.write_text(json.dumps(asdict(record)), encoding="utf-8")
    os.replace(file, waiting / file.name)


def waiting(folder: Path) -> Iterator[tuple[Record, Path]]:
    """Yield what was set aside."""
    for note in sorted((folder / _FOLDER).glob("*.json")):
        file = note.with_suffix(".png")
        with contextlib.suppress(OSError, ValueError, TypeError):
            values = json.loads(note.read_text(encoding="utf-8"))
            if file.exists():
                yield Record(**{**values, "parents": tuple(values["parents"])}), file


def forget(file: Path) -> None:
    """Delete the note of a file that was taken in."""
    file.with_suffix(".json").unlink(missing_ok=True)


def record_in(file: Path) -> Record | None:
    """Return the record in a file's recipe, None if not whole.

    A file that was opened is known by its mark, or by a recipe that none of ours is like.
    Raises OSError or NotEnoughMemory, which say nothing about the file.
    """
    from klein_mcp.images import codec

    data = file.read_bytes()
    name = hashlib.sha256(data).hexdigest()
    if name != file.stem:
        return None
    try:
        decoded = codec.decode(data, file.name, None)
    except BadImage:
        return None
    recipe = {name: value for name, value in (decoded.recipe or {}).items() if name not in MEASURED}
    transparent = {} if decoded.alpha is None else {"alpha": True}
    generated = not recipe.pop(OPENED, False) and _is_ours(recipe)
    request = _request(recipe) if generated else {}
    height, width = decoded.image.shape[:2]
    return Record(
        handle=recipe["image"] if generated else "",
        file=name,
        pixels=image_hash(decoded.pixels),
        width=width,
        height=height,
        bytes=len(data),
        created=(_made_at(recipe) if generated else None) or file.stat().st_mtime,
        client="",  # files do not name it
        tool=request["tool"] if generated else "open",
        source=None,
        prompt=(recipe.get("prompt") or request.get("prompt") or None) if generated else None,
        recipe={**(recipe if generated else {"made": recipe} if recipe else {}), **transparent},
        parents=tuple(recipe.get("parents", ())) if generated else (),
    )


_TEXTS = ("seed", "model", "fingerprint", "created", "prompt", "dtype", "mode", "mask", "preserve", "background")
_NUMBERS = ("steps", "guidance", "width", "height", "count", "partials")
_LISTS = {"parents": str, "images": str, "warnings": str, "region": int}
"""Parts of a recipe and of its request, by type; any of them may be missing."""


def _request(recipe: Mapping[str, Any]) -> Any:
    return recipe.get("request") or recipe.get("order")  # "order": as 0.1 wrote it


def _is_ours(recipe: Mapping[str, Any]) -> bool:
    """Return whether a recipe is like those of images made here."""
    match recipe.get("image"), _request(recipe):
        case str(handle), {"tool": str(tool), **request}:
            parents = recipe.get("parents", [])
            return (
                tool != "open"
                and _has_our_types(recipe)
                and _has_our_types(request)
                and handle not in parents
                and all(map(_HANDLE.fullmatch, (handle, *parents)))
            )
    return False


def _has_our_types(values: Mapping[str, Any]) -> bool:
    lists = [(values.get(name, []), kind) for name, kind in _LISTS.items()]
    return (
        all(isinstance(values.get(name, ""), str) for name in _TEXTS)
        and all(isinstance(values.get(name, 0), int | float) for name in _NUMBERS)
        and all(isinstance(each, list) and all(isinstance(item, kind) for item in each) for each, kind in lists)
        and len(values.get("seed", "")) <= len(str(MAX_SEED))
        and len(values.get("region", "four")) == 4
    )


def same_recipe(own: Mapping[str, Any] | None, claimed: Mapping[str, Any]) -> bool:
    """Return whether both describe the making of one image."""
    names = ("image", "seed", "created", "fingerprint")
    return own is not None and all(own.get(name) == claimed.get(name) for name in names)


def as_opened(record: Record, file: Path, original: Record | None) -> Record:
    """Return the record of a file that is an opened copy."""
    return replace(
        record,
        handle="",
        created=file.stat().st_mtime,
        tool="open",
        prompt=None,
        recipe={"made": record.provenance, **({"alpha": True} if record.transparent else {})},
        parents=(original.handle,) if original else (),
    )


def _made_at(recipe: Mapping[str, Any]) -> float | None:
    """Return the time in an image's own recipe, if any."""
    try:
        made = datetime.strptime(str(recipe.get("created")), "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
    except (ValueError, OverflowError):
        return None
    return made if 0 < made <= time.time() else None


def image_files(files: Path) -> Iterator[Path]:
    """Yield the files of a library."""
    yield from (path for path in files.glob("*/*.png") if re.fullmatch("[0-9a-f]{64}", path.stem))
