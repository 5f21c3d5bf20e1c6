"""Owns every job.

Runs it, tells its listeners, saves its images, and keeps detached ones across restarts.
"""

import asyncio
import contextlib
import json
import logging
import secrets
import sqlite3
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from engine.contract import EngineError, EngineFailed, Event, Queued, Result, Rgb8, Step
from klein_mcp import atomic
from klein_mcp.errors import RequestError, quote
from klein_mcp.images.library import Store
from klein_mcp.jobs.api import UnknownJob
from klein_mcp.jobs.events import (
    LAST,
    NO_PREVIEWS,
    Cancelled,
    Done,
    Failed,
    ImageSaved,
    JobEvent,
    Listen,
    Progressed,
    Saving,
    Submitted,
)
from klein_mcp.jobs.previews import PreviewCache
from klein_mcp.jobs.queue import Queue, engine_stopped
from klein_mcp.jobs.record import JobNews, JobRecord, Listener, Watchers
from klein_mcp.jobs.request import ImageRequest
from klein_mcp.jobs.results import Preview, SavedImage
from klein_mcp.jobs.status import DaemonStatus, JobStatus
from klein_mcp.private import read_private_text

if TYPE_CHECKING:
    from klein_mcp.images.alpha import Pixels
    from klein_mcp.images.pixels import PixelCache
    from klein_mcp.jobs.execute import PreparedRequest
    from klein_mcp.jobs.transparent import Made, Part

log = logging.getLogger(__name__)

HEARTBEAT = 1.0
"""Seconds after which the latest progress is sent again, so that a listener can count on waking up."""

LISTEN_WITHIN = 10.0
"""Seconds for somebody to listen to a new job; its submitter may have died in between."""

REMEMBERED = 24 * 3600.0
"""Seconds for which a finished job can be asked after; its images stay in the library."""

MOST = 1000
"""Finished jobs that can be asked after, about a kilobyte each; more within a day is a client in a loop."""

ALIKE_DRAFTS = "the drafts are alike: another seed changes little here; vary the words"

ATTEMPTS = 2
"""Daemons that may crash on one job."""


