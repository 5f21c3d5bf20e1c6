"""Makes the images of a job: prepared, computed by the engine, saved."""

import asyncio
import contextlib
import time
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from engine.contract import EngineError, Event, Queued, Result, Rgb8, Step
from klein_mcp.errors import RequestError
from klein_mcp.images.library import Store
from klein_mcp.jobs.events import ImageSaved, Progressed, Saving
from klein_mcp.jobs.files import JobFiles
from klein_mcp.jobs.previews import PreviewCache
from klein_mcp.jobs.queue import Queue
from klein_mcp.jobs.record import JobRecord
from klein_mcp.jobs.request import ImageRequest
from klein_mcp.jobs.results import Preview

if TYPE_CHECKING:
    from klein_mcp.images.alpha import Pixels
    from klein_mcp.images.pixels import PixelCache
    from klein_mcp.jobs.execute import PreparedRequest
    from klein_mcp.jobs.transparent import Made, Part

ALIKE_DRAFTS = "the drafts are alike: another seed changes little here; vary the words"


class ImageMaker:
    """Makes images with a queue and saves them to a library.

    Belongs to one event loop. library: opened by the first job.
    """

    def __init__(self, library: Path, queue: Queue, files: JobFiles) -> None:
        self.library = library
        self.previews = PreviewCache(self._read)
        self._queue = queue
        self._files = files
        self._opening = Lock()
        self._store: Store | None = None
        self._pixels: PixelCache | None = None

    def close(self) -> None:
        if self._store:
            self._store.close()

    async def make(self, job: JobRecord) -> None:
        """Make and save the images that the job still lacks.

        Cancelling this stops the engine.
        """
        prepared = await asyncio.to_thread(self._prepare, job.request)
        job.warnings = prepared.warnings
        saving: asyncio.Task[None] | None = None
        try:
            for image in range(len(job.saved), job.request.count):
                made = await self._make(job, image, prepared)
                if saving:
                    await asyncio.shield(saving)
                # Beside the next image's computation.
                saving = asyncio.create_task(self._save(job, image, prepared, made))
            if saving:
                await asyncio.shield(saving)
            if len(job.saved) > 1:
                job.warnings = (*job.warnings, *await asyncio.to_thread(self._drafts_warnings, job))
        finally:
            # After an error or a cancel its thread goes on, and stores the image. Whoever ends the daemon cancels once
            # more, and would close the library under it.
            while saving and not saving.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([saving])

    async def _make(self, job: JobRecord, image: int, prepared: "PreparedRequest") -> "Made":
        """Run the engine's jobs of one image, nearly always one."""
        from klein_mcp.jobs import transparent

        making, result = transparent.parts(prepared, image), None
        while True:
            step = await asyncio.to_thread(transparent.advance, making, result)
            if isinstance(step, transparent.Made):
                return step
            result = await self._compute(job, image, prepared, step)

    async def _compute(self, job: JobRecord, image: int, prepared: "PreparedRequest", part: "Part") -> Result:
        """Queue one engine job and pass its events on.

        Cancelling this cancels it.
        """
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[Event | EngineError] = asyncio.Queue()
        started, waiting = time.perf_counter(), True

        def tell(event: Event | EngineError) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
                loop.call_soon_threadsafe(inbox.put_nowait, event)

        accepted = image > 0 or part.number > 0 or job.detached
        ticket = self._queue.put(part.job, job.client, tell, watched=job.watched, bypass_limit=accepted)
        job.ticket = ticket
        try:
            while True:
                event = await inbox.get()
                if waiting and not isinstance(event, Queued):
                    waiting = False
                    job.add_ms({"queue": 1000 * (time.perf_counter() - started)})
                if isinstance(event, EngineError):
                    raise event
                if not isinstance(event, Queued) and job.begin():
                    self._files.update(job)
                if isinstance(event, Result):
                    if part.number + 1 == part.count:
                        job.publish(Progressed(image, Saving(), None, None, part.number, part.count))
                    job.add_ms(event.ms)
                    return event
                preview = partial = None
                if isinstance(event, Step):
                    if event.preview is not None:
                        preview = await asyncio.to_thread(_encode_preview, event.preview)
                    if event.partial is not None:
                        partial = await asyncio.to_thread(_encode_partial, event.partial, prepared)
                    event = replace(event, preview=None, partial=None)
                job.publish(Progressed(image, event, preview, partial, part.number, part.count))
        finally:
            job.ticket = None
            self._queue.cancel(ticket)

    async def _save(self, job: JobRecord, image: int, prepared: "PreparedRequest", made: "Made") -> None:
        from klein_mcp.jobs import save

        started = time.perf_counter()
        store, pixels = self._open()
        finished = made.image
        handle = store.new_handle()
        painted = save.painted_edge(finished, made.result)
        # Whoever listens gets the preview with the result, so it is made beside the file.
        previews = [
            asyncio.to_thread(self.previews.get, [handle], min(longest, painted or longest), finished.pixels)
            for longest in self._wanted_previews(job)
        ]
        storing = asyncio.to_thread(save.save, store, handle, finished, prepared, made.result, job.client)
        made_previews = asyncio.gather(*previews)
        (saved, pixel_hash), _ = await asyncio.gather(storing, made_previews)
        pixels.add(pixel_hash, finished.pixels)
        if finished.pixels.shape[2] == 3:  # a transparent image is edited over a backing
            self._queue.prefetch(finished.pixels)
        job.saved.append(saved)
        job.add_ms({"save": 1000 * (time.perf_counter() - started)})
        job.publish(ImageSaved(image, saved))
        if image + 1 < job.request.count:
            self._files.update(job)

    def _wanted_previews(self, job: JobRecord) -> set[int]:
        """Long edges of the previews of single images that listeners wait for."""
        options = [listener.options for listener in job.listeners]
        single = {each.preview for each in options} if job.request.count == 1 else set()
        return (single | {each.each for each in options}) - {0}

    def _open(self) -> "tuple[Store, PixelCache]":
        """Open the library once, even from two threads.

        Blocking.
        """
        from klein_mcp.images.pixels import PixelCache

        with self._opening:
            if self._store is None or self._pixels is None:
                self._store = Store(self.library)
                self._pixels = PixelCache(self._store)
            return self._store, self._pixels

    def _prepare(self, request: ImageRequest) -> "PreparedRequest":
        from klein_mcp.jobs.execute import prepare

        return prepare(request, *self._open())

    def _drafts_warnings(self, job: JobRecord) -> tuple[str, ...]:
        """Warn of drafts that are all alike."""
        from klein_mcp.images import preserve
        from klein_mcp.images.alpha import flat

        shares = [image.changed["share"] for image in job.saved if image.changed]
        try:
            drafts = [flat(self._read(image.handle)) for image in job.saved]
        except RequestError:
            return ()  # one was deleted since
        return (ALIKE_DRAFTS,) if preserve.are_alike(drafts, max(shares, default=1.0)) else ()

    def _read(self, handle: str) -> "Pixels":
        store, pixels = self._open()
        return pixels.read(store.get(handle))


def _encode_partial(image: Rgb8, prepared: "PreparedRequest") -> Preview:
    from klein_mcp.images import codec

    return Preview.encode(codec.encode(prepared.composite(image)), "image/png")


def _encode_preview(image: Rgb8) -> Preview:
    from klein_mcp.images.preview import preview

    return Preview.encode(*preview(image))
