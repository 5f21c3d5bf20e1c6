"""Decoded images of the library, alpha included, cached by their pixel hash."""

import threading
from collections import OrderedDict

from klein_mcp.images import codec
from klein_mcp.images.alpha import Pixels
from klein_mcp.images.library import Record, Store

BUDGET = 96_000_000
"""Bytes: 32 images of 1024². The next edit is nearly always of one of the last few."""


class PixelCache:
    """Reads images of one library, decoding each once while cached.

    Any thread may use it.
    """

    def __init__(self, store: Store, budget: int = BUDGET) -> None:
        self._store = store
        self._budget = budget
        self._lock = threading.Lock()
        self._images: OrderedDict[str, Pixels] = OrderedDict()
        self._bytes = 0

    def read(self, record: Record) -> Pixels:
        """Return the pixels of `record`. Raises UnknownImage or BadImage."""
        with self._lock:
            if (image := self._images.get(record.pixels)) is not None:
                self._images.move_to_end(record.pixels)
                return image
        image = codec.decode(self._store.read(record), record.handle, None).pixels
        self.add(record.pixels, image)
        return image

    def add(self, pixels: str, image: Pixels) -> None:
        """Cache `image`. pixels: its `image_hash`."""
        with self._lock:
            if pixels in self._images or image.nbytes > self._budget:
                return
            self._images[pixels] = image
            self._bytes += image.nbytes
            while self._bytes > self._budget:
                _, oldest = self._images.popitem(last=False)
                self._bytes -= oldest.nbytes

    def __contains__(self, pixels: str) -> bool:
        return pixels in self._images
