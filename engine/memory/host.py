"""Memory of this machine, or of the container around the process."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil

GROUPS = Path("/sys/fs/cgroup")
"""The control groups of Linux, by which containers limit memory."""

MEMBERSHIP = Path("/proc/self/cgroup")
"""The groups of this process, a line each."""

_UNIFIED = ("", "memory.max", "memory.current", "")
_LEGACY = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
"""Versions 2 and 1: a folder below the groups' own, files of limit and use, how entries of memory.stat begin."""
_CACHED = ("inactive_file", "active_file")
"""What was read of files. It goes as soon as memory is wanted; weights that were hashed and then loaded are active."""


def total_bytes() -> int:
    """Return the memory that the process could have."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _limits(GROUPS, MEMBERSHIP))])


def free_bytes() -> int:
    """Return the memory that the process can still take without swapping."""
    return min([psutil.virtual_memory().available, *(free for _, free in _limits(GROUPS, MEMBERSHIP))])


def _limits(groups: Path, membership: Path) -> Iterator[tuple[int, int]]:
    """Yield limit and free bytes of each group with a limit."""
    try:
        lines = membership.read_text(errors="replace").splitlines()
    except OSError:
        return  # no Linux
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        folder, limit_file, use_file, prefix = _LEGACY if controllers else _UNIFIED
        # A group above limits, too. One that is outside of the container is not seen, and its path leads nowhere.
        own = PurePosixPath(path.lstrip("/"))
        for group in (groups / folder / each for each in (own, *own.parents)):
            limit, used = _number(group / limit_file), _number(group / use_file)
            if limit is not None and used is not None:
                used -= sum(_statistic(group / "memory.stat", prefix + name) for name in _CACHED)
                yield limit, max(0, limit - used)


def _number(file: Path) -> int | None:
    """Return a file's number, None for a missing file or "max"."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _statistic(file: Path, name: str) -> int:
    try:
        entries = dict(line.split(" ", 1) for line in file.read_text().splitlines())
        return int(entries.get(name, 0))
    except (OSError, ValueError):
        return 0
