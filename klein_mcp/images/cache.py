"""Images in memory by name, within a budget of bytes."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class ImageCache(Generic[T]):
    """Images by name, the least recently used evicted first.

    size: an image's bytes. One larger than the budget is not kept. Any thread may use it.
    """

    def __init__(self, budget: int, size: Callable[[T], int]) -> None:
        self._budget = budget
        self._size = size
        self._lock = threading.Lock()
        self._images: OrderedDict[str, T] = OrderedDict()
        self._bytes = 0

    def get(self, name: str) -> T | None:
        """Return an image, None if it is not here."""
        with self._lock:
            if name in self._images:
                self._images.move_to_end(name)
            return self._images.get(name)

    def add(self, name: str, image: T) -> None:
        """Keep an image. The one that has this name already stays."""
        size = self._size(image)
        with self._lock:
            if size > self._budget:
                return
            if name not in self._images:
                self._images[name] = image
                self._bytes += size
            self._images.move_to_end(name)
            while self._bytes > self._budget:
                _, oldest = self._images.popitem(last=False)
                self._bytes -= self._size(oldest)
