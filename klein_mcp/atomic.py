"""Atomic writes: all bytes of a file are there, or none."""

import contextlib
import errno
import os
import secrets
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

_DIRECTORY = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
_HAS_DIR_FD = {os.open, os.mkdir, os.stat, os.rename, os.link, os.unlink} <= os.supports_dir_fd


_SQLITE_FULL, _SQLITE_READONLY = 13, 8
"""As in sqlite3, which most processes that write a file do not import."""


def next_step(failure: object, place: str = "its folder") -> str:
    """Return what helps after a failed write: room, rights, or either.

    failure: of the operating system or of SQLite, whose other errors do not say which.
    """
    number = getattr(failure, "errno", None)
    code = getattr(failure, "sqlite_errorcode", 0) & 0xFF  # without its extension
    if number in (errno.ENOSPC, errno.EDQUOT) or code == _SQLITE_FULL:
        return "Free some space (klein-mcp prune), then try again."
    if number in (errno.EACCES, errno.EPERM, errno.EROFS) or code == _SQLITE_READONLY:
        return f"Make {place} writable, or set KLEIN_HOME to a folder that is."
    return f"Free some space (klein-mcp prune), or make {place} writable."


def atomic_write(path: Path, text: str, *, durable: bool = False) -> None:
    """Replace a small file of the data folder atomically with mode 600.

    durable: survives the machine going down, for what was promised. Raises OSError; then the old content is still
    there, and no temporary file is left.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        # A leftover of a dead process: no other thread has our numbers.
        temporary.unlink(missing_ok=True)
        with os.fdopen(os.open(temporary, _NEW, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
        if durable and os.name == "posix":
            with _opened(path.parent) as folder:
                os.fsync(folder)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_new_or_replace(root: Path, target: Path, data: bytes, *, overwrite: bool) -> None:
    """Write `target` below the folder `root`, safe against exchanged folders.

    Missing folders are made. An existing file keeps its mode. Raises OSError, FileExistsError without `overwrite`.
    """
    if not _HAS_DIR_FD:
        _write_by_path(target, data, overwrite)
        return
    # One descriptor per folder, no link followed: whoever exchanges a folder for a link meanwhile changes nothing.
    with _folder_below(root, target.parent.relative_to(root).parts) as folder:
        temporary = _temporary_name()
        try:
            _write_file(folder, temporary, data, _mode_of(folder, target.name) if overwrite else None)
            if overwrite:
                os.rename(temporary, target.name, src_dir_fd=folder, dst_dir_fd=folder)
            else:
                _link(folder, temporary, target.name, data)
            os.fsync(folder)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=folder)


def _temporary_name() -> str:
    """Return a short name, unlike that of the file."""
    return f".klein-{secrets.token_hex(8)}"


@contextlib.contextmanager
def _folder_below(root: Path, parts: tuple[str, ...]) -> Iterator[int]:
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(_opened(root))
        for part in parts:
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, dir_fd=folder)
            folder = stack.enter_context(_opened(part, folder))
        yield folder


@contextlib.contextmanager
def _opened(path: Path | str, folder: int | None = None) -> Iterator[int]:
    try:
        descriptor = os.open(path, _DIRECTORY, dir_fd=folder)
    except NotADirectoryError:
        raise NotADirectoryError("a file or a link is where its folder should be") from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _mode_of(folder: int, name: str) -> int | None:
    try:
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return stat.S_IMODE(status.st_mode) & 0o777 if stat.S_ISREG(status.st_mode) else None


def _write_file(folder: int, name: str, data: bytes, mode: int | None) -> None:
    with os.fdopen(os.open(name, _NEW, 0o666, dir_fd=folder), "wb") as file:
        if mode is not None:
            os.fchmod(file.fileno(), mode)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _link(folder: int, temporary: str, name: str, data: bytes) -> None:
    """Create `name` only if it is free.

    A hard link fails if the name is taken, without a race; some file systems have none.
    """
    try:
        os.link(temporary, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
    except FileExistsError:
        raise
    except (OSError, NotImplementedError):
        _write_file(folder, name, data, None)


def _write_by_path(target: Path, data: bytes, overwrite: bool) -> None:
    """Write without folder descriptors (Windows)."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.parent.resolve() != target.parent:
        raise OSError("the folder was replaced by a link meanwhile")
    if not overwrite and os.path.lexists(target):
        raise FileExistsError
    temporary = target.parent / _temporary_name()
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            os.replace(temporary, target)
        else:
            os.rename(temporary, target)  # on Windows it fails if the name is taken
    finally:
        temporary.unlink(missing_ok=True)
