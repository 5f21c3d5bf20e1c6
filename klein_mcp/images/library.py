"""The image library: records in SQLite, images in files named by content.

An image exists from the moment its row is committed. Its file is written first, into a folder of this process, and is
moved to its final path after the commit. A process that dies between leaves either a file without a row, which the next
start takes in by its own recipe, or a row whose file is still in that folder, which the next start moves.
"""

import contextlib
import hashlib
import os
import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from klein_mcp.errors import RequestError, UnknownImage, did_you_mean, quote
from klein_mcp.foreign import clean_text
from klein_mcp.images import recovery
from klein_mcp.images.files import ImageFiles, read_regular_file
from klein_mcp.images.index import COLUMNS, Index
from klein_mcp.images.lineage import Lineage
from klein_mcp.images.picks import Picks
from klein_mcp.images.record import Record
from klein_mcp.images.recovery import Recovery
from klein_mcp.images.schema import BUSY_TIMEOUT, LibraryBusy, LibraryUnwritable, unwritable

MAX_PROMPT = 70_000
"""Characters of a prompt in the index: more than any front end accepts."""

_MOST = 2**62
"""More images than there are; SQLite takes no number of 2**63."""

NO_MASKS = """ AND NOT (tool = 'open' AND recipe LIKE '%"mask":true%')"""
"""Leaves out what was opened as a mask; the recipe is compact JSON."""


