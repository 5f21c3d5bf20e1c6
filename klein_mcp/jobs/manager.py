"""Owns every job.

Runs it, tells its listeners, saves its images, and keeps detached ones across restarts.
"""

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

from engine.contract import DeviceLost, EngineError, EngineFailed
from klein_mcp.errors import RequestError, quote
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
    Submitted,
)
from klein_mcp.jobs.files import JobFiles
from klein_mcp.jobs.maker import ImageMaker
from klein_mcp.jobs.queue import Queue, engine_stopped
from klein_mcp.jobs.record import JobNews, JobRecord, Listener, Watchers
from klein_mcp.jobs.request import ImageRequest
from klein_mcp.jobs.results import SavedImage
from klein_mcp.jobs.status import DaemonStatus, JobStatus
from klein_mcp.limits import new_job_id

log = logging.getLogger(__name__)

HEARTBEAT = 1.0
"""Seconds after which the latest progress is sent again, so that a listener can count on waking up."""

LISTEN_WITHIN = 10.0
"""Seconds for somebody to listen to a new job; its submitter may have died in between."""

REMEMBERED = 24 * 3600.0
"""Seconds for which a finished job can be asked after; its images stay in the library."""

MOST = 1000
"""Finished jobs that can be asked after, about a kilobyte each; more within a day is a client in a loop."""

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
        self._files = JobFiles(folder)
        self._queue = queue
        self._maker = ImageMaker(library, queue, self._files)
        self._jobs: dict[str, JobRecord] = {}
        self._watchers = Watchers()
        self._closing = False
        self._handing_over = False

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
            before = len(record.saved), record.attempts
            try:
                # A promise: the job survives the machine going down. Flushing a disk may take seconds.
                await asyncio.to_thread(self._files.write, record, durable=True)
            except OSError as exc:
                raise EngineFailed(
                    f"The job cannot be written to the disk: {exc}.",
                    hint="Make room (klein-mcp prune), then call again.",
                ) from None
            record.detached = True
            if record.over or (len(record.saved), record.attempts) != before:
                self._files.update(record)  # it went on meanwhile
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
        for job in self._files.read():
            self._jobs[job.id] = job
            job.watchers = self._watchers
            if job.over:
                continue
            job.task = asyncio.create_task(self._work(job))
        self._forget()

    def hand_over(self) -> None:
        """Leave every job to the next daemon, as a crash does.

        This one is to be closed now. Listeners hear no ending, and submit their job again.
        """
        self._handing_over = True

    async def aclose(self) -> None:
        """Stop every job.

        The next daemon resumes the detached ones.
        """
        self._closing = True
        await asyncio.sleep(0)  # as in _cancel
        tasks = [job.task for job in self._jobs.values() if job.task and not job.task.done()]
        for job in self._jobs.values():
            if job.task and not job.cancelling:  # one that was cancelled may be saving its image
                job.task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._maker.close()

    # -- submitting and listening --------------------------------------------------------------------------------------

    def _submit(self, request: ImageRequest, client: str, saved: Sequence[SavedImage]) -> JobRecord:
        if self._closing:
            raise engine_stopped()
        self._queue.check_place(client)
        job = JobRecord(new_job_id(), request, client, saved=list(saved), watchers=self._watchers)
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
                if event is None:
                    return  # handed over
                yield await self._maker.previews.add_to(event, job.saved, options)
                if isinstance(event, LAST):
                    return
        finally:
            job.listeners.remove(listener)
            self._update_watched(job)
            self._cancel_unless_wanted(job)

    def _cancel_unless_wanted(self, job: JobRecord) -> None:
        if not job.listeners and not job.detached:
            self._cancel(job)

    def _cancel(self, job: JobRecord) -> None:
        if job.task and not job.over and not job.cancelling:
            job.cancelling = True
            # Not at once: a task that is cancelled before its first step never says how it ended.
            asyncio.get_running_loop().call_soon(job.task.cancel)

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
            if job.attempts >= ATTEMPTS:
                raise EngineFailed(
                    f"The engine crashed {ATTEMPTS} times on this image.",
                    hint="Try a smaller size, or another model.",
                )
            await self._maker.make(job)
            ending = self._done(job)
        except asyncio.CancelledError:
            if len(job.saved) == job.request.count:
                ending = self._done(job)  # the last image was being saved
            elif self._closing and not job.cancelling:
                self._put_back(job)
                return
            else:
                ending = Cancelled()
        except (EngineError, RequestError) as exc:
            if isinstance(exc, DeviceLost) and self._handing_over:
                self._put_back(job)
                return
            ending = Failed(exc)
        except (OSError, sqlite3.Error) as exc:
            log.exception("a job met an error of the disk")
            home = self._maker.library.parent
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
        self._files.update(job)

    def _done(self, job: JobRecord) -> Done:
        job.ms = job.total_ms()
        return Done(job.all_warnings(), job.ms)

    def _put_back(self, job: JobRecord) -> None:
        """Leave a detached job to the next daemon.

        End any other, unless its listeners bring it there.
        """
        for listener in job.listeners:
            listener.inbox.put_nowait(None if self._handing_over else Failed(engine_stopped()))
        if job.detached:
            if not self._handing_over:
                job.attempts -= job.begun  # stopped, not crashed
            self._files.update(job)

    def _forget(self) -> None:
        """Drop what was finished long ago, or before MOST others."""
        over = sorted((job for job in self._jobs.values() if job.over), key=lambda job: -job.changed)
        for rank, job in enumerate(over):
            if rank >= MOST or time.time() - job.changed > REMEMBERED:
                del self._jobs[job.id]
                self._files.remove(job)
