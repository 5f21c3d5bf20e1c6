"""Previews for the listeners of jobs.

Each made once, from pixels that are at hand.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from threading import Lock
from typing import TYPE_CHECKING

from klein_mcp.jobs.results import Preview

if TYPE_CHECKING:
    from klein_mcp.images.alpha import Pixels

CACHED = 32
"""Previews of the latest images, up to 0.7 MB each."""

Key = tuple[tuple[str, ...], int]


class PreviewCache:
    """Makes previews of images by handle.

    Whoever asks for one that is being made waits for it. For any thread.
    """

    def __init__(self, read: "Callable[[str], Pixels]") -> None:
        """read: a handle -> its pixels."""
        self._read = read
        self._lock = Lock()
        self._previews: OrderedDict[Key, Future[Preview]] = OrderedDict()

    def get(self, handles: Sequence[str], longest: int, image: "Pixels | None" = None) -> Preview:
        """Return a preview of one image, or a labelled sheet of several.

        Blocking.
        longest: the long edge of each. image: the pixels of a single one, where the caller has them.
        """
        key = (tuple(handles), longest)
        with self._lock:
            future = self._previews.get(key)
            mine = future is None
            if future is None:
                future = self._previews[key] = Future()
                if len(self._previews) > CACHED:
                    self._previews.popitem(last=False)
        if mine:
            try:
                future.set_result(self._make(handles, longest, image))
            except BaseException as exc:
                future.set_exception(exc)
                with self._lock:
                    self._previews.pop(key, None)
        return future.result()

    def _make(self, handles: Sequence[str], longest: int, image: "Pixels | None") -> Preview:
        from klein_mcp.images.preview import contact_sheet, preview

        if len(handles) == 1:
            return Preview.encode(*preview(self._read(handles[0]) if image is None else image, longest=longest))
        return Preview.encode(*preview(contact_sheet([self._read(handle) for handle in handles], longest=longest)))
