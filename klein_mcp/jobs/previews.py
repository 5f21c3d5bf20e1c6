"""Previews for the listeners of jobs.

Each made once, from pixels that are at hand.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from threading import Lock
from typing import TYPE_CHECKING

from klein_mcp.errors import RequestError
from klein_mcp.jobs.events import Done, ImageSaved, JobEvent, Listen, Progressed
from klein_mcp.jobs.results import Preview, SavedImage

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

    async def add_to(self, event: JobEvent, images: Sequence[SavedImage], options: Listen) -> JobEvent:
        """Add the previews that a listener asked for.

        images: all that are saved of the job.
        """
        match event:
            case ImageSaved(saved=saved) if options.each:
                return replace(event, preview=await self._of_saved([saved], options.each))
            case Done() if options.preview:
                return replace(event, preview=await self._of_saved(images, options.preview))
            case Progressed(preview=preview, partial=partial):
                shown = preview if options.steps else None
                return replace(event, preview=shown, partial=partial if options.partials else None)
        return event

    async def _of_saved(self, images: Sequence[SavedImage], longest: int) -> Preview | None:
        handles = [image.handle for image in images]
        longest = min(longest, max(image.painted for image in images) or longest)
        try:
            return await asyncio.to_thread(self.get, handles, longest)
        except RequestError:
            return None  # an image was deleted since

    def _make(self, handles: Sequence[str], longest: int, image: "Pixels | None") -> Preview:
        from klein_mcp.images.preview import contact_sheet, preview

        if len(handles) == 1:
            return Preview.encode(*preview(self._read(handles[0]) if image is None else image, longest=longest))
        return Preview.encode(*preview(contact_sheet([self._read(handle) for handle in handles], longest=longest)))