class Store:
    """An open library, shared by any number of processes and threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # One by one: mkdir(parents=True) gives the mode only to the last. Prompts are private.
        try:
            for path in (*reversed(folder.parents[:1]), folder):
                path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise LibraryUnwritable(
                f"The data folder {folder.parent} cannot be used: {error.strerror}.",
                hint="Make it writable, or set KLEIN_HOME to a folder that is.",
            ) from None
        # One process at a time opens, recovers and claims a folder, which is short work and excludes races.
        lock = FileLock(folder / "open.lock", timeout=BUSY_TIMEOUT, thread_local=False)
        self.files = ImageFiles(folder, lock)
        self._index = Index(folder, lock)
        self.picks = Picks(self._index)
        self.lineage = Lineage(self._index)
        self.recovery = Recovery(self._index, self.files, lock)
        try:
            self._recover()
        except BaseException:
            self.close()
            raise

    def _recover(self) -> None:
        """Finish what is unfinished, unless the disk lets nothing be written."""
        with contextlib.suppress(LibraryUnwritable, OSError):
            self.recovery.run()

    def _take_in_waiting(self) -> None:
        """Insert what could not be saved while the index was locked."""
        if self.recovery.has_waiting():
            with contextlib.suppress(RequestError, sqlite3.Error, OSError):
                self.recovery.take_in_waiting()

    def close(self) -> None:
        with self._index.lock:
            self._index.close()
            self.files.close()

    # -- saving --------------------------------------------------------------------------------------------------

    def new_handle(self) -> str:
        """Return a handle never used before, not even by a deleted image."""
        return self._index.new_handle()

    def put(
        self,
        data: bytes,
        *,
        handle: str,
        pixels: str,
        size: tuple[int, int],
        client: str,
        tool: str,
        recipe: Mapping[str, Any],
        parents: Sequence[str] = (),
        source: str | None = None,
        prompt: str | None = None,
    ) -> Record:
        """Store the PNG `data` under `handle`, durable when this returns.

        Raises LibraryBusy if another program holds the index too long; then the image is taken in later.
        """
        record = Record(
            handle,
            hashlib.sha256(data).hexdigest(),
            pixels,
            *size,
            len(data),
            time.time(),
            clean_text(client),
            tool,
            source and clean_text(source),
            prompt and clean_text(prompt, MAX_PROMPT),
            recipe,
            tuple(parents),
        )
        self.insert(record, data)
        return record

    def insert(self, record: Record, data: bytes) -> None:
        """Store a file and its record."""
        with self._index.lock:
            temporary = self.files.write(record, data)
            try:
                self._index.insert(record)
            except LibraryBusy as error:
                recovery.set_aside(self.folder, record, temporary)
                seed = f" with seed {record.recipe['seed']}" if "seed" in record.recipe else ""
                raise LibraryBusy(
                    f"{error.message} The image {record.handle}{seed} is kept and appears once klein-mcp can write.",
                    hint=error.hint,
                ) from None
            self.files.move(temporary)
            self._take_in_waiting()

    def restore(self, record: Record, data: bytes) -> Record:
        """Put a missing or damaged file back."""
        found = replace(record, file=hashlib.sha256(data).hexdigest(), bytes=len(data))
        with self._index.lock:
            temporary = self.files.write(found, data)
            self._index.write(
                "UPDATE pictures SET file = ?, bytes = ? WHERE handle = ?", found.file, found.bytes, found.handle
            )
            self.files.move(temporary)
        return found

    # -- deleting ------------------------------------------------------------------------------------------------

    def delete(self, handles: Sequence[str]) -> None:
        """Delete files but not records, which keep handles unique."""
        with self._index.lock:
            try:
                self._mark_deleted(handles)
            except LibraryUnwritable:
                # On a full disk only files give the room that rows need. Dying after this leaves images without a
                # file: they are named as such, and the next prune chooses them again.
                self._delete_files(handles)
                self._mark_deleted(handles)
            self.recovery.finish_deletions()

    def _mark_deleted(self, handles: Sequence[str]) -> None:
        with self._index.transaction():
            for handle in handles:
                self._index.execute(
                    "UPDATE pictures SET deleted = ? WHERE handle = ? AND deleted IS NULL", time.time(), handle
                )

    def _delete_files(self, handles: Sequence[str]) -> None:
        """Delete the files that only these images have. Raises LibraryUnwritable."""
        going = set(handles)
        owners: dict[str, set[str]] = {}
        for handle, file in self._index.rows("SELECT handle, file FROM pictures WHERE deleted IS NULL"):
            owners.setdefault(file, set()).add(handle)
        try:
            for file, holding in owners.items():
                for handle in holding & going:
                    self.files.delete_beside(handle)
                if holding <= going:
                    self.files.delete(file)
        except OSError as error:
            raise unwritable(self._index.path, error) from None

    # -- finding -------------------------------------------------------------------------------------------------

    def get(self, handle: str) -> Record:
        """Return a record. Raises UnknownImage, for a deleted image too."""
        record = self.find(handle)
        if record is None:
            raise UnknownImage(
                f"There is no image {quote(handle)}. {did_you_mean(handle, self.handles('', 1000))}",
                action="list",
            )
        if record.deleted is not None:
            day = time.strftime("%Y-%m-%d", time.gmtime(record.deleted))
            raise UnknownImage(f"The image {handle} was deleted on {day}.", action="list", shows="the others")
        return record

    def find(self, handle: str) -> Record | None:
        """Return the record of any handle ever used, or None."""
        found = self._index.first("handle = ?", handle)
        if found is None and self.recovery.has_waiting():
            self._take_in_waiting()
            found = self._index.first("handle = ?", handle)
        return found

    def by_pixels(self, pixels: str) -> Record | None:
        """Return the first image of exactly these pixels.

        It is the generated one, if a copy of it was opened later.
        """
        return self._index.first("pixels = ? AND deleted IS NULL ORDER BY number LIMIT 1", pixels)

    def by_file(self, name: str) -> Record | None:
        """Return the first image whose stored file has this SHA-256."""
        return self._index.first("file = ? AND deleted IS NULL ORDER BY number LIMIT 1", name)

    def latest(self, client: str, back: int, *, besides: str = "") -> Record | None:
        """Return the last image `client` generated, or the one `back` before it.

        besides: the handle of an image that does not count.
        """
        mine = "client = ? AND tool != 'open' AND deleted IS NULL AND handle != ? ORDER BY number DESC LIMIT 1 OFFSET ?"
        return self._index.first(mine, client, besides, back)

    def search(
        self, text: str = "", *, limit: int, before: int | None = None, masks: bool = True
    ) -> tuple[list[Record], int | None]:
        """Return matching images, newest first, and where the next page begins.

        A match has every word of `text` in its prompt or source, or is its handle. masks: whether masks count.
        """
        text, limit = clean_text(text), min(limit, _MOST)
        matches = "(handle = ? OR has_words(coalesce(prompt, '') || ' ' || coalesce(source, ''), ?))"
        rows = self._index.rows(
            f"SELECT {COLUMNS}, number FROM pictures WHERE deleted IS NULL AND number < ? AND {matches}"
            f"{'' if masks else NO_MASKS} ORDER BY number DESC LIMIT ?",
            _MOST if before is None else min(before, _MOST),
            text,
            text,
            limit + 1,
        )
        page = rows[:limit]
        return [self._index.record(row[:-1]) for row in page], page[-1][-1] if len(rows) > limit else None

    def check(self, *, quick: bool = False) -> None:
        """Raise LibraryDamaged if the index is damaged.

        quick: without comparing its tables with their indexes.
        """
        self._index.check(quick=quick)

    def revision(self) -> tuple[int, int]:
        """Return another value whenever an image was added or deleted."""
        newest, deleted = self._index.rows("SELECT coalesce(max(number), 0), count(deleted) FROM pictures")[0]
        return newest, deleted

    def everything(self) -> list[Record]:
        """Return all images that are not deleted, oldest first."""
        return self._index.all("deleted IS NULL ORDER BY number")

    def handles(self, prefix: str, limit: int) -> list[str]:
        """Return handles with a prefix, newest first, for completions."""
        rows = self._index.rows(
            "SELECT handle FROM pictures WHERE deleted IS NULL AND substr(handle, 1, ?) = ?"
            " ORDER BY number DESC LIMIT ?",
            len(prefix),
            prefix,
            limit,
        )
        return [row[0] for row in rows]

    # -- files outside the library -------------------------------------------------------------------------------

    def note_saved(self, handle: str, path: str) -> None:
        """Remember that an image was written to a file outside the library."""
        with self._index.transaction():
            self._index.execute("DELETE FROM saves WHERE path = ?", path)  # another image was there
            self._index.execute("INSERT INTO saves (image, path, created) VALUES (?, ?, ?)", handle, path, time.time())

    def note_source(self, record: Record, source: str) -> Record:
        """Remember the latest path that an image was opened from.

        Where the index cannot be written, the image can be used all the same.
        """
        found = replace(record, source=clean_text(source))
        if found.source != record.source:
            with contextlib.suppress(RequestError, sqlite3.Error):
                self._index.write("UPDATE pictures SET source = ? WHERE handle = ?", found.source, found.handle)
        return found

    def saved_files(self, handle: str) -> list[str]:
        """Return the existing files that an image was written to."""
        rows = self._index.rows("SELECT path FROM saves WHERE image = ? ORDER BY created", handle)
        return [path for (path,) in rows if os.path.exists(path)]

    # -- the files of images -------------------------------------------------------------------------------------

    def path(self, record: Record) -> Path:
        """Return the path of its file. Raises UnknownImage if it is missing."""
        final = self.files.path(record.file)
        if final.exists():
            return final
        # Committed by a process that has not moved it yet, or died before it could.
        self._recover()
        if (found := self.files.find(record.file)) is None:
            raise UnknownImage(
                f"The file of {record.handle} is missing: {final}.", hint="Restore it, or generate it again."
            )
        return found

    def readable_path(self, record: Record) -> Path:
        """Return the readable name, or the file where links are impossible."""
        return self.files.readable_path(record.handle, self.path(record))

    def read(self, record: Record) -> bytes:
        """Return its file. Raises UnknownImage if it is missing or changed."""
        path = self.path(record)
        try:
            data = read_regular_file(path)
        except OSError as error:
            raise UnknownImage(
                f"The file of {record.handle} cannot be read: {error.strerror or error} ({path}).",
                hint="Restore it, or generate it again.",
            ) from None
        if hashlib.sha256(data).hexdigest() != record.file:
            raise UnknownImage(
                f"The file of {record.handle} was changed since it was saved: {path}.",
                hint="Restore it, or generate it again.",
            )
        return data

    def has_file(self, record: Record) -> bool:
        """Return whether the file of an image exists, without reading it."""
        try:
            return self.path(record).exists()
        except UnknownImage:
            return False

    def is_whole(self, record: Record) -> bool:
        """Return whether the file of an image is there and unchanged."""
        try:
            self.read(record)
        except UnknownImage:
            return False
        return True

    def original(self, recipe: Mapping[str, Any]) -> Record | None:
        """Return the image a recipe names, if the recipe is its own."""
        return self.recovery.original(recipe)
