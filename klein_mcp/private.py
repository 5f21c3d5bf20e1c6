"""Read small files of the data folder, only this user's own."""

import codecs
import errno
import os
import stat
import sys
from functools import cache
from pathlib import Path
from typing import BinaryIO

MAX_BYTES = 4 * 2**20
"""The largest such file of ours is a detached job, about a kilobyte; a configuration is written by hand."""

SHORTEST_TOKEN = 16
"""Characters of a token that is no guess away; one that `serve` makes itself has 43."""

_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def read_private(path: Path) -> bytes:
    """Read a regular file that nobody else may write. Raises OSError.

    A link is followed, as people keep configurations elsewhere; what it leads to is checked.
    """
    descriptor = os.open(path, _FLAGS)  # O_NONBLOCK: a FIFO must not block
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is not a regular file")
        if error := foreign_access(status):
            raise PermissionError(error)
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise OSError(f"it is over {MAX_BYTES // 2**20} MiB")
    return data


_NO_LOG = {errno.ELOOP: "it is a link", errno.ENXIO: "it is not a regular file"}
"""What the flags below refuse, in the words of people instead of the system's."""


def open_log(path: Path, *, append: bool = False) -> BinaryIO:
    """Create or empty a log that only this user can write.

    append: keep what is in it. Raises OSError for a link, a FIFO or another user's file.
    """
    flags = os.O_WRONLY | os.O_CREAT | (os.O_APPEND if append else 0)
    flags |= getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        file = os.fdopen(os.open(path, flags, 0o600), "wb")
    except OSError as exc:
        raise PermissionError(f"{path} cannot be used as a log: {_NO_LOG.get(exc.errno or 0, exc.strerror)}") from None
    status = os.fstat(file.fileno())
    error = foreign_access(status) or ("" if stat.S_ISREG(status.st_mode) else "it is not a regular file")
    if error:
        file.close()
        raise PermissionError(f"{path} cannot be used as a log: {error}")
    if not append:
        file.truncate()
    return file


def read_private_text(path: Path) -> str:
    """Read text with or without a mark. Raises OSError, ValueError."""
    return decode_text(read_private(path))


def decode_text(data: bytes) -> str:
    """Decode UTF-8, or UTF-16 with a byte order mark. Raises ValueError."""
    # Notepad writes a mark in front of UTF-8, PowerShell 5 UTF-16.
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if wide else "utf-8-sig")


def read_token(path: Path) -> str:
    """Return the token in a file.

    Warns if other users may read it. Raises OSError, or ValueError for what can be no token, as it has to fit into a
    header.
    """
    token = read_private_text(path).strip()
    if os.name == "posix" and path.stat().st_mode & 0o044:
        _warn_readable(path)
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(f"a token is one word of at least {SHORTEST_TOKEN} ASCII characters")
    return token


@cache
def _warn_readable(path: Path) -> None:
    """Print one line, once a process.

    The token is read again for each engine that is asked.
    """
    print(f"klein-mcp: other users may read the token in {path}; run: chmod 600 {path}", file=sys.stderr)


def foreign_access(status: os.stat_result) -> str:
    """Return how another user could write this, or ""."""
    if os.name != "posix":
        return ""
    if status.st_uid not in (os.geteuid(), 0):
        return "it belongs to another user"
    if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
        return "every user may write it; run: chmod o-w"
    if status.st_mode & stat.S_IWGRP and status.st_gid != os.getegid():
        return "its group may write it; run: chmod g-w"
    return ""


def is_open_to_others(status: os.stat_result) -> bool:
    """Return whether other users may read or write a file."""
    return os.name == "posix" and bool(status.st_mode & 0o077)


def keeps_private(folder: Path) -> bool:
    """Return whether a new file in `folder` is this user's alone.

    Raises OSError. exFAT and network drives give every file the owner and the mode of their mount.
    """
    import tempfile  # every command imports this module

    with tempfile.TemporaryFile(dir=folder) as file:
        status = os.fstat(file.fileno())
    return not is_open_to_others(status) and not foreign_access(status)


def check_folder(path: Path) -> None:
    """Raise OSError if another user may write into a folder."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError("it is not a folder")
    if error := foreign_access(status):
        raise PermissionError(error)
