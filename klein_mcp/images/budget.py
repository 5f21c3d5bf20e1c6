"""A limit on the pixels that are decoded at once."""

import contextlib
import ctypes
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")

MAX_PIXELS = 64_000_000
"""The largest image of an ordinary phone is 50 MP; decoded, 64 MP are 192 MB."""

_TRIM_ABOVE = 4_000_000
"""Pixels. Below, what the allocator keeps is small and soon reused."""


class PixelBudget:
    """Admits several small images or one large one at a time.

    40 worker threads that decode a 64-MP image each would need some 20 GB. They are admitted in order of arrival; a
    thread that holds a part may reserve again without waiting.
    """

    def __init__(self, pixels: int = MAX_PIXELS) -> None:
        self._free = self._total = pixels
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()
        self._held = threading.local()

    @contextlib.contextmanager
    def reserve(self, pixels: int) -> Iterator[None]:
        """Wait for `pixels`, or for all of the budget if larger."""
        if getattr(self._held, "any", False):
            yield
            return
        amount = min(pixels, self._total)
        self._acquire(amount)
        self._held.any = True
        try:
            yield
        finally:
            self._held.any = False
            with self._changed:
                self._free += amount
                self._changed.notify_all()
            if pixels > _TRIM_ABOVE:
                return_memory()

    def run(self, pixels: int, work: Callable[[], T]) -> T:
        """Do `work` with `pixels` reserved.

        Its images are gone when memory is returned, which those of a caller inside `reserve` are not.
        """
        with self.reserve(pixels):
            return work()

    def _acquire(self, amount: int) -> None:
        turn = object()
        with self._changed:
            self._waiting.append(turn)
            try:
                self._changed.wait_for(lambda: self._waiting[0] is turn and self._free >= amount)
                self._free -= amount
            finally:
                self._waiting.remove(turn)
                self._changed.notify_all()


def return_memory() -> None:
    """Return freed memory to the system, on glibc.

    glibc keeps Pillow's blocks of 16 MB: 600 MB stayed after three images of 64 MP.
    """
    trim = getattr(_LIBC, "malloc_trim", None)
    if trim is not None:
        trim(0)


def _libc() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows
        return None


_LIBC = _libc()

DECODING = PixelBudget()
"""Shared by all threads of this process."""
