"""The image library: records in SQLite, images in files named by content.

An image exists from the moment its row is committed. Its file is written first, into a folder of this process, and is
moved to its final path after the commit. A process that dies between leaves either a file without a row, which the next
start takes in by its own recipe, or a row whose file is still in that folder, which the next start moves.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from klein_mcp.errors import RequestError, UnknownImage, did_you_mean, quote
from klein_mcp.foreign import clean_text
from klein_mcp.images import recovery
from klein_mcp.images.record import ALPHABET, HANDLE_LENGTH, SHEET_SECONDS, Pick, Record, sheet_of
from klein_mcp.images.schema import BUSY_TIMEOUT, LibraryBusy, exclusively, explained, open_database

DATABASE = "library.sqlite3"
MAX_PROMPT = 70_000
"""Characters of a prompt in the index: more than any front end accepts."""

NO_MASKS = """ AND NOT (tool = 'open' AND recipe LIKE '%"mask":true%')"""
"""Leaves out what was opened as a mask; the recipe is compact JSON."""

_COLUMNS = ", ".join(item.name for item in fields(Record) if item.name != "parents")


class Store:
    """An open library, shared by any number of processes and threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = folder / "files"
        self._incoming = folder / "incoming"
        self._lock = threading.RLock()
        # One by one: mkdir(parents=True) gives the mode only to the last. Prompts are private.
        for path in (*reversed(folder.parents[:1]), folder, self._incoming, self.files):
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._landing: Path | None = None
        self._claim: FileLock | None = None
        # One process at a time opens, recovers and claims a folder, which is short work and excludes races.
        self._open_lock = FileLock(folder / "open.lock", timeout=BUSY_TIMEOUT, thread_local=False)
        with self._open_lock:
            self._database = open_database(folder / DATABASE)
        self.recover()

    def close(self) -> None:
        with self._lock:
            self._database.close()
            if self._claim is not None and self._landing is not None:
                shutil.rmtree(self._landing, ignore_errors=True)
                Path(self._claim.lock_file).unlink(missing_ok=True)
                self._claim.release()
                self._claim = self._landing = None

    # -- saving --------------------------------------------------------------------------------------------------

    def new_handle(self) -> str:
        """Return a handle never used before, not even by a deleted image."""
        while True:
            handle = secrets.choice(ALPHABET[8:]) + "".join(secrets.choice(ALPHABET) for _ in range(HANDLE_LENGTH - 1))
            if self._row("SELECT 1 FROM pictures WHERE handle = ?", handle) is None:
                return handle

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

        Raises LibraryBusy if another program holds the index too long; then the next start takes the image in.
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
        with self._lock:
            temporary = self._write_incoming(record, data)
            try:
                with self._explained(), self._database:
                    self._insert(record)
            except LibraryBusy as error:
                recovery.set_aside(self.folder, record, temporary)
                seed = f" with seed {record.recipe['seed']}" if "seed" in record.recipe else ""
                raise LibraryBusy(
                    f"{error.message} The image {record.handle}{seed} is kept and appears once klein-mcp can write.",
                    hint=error.hint,
                ) from None
            self._move(temporary)

    def restore(self, record: Record, data: bytes) -> Record:
        """Put a missing or damaged file back."""
        found = replace(record, file=hashlib.sha256(data).hexdigest(), bytes=len(data))
        with self._lock:
            temporary = self._write_incoming(found, data)
            with self._explained(), self._database:
                self._database.execute(
                    "UPDATE pictures SET file = ?, bytes = ? WHERE handle = ?", (found.file, found.bytes, found.handle)
                )
            self._move(temporary)
        return found

    def _explained(self) -> AbstractContextManager[None]:
        return explained(self.folder / DATABASE)

    def _insert(self, record: Record) -> None:
        values = {item.name: getattr(record, item.name) for item in fields(Record) if item.name != "parents"}
        values["recipe"] = json.dumps(dict(record.recipe), separators=(",", ":"))
        marks = ", ".join(f":{name}" for name in values)
        self._database.execute(f"INSERT INTO pictures ({', '.join(values)}) VALUES ({marks})", values)
        self._database.executemany(
            "INSERT INTO parents (child, position, parent) VALUES (?, ?, ?)",
            [(record.handle, position, parent) for position, parent in enumerate(record.parents)],
        )

    def _write_incoming(self, record: Record, data: bytes) -> Path:
        """Write and sync the file in this process's own folder."""
        path: Path | None = None
        try:
            folder = self._own_folder()
            path = folder / f"{record.file}.png"
            with open(path, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            _sync_folder(folder)
        except OSError as error:
            if path is not None:
                with contextlib.suppress(OSError):  # a half file would take the room that is short
                    path.unlink()
            seed = f" It was made with seed {record.recipe['seed']}." if "seed" in record.recipe else ""
            raise RequestError(
                f"The image cannot be saved in {self.folder}: {error.strerror}.{seed}",
                hint="Free some space (klein-mcp prune), then call again.",
            ) from error
        return path

    def _own_folder(self) -> Path:
        if self._landing is None:
            name = secrets.token_hex(8)
            with self._open_lock:
                claim = FileLock(self._incoming / f"{name}.lock", thread_local=False)
                claim.acquire(timeout=0)
                self._claim, self._landing = claim, self._incoming / name
                self._landing.mkdir()
                _sync_folder(self._incoming)
        return self._landing

    def _move(self, incoming: Path) -> None:
        final = self._file_path(incoming.stem)
        final.parent.mkdir(exist_ok=True)
        # Not synced: if the machine goes down before this move is on the disk, the file is still in the incoming
        # folder, and the next start moves it. The sync was a quarter of a save (7 of 30 ms on a virtual disk).
        os.replace(incoming, final)

    def _file_path(self, name: str) -> Path:
        return self.files / name[:2] / f"{name}.png"

    def recover(self) -> None:
        """Finish the saves and deletions of processes that died during them."""
        with self._lock, self._open_lock:
            for lock in self._incoming.glob("*.lock"):
                claim = FileLock(lock)
                try:
                    claim.acquire(timeout=0)
                except Timeout:
                    continue  # its process is alive
                for incoming in (lock.parent / lock.stem).glob("*"):
                    self._finish(incoming)
                shutil.rmtree(lock.parent / lock.stem, ignore_errors=True)
                lock.unlink(missing_ok=True)
                claim.release()
            self._take_in()
            self._remove_files_of_deleted()

    def _finish(self, incoming: Path) -> None:
        """Move, take in or delete the file of a dead process."""
        if self.knows_file(incoming.stem):
            self._move(incoming)
            return
        record = recovery.record_in(incoming)
        if record is not None and record.tool != "open":  # a foreign file is still where it was opened
            self.take_in(record)
            self._move(incoming)
        else:
            incoming.unlink()

    def take_in(self, record: Record) -> Record:
        """Insert a record, under a new handle if its own is taken."""
        if self.find(record.handle) is not None or not re.fullmatch(rf"[{ALPHABET}]{{{HANDLE_LENGTH}}}", record.handle):
            record = replace(record, handle=self.new_handle())
        with self._lock, self._explained(), self._database:
            self._insert(record)
        return record

    def _take_in(self) -> None:
        """Insert what could not be saved while the index was locked."""
        for record, file in recovery.waiting(self.folder):
            if not self.knows_file(record.file):
                self.take_in(record)
            self._move(file)
            recovery.forget(file)

    def knows_file(self, name: str) -> bool:
        """Return whether an image that is not deleted has this file."""
        return self._row("SELECT 1 FROM pictures WHERE file = ? AND deleted IS NULL", name) is not None

    # -- deleting ------------------------------------------------------------------------------------------------

    def delete(self, handles: Sequence[str]) -> None:
        """Delete files but not records, which keep handles unique."""
        with self._lock:
            with self._explained(), self._database:
                self._database.executemany(
                    "UPDATE pictures SET deleted = ? WHERE handle = ? AND deleted IS NULL",
                    [(time.time(), handle) for handle in handles],
                )
            self._remove_files_of_deleted()
            for handle in handles:
                for path in (self.changes_path(handle), self.short_path(handle)):
                    path.unlink(missing_ok=True)

    def changes_path(self, handle: str) -> Path:
        """Return where the change mask of an edit is stored."""
        return self.folder / "changes" / f"{handle}.png"

    def short_path(self, handle: str) -> Path:
        """Return the readable name of an image's file."""
        return self.folder / "images" / f"{handle}.png"

    def readable_path(self, record: Record) -> Path:
        """Return the readable name, or the file where links are impossible."""
        short, file = self.short_path(record.handle), self.path(record)
        if short.exists():
            return short
        try:
            short.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            short.unlink(missing_ok=True)  # a link whose file was moved
            short.hardlink_to(file)
        except (OSError, NotImplementedError):
            with contextlib.suppress(OSError, NotImplementedError):
                short.symlink_to(file)
        return short if short.exists() else file

    def _remove_files_of_deleted(self) -> None:
        """Unlink files of deleted images and empty their `file` column.

        A process that dies before that leaves the rest to the next recovery.
        """
        with self._explained(), exclusively(self._database):
            for (name,) in self._rows("SELECT DISTINCT file FROM pictures WHERE deleted IS NOT NULL AND file != ''"):
                if self._row("SELECT 1 FROM pictures WHERE file = ? AND deleted IS NULL", name) is None:
                    self._file_path(name).unlink(missing_ok=True)
                self._database.execute("UPDATE pictures SET file = '' WHERE file = ? AND deleted IS NOT NULL", (name,))

    # -- finding -------------------------------------------------------------------------------------------------

    def get(self, handle: str) -> Record:
        """Return a record. Raises UnknownImage, for a deleted image too."""
        record = self.find(handle)
        if record is None:
            raise UnknownImage(
                f"There is no image {quote(handle)}. {did_you_mean(handle, self.handles('', 1000))}",
                hint="list_images shows all.",
            )
        if record.deleted is not None:
            day = time.strftime("%Y-%m-%d", time.gmtime(record.deleted))
            raise UnknownImage(f"The image {handle} was deleted on {day}.", hint="list_images shows the others.")
        return record

    def find(self, handle: str) -> Record | None:
        """Return the record of any handle ever used, or None."""
        row = self._row(f"SELECT {_COLUMNS} FROM pictures WHERE handle = ?", handle)
        return None if row is None else self._record(row)

    def by_pixels(self, pixels: str) -> Record | None:
        """Return the first image of exactly these pixels.

        It is the generated one, if a copy of it was opened later.
        """
        row = self._row(
            f"SELECT {_COLUMNS} FROM pictures WHERE pixels = ? AND deleted IS NULL ORDER BY number LIMIT 1", pixels
        )
        return None if row is None else self._record(row)

    def by_file(self, name: str) -> Record | None:
        """Return the first image whose stored file has this SHA-256."""
        row = self._row(
            f"SELECT {_COLUMNS} FROM pictures WHERE file = ? AND deleted IS NULL ORDER BY number LIMIT 1", name
        )
        return None if row is None else self._record(row)

    def root(self, handle: str) -> str:
        """Return the oldest ancestor along first parents, else the image itself."""
        query = (
            "WITH RECURSIVE line (handle, depth) AS (SELECT ?, 0 UNION ALL"
            " SELECT parent, depth + 1 FROM parents JOIN line ON child = line.handle WHERE position = 0)"
            " SELECT handle FROM line ORDER BY depth DESC LIMIT 1"
        )
        row = self._row(query, handle)
        return handle if row is None else row[0]

    def latest(self, client: str, back: int) -> Record | None:
        """Return the last image `client` generated, or the one `back` before it."""
        row = self._row(
            f"SELECT {_COLUMNS} FROM pictures WHERE client = ? AND tool != 'open' AND deleted IS NULL"
            " ORDER BY number DESC LIMIT 1 OFFSET ?",
            client,
            back,
        )
        return None if row is None else self._record(row)

    def search(
        self, text: str = "", *, limit: int, before: int | None = None, masks: bool = True
    ) -> tuple[list[Record], int | None]:
        """Return matching images, newest first, and where the next page begins.

        A match has every word of `text` in its prompt or source, or is its handle. masks: whether masks count.
        """
        words = [word.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") for word in text.split()]
        has_word = "coalesce(prompt, '') || ' ' || coalesce(source, '') LIKE ? ESCAPE '\\'"
        matches = f"(handle = ? OR {' AND '.join([has_word] * len(words)) or 'TRUE'})"
        rows = self._rows(
            f"SELECT {_COLUMNS}, number FROM pictures WHERE deleted IS NULL AND number < ? AND {matches}"
            f"{'' if masks else NO_MASKS} ORDER BY number DESC LIMIT ?",
            before if before is not None else 2**62,
            text,
            *(f"%{word}%" for word in words),
            limit + 1,
        )
        page = rows[:limit]
        return [self._record(row[:-1]) for row in page], page[-1][-1] if len(rows) > limit else None

    def children(self, handle: str) -> list[Record]:
        """Return the images made directly from this one, oldest first."""
        rows = self._rows(
            f"SELECT {_COLUMNS} FROM pictures WHERE deleted IS NULL"
            " AND handle IN (SELECT child FROM parents WHERE parent = ?) ORDER BY number",
            handle,
        )
        return [self._record(row) for row in rows]

    def siblings(self, record: Record) -> list[Record]:
        """Return the images of the call that made this one."""
        rows = self._rows(
            f"SELECT {_COLUMNS} FROM pictures WHERE deleted IS NULL AND client = ? AND tool = ? AND prompt = ?"
            " AND created BETWEEN ? AND ? ORDER BY number LIMIT 64",
            *(record.client, record.tool, record.prompt),
            *(record.created - SHEET_SECONDS, record.created + SHEET_SECONDS),
        )
        return sheet_of(record, [self._record(row) for row in rows])

    def revision(self) -> tuple[int, int]:
        """Return another value whenever an image was added or deleted."""
        newest, deleted = self._rows("SELECT coalesce(max(number), 0), count(deleted) FROM pictures")[0]
        return newest, deleted

    # -- files outside the library -------------------------------------------------------------------------------

    def note_saved(self, handle: str, path: str) -> None:
        """Remember that an image was written to a file outside the library."""
        with self._lock, self._explained(), self._database:
            self._database.execute("DELETE FROM saves WHERE path = ?", (path,))  # another image was there
            self._database.execute(
                "INSERT INTO saves (image, path, created) VALUES (?, ?, ?)", (handle, path, time.time())
            )

    def saved_files(self, handle: str) -> list[str]:
        """Return the existing files that an image was written to."""
        rows = self._rows("SELECT path FROM saves WHERE image = ? ORDER BY created", handle)
        return [path for (path,) in rows if os.path.exists(path)]

    # -- what a person chose -------------------------------------------------------------------------------------

    def pick(self, client: str, image: str, mask: str | None = None) -> None:
        """Record a person's choice of an image for `client`'s next call."""
        with self._lock, self._database:
            self._database.execute(
                "INSERT OR REPLACE INTO picks (client, image, mask, created) VALUES (?, ?, ?, ?)",
                (client, image, mask, time.time()),
            )

    def picked(self, client: str) -> Pick | None:
        """Return the person's choice, unless `client` has made an image since."""
        row = self._row(
            "SELECT image, mask, reported FROM picks WHERE client = ? AND created >= coalesce((SELECT max(created)"
            " FROM pictures WHERE client = picks.client AND tool != 'open' AND deleted IS NULL), 0)"
            " AND image IN (SELECT handle FROM pictures WHERE deleted IS NULL)",
            client,
        )
        return None if row is None else Pick(row[0], row[1], bool(row[2]))

    def report_pick(self, client: str) -> Pick | None:
        """Return an unreported choice and mark it as reported."""
        with self._lock:
            row = self._row("SELECT image, mask FROM picks WHERE client = ? AND NOT reported", client)
            if row is None:  # nearly always, and a write would wait for whoever holds the index
                return None
            with self._explained(), self._database:
                self._database.execute("UPDATE picks SET reported = 1 WHERE client = ?", (client,))
        return Pick(row[0], row[1], True)

    def picks(self) -> set[str]:
        """Return the handles of all images that are somebody's choice now."""
        clients = [client for (client,) in self._rows("SELECT client FROM picks")]
        return {pick.image for client in clients if (pick := self.picked(client)) is not None}

    def latest_client(self, besides: str) -> str | None:
        """Return the client that made the newest image, leaving one client out."""
        row = self._row(
            "SELECT client FROM pictures WHERE client != ? AND tool != 'open' ORDER BY number DESC LIMIT 1", besides
        )
        return None if row is None else row[0]

    def everything(self) -> list[Record]:
        """Return all images that are not deleted, oldest first."""
        rows = self._rows(f"SELECT {_COLUMNS} FROM pictures WHERE deleted IS NULL ORDER BY number")
        return [self._record(row) for row in rows]

    def handles(self, prefix: str, limit: int) -> list[str]:
        """Return handles with a prefix, newest first, for completions."""
        rows = self._rows(
            "SELECT handle FROM pictures WHERE deleted IS NULL AND substr(handle, 1, ?) = ?"
            " ORDER BY number DESC LIMIT ?",
            len(prefix),
            prefix,
            limit,
        )
        return [row[0] for row in rows]

    def path(self, record: Record) -> Path:
        """Return the path of its file. Raises UnknownImage if it is missing."""
        final = self._file_path(record.file)
        if not final.exists():
            # Committed by a process that has not moved it yet, or died before it could.
            self.recover()
            for path in (final, *self._incoming.glob(f"*/{final.name}")):
                if path.exists():
                    return path
            raise UnknownImage(
                f"The file of {record.handle} is missing: {final}.", hint="Restore it, or generate it again."
            )
        return final

    def read(self, record: Record) -> bytes:
        """Return its file. Raises UnknownImage if it is missing or changed."""
        path = self.path(record)
        try:
            data = _read_file(path)
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
        """Return the image a recipe names, if the recipe is its own.

        A handle alone proves nothing: any file can name one. Seed and time are known only from a file of ours.
        """
        record = self.find(str(recipe.get("image", "")))
        return record if record is not None and _same_recipe(record.provenance, recipe) else None

    def _record(self, row: tuple[Any, ...]) -> Record:
        values = dict(zip(_COLUMNS.split(", "), row, strict=True))
        values["recipe"] = json.loads(values["recipe"])
        parents = self._rows("SELECT parent FROM parents WHERE child = ? ORDER BY position", values["handle"])
        return Record(**values, parents=tuple(parent for (parent,) in parents))

    def _row(self, query: str, *values: Any) -> tuple[Any, ...] | None:
        with self._lock, self._explained():
            return self._database.execute(query, values).fetchone()

    def _rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock, self._explained():
            return self._database.execute(query, values).fetchall()


def _same_recipe(own: Mapping[str, Any] | None, claimed: Mapping[str, Any]) -> bool:
    names = ("image", "seed", "created", "fingerprint")
    return own is not None and all(own.get(name) == claimed.get(name) for name in names)


def _read_file(path: Path) -> bytes:
    """Read a regular file, never a link or a FIFO."""
    flags = os.O_RDONLY | sum(getattr(os, flag, 0) for flag in ("O_NONBLOCK", "O_NOFOLLOW", "O_BINARY"))
    with os.fdopen(os.open(path, flags), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError("it is not a file")
        return file.read()


def _sync_folder(folder: Path) -> None:
    """Make new names in a folder durable, except on Windows."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
