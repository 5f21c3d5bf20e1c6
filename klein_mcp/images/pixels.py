"""Decoded images of the library, alpha included, cached by their pixel hash."""

from klein_mcp.images import codec
from klein_mcp.images.alpha import Pixels
from klein_mcp.images.cache import ImageCache
from klein_mcp.images.library import Record, Store

BUDGET = 96_000_000
"""Bytes: 32 images of 1024². The next edit is nearly always of one of the last few."""


class PixelCache(ImageCache[Pixels]):
    """Reads images of one library, decoding each once while cached.

    Any thread may use it.
    """

    def __init__(self, store: Store, budget: int = BUDGET) -> None:
        super().__init__(budget, lambda image: image.nbytes)
        self._store = store

    def read(self, record: Record) -> Pixels:
        """Return the pixels of `record`. Raises UnknownImage or BadImage."""
        if (image := self.get(record.pixels)) is None:
            image = codec.decode(self._store.read(record), record.handle, None).pixels
            self.add(record.pixels, image)
        return image
