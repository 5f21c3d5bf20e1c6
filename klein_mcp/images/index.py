"""The library's index: records of images in SQLite."""

import contextlib
import json
import secrets
import sqlite3
import threading
import time
import unicodedata
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from klein_mcp.images.record import ALPHABET, HANDLE_LENGTH, Record
from klein_mcp.images.schema import (
    LibraryBusy,
    LibraryUnwritable,
    damaged,
    exclusively,
    explained,
    open_database,
    unwritable,
)
from klein_mcp.images.snapshot import read_only_copy

DATABASE = "library.sqlite3"

COLUMNS = ", ".join(item.name for item in fields(Record) if item.name != "parents")
"""Columns of an image's row, in the order that `Index.record` reads."""


RETRY = 1.0
"""Seconds between looks at whether an index that could not be written can be now; a write looks at once."""


class Index:
    """An open index, shared by any number of processes and threads.

    lock: held for each query, and by a caller whose steps belong together.
    opening: held by the process that opens a folder. Where the index cannot be written, a copy in memory is read.
    An index that a repair put in place of this one is followed.
    """

    def __init__(self, folder: Path, opening: FileLock) -> None:
        self.path = folder / DATABASE
        self.lock = threading.RLock()
        self._opening = opening
        self._tried = time.monotonic()
        self._obstacle: LibraryUnwritable | None = None
        self._file: tuple[int, int] | None = None
        try:
            self._database = self._open()
        except LibraryUnwritable as error:
            copied = read_only_copy(self.path)
            if copied is None:
                raise
            self._database, self._obstacle = _with_functions(copied), error

    def _open(self) -> sqlite3.Connection:
        try:
            with self._opening:
                database = open_database(self.path)
                self._file = _identity(self.path)
                return _with_functions(database)
        except Timeout:
            raise LibraryBusy(
                f"Another program is opening the image library {self.path}.", hint="End it, then try again."
            ) from None
        except OSError as error:
            raise unwritable(self.path, error) from None

    def _refresh(self, patience: float) -> None:
        """Leave a copy that is needed no more, and a replaced index.

        patience: seconds since the last look at whether the index can be written.
        """
        if self._obstacle is None:
            # A missing one is a disk that is not there: a new index would be an empty library.
            found = _identity(self.path)
            if found not in (None, self._file) and not self._database.in_transaction:
                replaced, self._database = self._database, self._open()
                replaced.close()
            return
        if time.monotonic() - self._tried < patience:
            return
        self._tried = time.monotonic()
        try:
            copied, self._database = self._database, self._open()
        except LibraryUnwritable as error:
            self._obstacle = error
            return
        self._obstacle = None
        copied.close()

    def close(self) -> None:
        with self.lock:
            self._database.close()

    def row(self, query: str, *values: Any) -> tuple[Any, ...] | None:
        """Return the first row of a query, or None."""
        with self.lock, explained(self.path):
            self._refresh(RETRY)
            return self._database.execute(query, values).fetchone()

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """Return all rows of a query."""
        with self.lock, explained(self.path):
            self._refresh(RETRY)
            return self._database.execute(query, values).fetchall()

    def first(self, condition: str, *values: Any) -> Record | None:
        """Return the first image that meets an SQL condition, or None."""
        row = self.row(f"SELECT {COLUMNS} FROM pictures WHERE {condition}", *values)
        return None if row is None else self.record(row)

    def all(self, condition: str, *values: Any) -> list[Record]:
        """Return the images that meet an SQL condition."""
        return [self.record(row) for row in self.rows(f"SELECT {COLUMNS} FROM pictures WHERE {condition}", *values)]

    def record(self, row: tuple[Any, ...]) -> Record:
        """Return the record of a row of COLUMNS, with its parents."""
        values = dict(zip(COLUMNS.split(", "), row, strict=True))
        try:
            values["recipe"] = json.loads(values["recipe"])
        except ValueError:
            raise damaged(self.path) from None
        parents = self.rows("SELECT parent FROM parents WHERE child = ? ORDER BY position", values["handle"])
        return Record(**values, parents=tuple(parent for (parent,) in parents))

    def check(self, *, quick: bool = False) -> None:
        """Raise LibraryDamaged if SQLite finds a fault.

        quick: without comparing tables with their indexes.
        """
        if self.rows(f"PRAGMA {'quick_check' if quick else 'integrity_check'}(1)") != [("ok",)]:
            raise damaged(self.path)

    def new_handle(self) -> str:
        """Return a handle never used before, not even by a deleted image."""
        while True:
            handle = secrets.choice(ALPHABET[8:]) + "".join(secrets.choice(ALPHABET) for _ in range(HANDLE_LENGTH - 1))
            if self.row("SELECT 1 FROM pictures WHERE handle = ?", handle) is None:
                return handle

    @contextlib.contextmanager
    def transaction(self, *, exclusive: bool = False) -> Iterator[None]:
        """Commit what is written inside, or nothing if it raises.

        exclusive: whether other programs are kept from writing from the start on, not from the first change on.
        """
        with self.lock, explained(self.path):
            self._refresh(0)
            if self._obstacle is not None:  # the copy would only say that it is one
                raise LibraryUnwritable(self._obstacle.message, hint=self._obstacle.hint)
            with exclusively(self._database) if exclusive else self._database:
                yield

    def write(self, statement: str, *values: Any) -> None:
        """Run a statement in a transaction of its own."""
        with self.transaction():
            self.execute(statement, *values)

    def execute(self, statement: str, *values: Any) -> int:
        """Run a statement in the transaction of the caller.

        Returns the number of rows it changed.
        """
        return self._database.execute(statement, values).rowcount

    def insert(self, record: Record) -> None:
        """Add an image, in a transaction of its own."""
        values = {item.name: getattr(record, item.name) for item in fields(Record) if item.name != "parents"}
        values["recipe"] = json.dumps(dict(record.recipe), separators=(",", ":"))
        marks = ", ".join(f":{name}" for name in values)
        with self.transaction():
            self._database.execute(f"INSERT INTO pictures ({', '.join(values)}) VALUES ({marks})", values)
            self._database.executemany(
                "INSERT INTO parents (child, position, parent) VALUES (?, ?, ?)",
                [(record.handle, position, parent) for position, parent in enumerate(record.parents)],
            )


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what tells a file from a later one, or None."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _has_words(text: str, words: str) -> bool:
    """Return whether a text has all words, whatever their letter case."""
    text = _folded(text)
    return all(word in text for word in _folded(words).split())


def _folded(text: str) -> str:
    return text.lower() if text.isascii() else unicodedata.normalize("NFC", text.casefold())


def _with_functions(database: sqlite3.Connection) -> sqlite3.Connection:
    """Give a connection the functions that queries call."""
    database.create_function("has_words", 2, _has_words, deterministic=True)
    return database
