"""The library's SQLite schema and its migrations."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from klein_mcp.errors import RequestError

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
)
"""Each runs once, in order, in its own transaction; a library's version is the number applied."""


def open_database(path: Path) -> sqlite3.Connection:
    """Open the database, created or migrated as needed.

    One process at a time. Raises RequestError for a newer library.
    """
    database = sqlite3.connect(path, timeout=30, check_same_thread=False)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version > len(MIGRATIONS):
        database.close()
        raise RequestError(
            f"The library at {path.parent} was written by a newer klein-mcp (its version {version};"
            f" this one knows {len(MIGRATIONS)}).",
            hint="Update klein-mcp, or set KLEIN_HOME to another folder.",
        )
    for number, script in enumerate(MIGRATIONS[version:], version + 1):
        with exclusively(database):
            for statement in filter(str.strip, script.split(";")):
                database.execute(statement)
            database.execute(f"PRAGMA user_version = {number}")
    return database


@contextmanager
def exclusively(database: sqlite3.Connection) -> Iterator[None]:
    """Hold the library's write lock for one transaction."""
    database.execute("BEGIN IMMEDIATE")
    with database:
        yield