class JobManager:
    """The job API of this process, as `jobs.api.Jobs` describes it.

    Belongs to one event loop.
    """

    def __init__(self, folder: Path, library: Path, queue: Queue) -> None:
        """folder: for detached jobs, a file each.

        library: opened by the first job.
        """
        self._folder = folder
        self._library = library
        self._queue = queue
        self._jobs: dict[str, JobRecord] = {}
        self._watchers = Watchers()
        self._opening = Lock()
        self._store: Store | None = None
        self._pixels: PixelCache | None = None
        self._previews = PreviewCache(self._read)
        self._closing = False

    # -- the job API ---------------------------------------------------------------------------------------------------

    async def submit(self, request: ImageRequest, *, client: str) -> str:
        """Start a job. Raises Busy or EngineFailed."""
        job = self._submit(request, client, ())
        asyncio.get_running_loop().call_later(LISTEN_WITHIN, self._cancel_unless_wanted, job)
        return job.id

    async def run(
        self, request: ImageRequest, *, client: str, listen: Listen = NO_PREVIEWS, saved: Sequence[SavedImage] = ()
    ) -> AsyncGenerator[JobEvent]:
        """Submit and listen.

        saved: its first images, that a daemon which crashed had made already.
        """
        job = self._submit(request, client, saved)
        async with contextlib.aclosing(self._listen(job, listen, Submitted(job.id))) as events:
            async for event in events:
                yield event

    async def events(self, job: str, listen: Listen = NO_PREVIEWS) -> AsyncGenerator[JobEvent]:
        """Listen to a job. Raises UnknownJob."""
        async with contextlib.aclosing(self._listen(self._find(job), listen)) as events:
            async for event in events:
                yield event

    async def watch(self) -> AsyncGenerator[JobNews | None]:
        """Follow all jobs."""
        inbox = self._watchers.add()
        present = [job for job in self._jobs.values() if not job.over]
        for job in present:
            self._update_watched(job)
        try:
            for job in present:
                yield job.status(), job.latest
            while True:
                try:
                    news = await asyncio.wait_for(inbox.get(), HEARTBEAT)
                except TimeoutError:
                    news = None
                yield news
        finally:
            self._watchers.remove(inbox)
            for job in self._jobs.values():
                self._update_watched(job)

    async def detach(self, job: str) -> JobStatus:
        """Let a job go on without listeners.

        Raises UnknownJob; EngineFailed if it cannot be written to disk.
        """
        record = self._find(job)
        if not record.detached:
            saved = len(record.saved)
            try:
                # A promise: the job survives the machine going down. Flushing a disk may take seconds.
                await asyncio.to_thread(self._write, record, durable=True)
            except OSError as exc:
                raise EngineFailed(f"The job cannot be written to the disk: {exc}.") from None
            record.detached = True
            if record.over or len(record.saved) > saved:
                self._write_if_detached(record)  # it went on meanwhile
        return record.status()

    async def cancel(self, job: str) -> None:
        """Stop a job within one step. Raises UnknownJob."""
        self._cancel(self._find(job))

    async def job(self, job: str) -> JobStatus:
        """Return how far a job is. Raises UnknownJob."""
        return self._find(job).status()

    async def list(self) -> list[JobStatus]:
        """Return all jobs, newest first."""
        return [job.status() for job in sorted(self._jobs.values(), key=lambda job: -job.created)]

    async def status(self) -> DaemonStatus:
        """Describe queue and engine."""
        # The engine looks into model folders; a slow disk must not hold up the progress of every job.
        engine = await asyncio.to_thread(self._queue.engine_status)
        return DaemonStatus(True, queue=self._queue.status(), seconds=self._queue.seconds(), engine=engine)

    # -- for the process that holds it ---------------------------------------------------------------------------------

    @property
    def idle_seconds(self) -> float:
        """Seconds since the last job ended.

        0 while there is one.
        """
        return 0.0 if any(not job.over for job in self._jobs.values()) else self._queue.idle_seconds

    def resume(self) -> None:
        """Go on with detached jobs that the last daemon did not finish.

        Forget what was finished long ago.
        """
        for unfinished in self._folder.glob("*.json.*"):  # the last daemon was killed while it wrote
            with contextlib.suppress(OSError):
                unfinished.unlink()
        for path in self._folder.glob("*.json"):
            try:
                job = JobRecord.from_json(path.stem, json.loads(read_private_text(path)))
            except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
                log.warning("%s is not a job that can be read", path)
                continue
            self._jobs[job.id] = job
            job.watchers = self._watchers
            if job.over:
                continue
            job.attempts += 1
            with contextlib.suppress(OSError):  # a crash may then go uncounted, but the job is run
                self._write(job)
            job.task = asyncio.create_task(self._work(job))
        self._forget()

    async def aclose(self) -> None:
        """Stop every job.

        The next daemon resumes the detached ones.
        """
        self._closing = True
        tasks = [job.task for job in self._jobs.values() if job.task and not job.task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._store:
            self._store.close()

    # -- submitting and listening --------------------------------------------------------------------------------------

    def _submit(self, request: ImageRequest, client: str, saved: Sequence[SavedImage]) -> JobRecord:
        if self._closing:
            raise engine_stopped()
        self._queue.check_place(client)
        job = JobRecord("j" + secrets.token_hex(6), request, client, saved=list(saved), watchers=self._watchers)
        self._jobs[job.id] = job
        job.task = asyncio.create_task(self._work(job))
        self._forget()
        return job

    async def _listen(self, job: JobRecord, options: Listen, *first: JobEvent) -> AsyncGenerator[JobEvent]:
        listener = Listener(options)
        # Nothing is awaited between this look at the job and the first event, so none is missed or comes twice.
        saved = [ImageSaved(image, saved) for image, saved in enumerate(job.saved)]
        now = job.ending or job.latest
        for event in (*first, *saved, *([now] if now else [])):
            listener.inbox.put_nowait(event)
        job.listeners.append(listener)
        self._update_watched(job)
        try:
            while True:
                try:
                    event = await asyncio.wait_for(listener.inbox.get(), HEARTBEAT)
                except TimeoutError:
                    if job.latest is None:
                        continue
                    event = job.latest
                yield await self._for_listener(job, event, options)
                if isinstance(event, LAST):
                    return
        finally:
            job.listeners.remove(listener)
            self._update_watched(job)
            self._cancel_unless_wanted(job)

    async def _for_listener(self, job: JobRecord, event: JobEvent, options: Listen) -> JobEvent:
        """Add the previews that a listener asked for."""
        match event:
            case ImageSaved(saved=saved) if options.each:
                return replace(event, preview=await self._preview([saved], options.each))
            case Done() if options.preview:
                return replace(event, preview=await self._preview(job.saved, options.preview))
            case Progressed(preview=preview, partial=partial):
                shown = preview if options.steps else None
                return replace(event, preview=shown, partial=partial if options.partials else None)
        return event

    async def _preview(self, images: Sequence[SavedImage], longest: int) -> Preview | None:
        handles = [image.handle for image in images]
        longest = min(longest, max(image.painted for image in images) or longest)
        try:
            return await asyncio.to_thread(self._previews.get, handles, longest)
        except RequestError:
            return None  # an image was deleted since

    def _cancel_unless_wanted(self, job: JobRecord) -> None:
        if not job.listeners and not job.detached:
            self._cancel(job)

    def _cancel(self, job: JobRecord) -> None:
        if job.task and not job.over and not job.cancelling:
            job.cancelling = True
            job.task.cancel()

    def _update_watched(self, job: JobRecord) -> None:
        if job.ticket:
            job.ticket.watched = job.watched

    def _find(self, name: str) -> JobRecord:
        if name not in self._jobs:
            raise UnknownJob(f"There is no job {quote(name)}.")
        return self._jobs[name]

    # -- running a job -------------------------------------------------------------------------------------------------

    async def _work(self, job: JobRecord) -> None:
        try:
            if job.attempts > ATTEMPTS:
                raise EngineFailed(
                    f"The engine crashed {ATTEMPTS} times on this image.",
                    hint="Try a smaller size, or another model.",
                )
            await self._make_images(job)
            job.ms = job.total_ms()
            ending = Done(job.all_warnings(), job.ms)
        except asyncio.CancelledError:
            if self._closing and not job.cancelling:
                self._put_back(job)
                return
            ending = Cancelled()
        except (EngineError, RequestError) as exc:
            ending = Failed(exc)
        except (OSError, sqlite3.Error) as exc:
            log.exception("a job met an error of the disk")
            home = self._library.parent
            ending = Failed(
                EngineFailed(
                    f"The daemon met a disk error: {exc}.", hint=f"Check free space and permissions of {home}."
                )
            )
        except Exception as exc:
            log.exception("a job failed")
            first_line = (str(exc).splitlines() or [""])[0]
            message = f"The job failed inside klein-mcp: {type(exc).__name__}: {first_line}".rstrip(": ")
            ending = Failed(EngineFailed(f"{message}.", hint="Its log, named by `klein-mcp status`, has the details."))
        job.publish(ending)
        self._write_if_detached(job)

    def _put_back(self, job: JobRecord) -> None:
        """Leave a detached job to the next daemon.

        End any other.
        """
        for listener in job.listeners:
            listener.inbox.put_nowait(Failed(engine_stopped()))
        if job.detached:
            job.attempts -= 1  # stopped, not crashed
            self._write_if_detached(job)

    async def _make_images(self, job: JobRecord) -> None:
        prepared = await asyncio.to_thread(self._prepare, job.request)
        job.warnings = prepared.warnings
        saving: asyncio.Task[None] | None = None
        try:
            for image in range(len(job.saved), job.request.count):
                made = await self._make(job, image, prepared)
                if saving:
                    await saving
                # Beside the next image's computation.
                saving = asyncio.create_task(self._save(job, image, prepared, made))
            if saving:
                await saving
            if len(job.saved) > 1:
                job.warnings = (*job.warnings, *await asyncio.to_thread(self._drafts_warnings, job))
        finally:
            if saving and not saving.done():
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
            asyncio.to_thread(self._previews.get, [handle], min(longest, painted or longest), finished.pixels)
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
            self._write_if_detached(job)

    def _wanted_previews(self, job: JobRecord) -> set[int]:
        """Long edges of the previews of single images that listeners wait for."""
        options = [listener.options for listener in job.listeners]
        single = {each.preview for each in options} if job.request.count == 1 else set()
        return (single | {each.each for each in options}) - {0}

    # -- library and files ---------------------------------------------------------------------------------------------

    def _open(self) -> "tuple[Store, PixelCache]":
        """Open the library once, even from two threads.

        Blocking.
        """
        from klein_mcp.images.pixels import PixelCache

        with self._opening:
            if self._store is None or self._pixels is None:
                self._store = Store(self._library)
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

    def _forget(self) -> None:
        """Drop what was finished long ago, or before MOST others."""
        over = sorted((job for job in self._jobs.values() if job.over), key=lambda job: -job.changed)
        for rank, job in enumerate(over):
            if rank >= MOST or time.time() - job.changed > REMEMBERED:
                del self._jobs[job.id]
                with contextlib.suppress(OSError):
                    self._file(job).unlink(missing_ok=True)

    def _write_if_detached(self, job: JobRecord) -> None:
        if job.detached:
            with contextlib.suppress(OSError):  # a full disk: the job goes on in memory
                self._write(job)

    def _write(self, job: JobRecord, *, durable: bool = False) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        atomic.atomic_write(self._file(job), json.dumps(job.to_json()), durable=durable)

    def _file(self, job: JobRecord) -> Path:
        return self._folder / f"{job.id}.json"


def _encode_partial(image: Rgb8, prepared: "PreparedRequest") -> Preview:
    from klein_mcp.images import codec

    return Preview.encode(codec.encode(prepared.composite(image)), "image/png")


def _encode_preview(image: Rgb8) -> Preview:
    from klein_mcp.images.preview import preview

    return Preview.encode(*preview(image))
