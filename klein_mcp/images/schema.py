"""The library's SQLite schema and its migrations."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from klein_mcp.atomic import next_step
from klein_mcp.errors import RequestError, ServerFault

BUSY_TIMEOUT = 10
"""Seconds to wait for another program's lock: less than a call may take."""


class LibraryBusy(RequestError):
    """Another program holds the library's lock."""


class LibraryUnwritable(ServerFault):
    """The library cannot be written, as on a full disk."""


def unwritable(path: Path, failure: Exception) -> LibraryUnwritable:
    """Make the error for an index that cannot be written."""
    reason = getattr(failure, "strerror", None) or failure
    return LibraryUnwritable(f"The image library {path} cannot be written: {reason}.", hint=next_step(failure))


class LibraryDamaged(ServerFault):
    """The library's index cannot be read."""


def damaged(path: Path) -> LibraryDamaged:
    """Make the error for an index that cannot be read."""
    return LibraryDamaged(
        f"The index of the image library {path} is damaged; the images are in {path.parent / 'files'}.",
        hint="Run: klein-mcp doctor --repair",
    )


MIGRATIONS = (
    # 1: the first library; its table of images is called pictures
    """
    CREATE TABLE pictures (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        handle TEXT NOT NULL UNIQUE,
        file TEXT NOT NULL,
        pixels TEXT NOT NULL,
        width INTEGER NOT NULL,
        height INTEGER NOT NULL,
        bytes INTEGER NOT NULL,
        created REAL NOT NULL,
        client TEXT NOT NULL,
        tool TEXT NOT NULL,
        source TEXT,
        prompt TEXT,
        recipe TEXT NOT NULL,
        deleted REAL
    );
    CREATE INDEX pictures_by_file ON pictures (file);
    CREATE INDEX pictures_by_pixels ON pictures (pixels);
    CREATE INDEX pictures_by_client ON pictures (client, number);
    CREATE TABLE parents (
        child TEXT NOT NULL REFERENCES pictures (handle),
        position INTEGER NOT NULL,
        parent TEXT NOT NULL,
        PRIMARY KEY (child, position)
    ) WITHOUT ROWID;
    CREATE INDEX parents_by_parent ON parents (parent);
    """,
    # 2: an image, and where wanted a mask, that a person chose for a client
    """
    CREATE TABLE picks (
        client TEXT PRIMARY KEY,
        image TEXT NOT NULL,
        mask TEXT,
        created REAL NOT NULL,
        reported INTEGER NOT NULL DEFAULT 0
    ) WITHOUT ROWID;
    """,
    # 3: the files that images were saved to
    """
    CREATE TABLE saves (
        image TEXT NOT NULL,
        path TEXT NOT NULL,
        created REAL NOT NULL,
        PRIMARY KEY (image, path)
    ) WITHOUT ROWID;
    """,
    # 4: the newest image when a person chose one, as clocks are set back; no image is its own parent
    """
    ALTER TABLE picks ADD COLUMN newest INTEGER;
    DELETE FROM parents WHERE child = parent;
    """,
)
"""Each runs once, in order, in its own transaction; a library's version is the number applied."""


def open_database(path: Path) -> sqlite3.Connection:
    """Open the database, created or migrated as needed.

    One process at a time. Raises ServerFault for a newer library.
    """
    with explained(path):
        return _opened(path)


def _opened(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=BUSY_TIMEOUT, check_same_thread=False)
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        migrate(database, path)
    except BaseException:
        database.close()
        raise
    return database


def migrate(database: sqlite3.Connection, path: Path) -> None:
    """Bring the schema up to date. Raises ServerFault for a newer library."""
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version > len(MIGRATIONS):
        raise ServerFault(
            f"The library at {path.parent} was written by a newer klein-mcp (its version {version};"
            f" this one knows {len(MIGRATIONS)}).",
            hint="Update klein-mcp, or set KLEIN_HOME to another folder.",
        )
    for number, script in enumerate(MIGRATIONS[version:], version + 1):
        with exclusively(database):
            for statement in filter(str.strip, script.split(";")):
                database.execute(statement)
            database.execute(f"PRAGMA user_version = {number}")


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn errors of SQLite into LibraryBusy, LibraryDamaged or LibraryUnwritable."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # without its extension
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise LibraryBusy(
                f"Another program holds the image library {path} for more than {BUSY_TIMEOUT} s.",
                hint="End it, then try again.",
            ) from None
        # Python's own error for bytes that are no text has no code.
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or str(error).startswith("Could not decode"):
            raise damaged(path) from None
        if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
            raise unwritable(path, error) from None
        raise


@contextmanager
def exclusively(database: sqlite3.Connection) -> Iterator[None]:
    """Hold the library's write lock for one transaction."""
    database.execute("BEGIN IMMEDIATE")
    with database:
        yield
