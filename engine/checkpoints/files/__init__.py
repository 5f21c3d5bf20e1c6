"""Container formats: a reader per file and a row here."""

import errno
import stat
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from engine.checkpoints.files import gguf, safetensors
from engine.checkpoints.files.foreign import foreign_format
from engine.checkpoints.files.header import Container, Entry, Header, Shape
from engine.contract import BadWeights

CONTAINERS: tuple[Container, ...] = (safetensors, gguf)

SUFFIXES = tuple(suffix for container in CONTAINERS for suffix in container.SUFFIXES)
"""Of files that may hold weights that are read."""


Found = TypeVar("Found")


def read_regular(file: Path) -> bytes:
    """Read a small file. Raises OSError, also for a pipe."""
    if not stat.S_ISREG(file.stat().st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(file))
    return file.read_bytes()


def read_header(file: Path) -> Header:
    """Read the header of a weights file, cached until the file changes.

    Raises BadWeights, with the reason, for anything but a complete file in one of the containers.
    """
    return _of_unchanged(file, _read)


def cached_by_file(judge: Callable[[Header], Found]) -> Callable[[Path], Found]:
    """Return `judge` for files, cached for many until they change.

    The headers of a large library take too much memory to keep, a verdict on each does not. Raises as `read_header`.
    """

    @lru_cache(maxsize=1 << 14)
    def judge_once(file: Path, size: int, modified: int, changed: int) -> Found | BadWeights:
        found = _read(file, size, modified, changed)
        return found if isinstance(found, BadWeights) else judge(found)

    return lambda file: _of_unchanged(file, judge_once)


def _of_unchanged(file: Path, find: Callable[[Path, int, int, int], Found | BadWeights]) -> Found:
    """Return what a cached function finds, by the file's size and times."""
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise BadWeights(f"{file} is no regular file.")
        found = find(file, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    except PermissionError:
        raise BadWeights(
            f"{file} may not be read by this user.", hint="Change its permissions (chmod u+r) or its owner."
        ) from None
    except OSError as error:
        raise BadWeights(f"{file} cannot be read: {error.strerror}.", hint="Download it again.") from None
    if isinstance(found, BadWeights):
        raise _copied(found)
    return found


@lru_cache(maxsize=256)
def _read(file: Path, size: int, modified: int, changed: int) -> Header | BadWeights:
    """Return the header, or why it is refused.

    Both are kept: each model in a folder asks about every file there.
    """
    try:
        return _read_anew(file, size)
    except BadWeights as error:
        return _copied(error)


def _copied(error: BadWeights) -> BadWeights:
    """Return it without its traceback, which holds all that was read."""
    return BadWeights(error.message, hint=error.hint, fix=error.fix)


def _read_anew(file: Path, size: int) -> Header:
    with file.open("rb") as stream:
        start = stream.read(64)
        stream.seek(0)
        for container in CONTAINERS:
            if container.matches(start, size):
                return container.read(file, size, stream)
        if name := foreign_format(start):
            raise BadWeights(f"{file.name} is {name}.", hint="Get the model as safetensors or GGUF.")
        if file.suffix.lower() in gguf.SUFFIXES:
            raise BadWeights(f"{file.name} ({size:,} bytes) does not begin as GGUF does.", hint="Download it again.")
        return safetensors.read(file, size, stream)


__all__ = [
    "CONTAINERS",
    "SUFFIXES",
    "Container",
    "Entry",
    "Header",
    "Shape",
    "cached_by_file",
    "read_header",
    "read_regular",
]
