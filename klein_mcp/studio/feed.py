"""Follows all jobs and the library while somebody looks."""

import asyncio
import contextlib
import itertools
import logging
import sqlite3
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field

import anyio.to_thread

from engine.contract import EngineError, Loading, Queued, Stage, Step
from klein_mcp.errors import RequestError
from klein_mcp.jobs.events import ImageSaved, JobEvent, Progressed, Saving
from klein_mcp.jobs.service import Service
from klein_mcp.jobs.status import OVER, JobStatus
from klein_mcp.studio.contract import JobView, Now

log = logging.getLogger(__name__)

LINGER = 5.0
"""Seconds to go on after the last reader: an app polls, and a new connection for each poll would lose previews."""

RETRY = 0.5
"""Seconds until a daemon that is not there is looked for again."""

LIBRARY_EVERY = 1.0
"""Seconds between looks at the library, which other processes change too."""

HEARTBEAT = 10.0
"""Seconds of silence after which a stream says that it is alive."""


_SURFACES = {
    "studio": "the studio",
    "openai": "a client of the OpenAI API",
    "a1111": "a client of the A1111 API",
    "replay": "the command line",
}
"""First words of client names, in words for a person; all others are agents."""


def _who(client: str) -> str:
    """Return whose job it is."""
    return _SURFACES.get(client.partition("-")[0], "an agent")


@dataclass(slots=True)
class _Job:
    """One job that waits or runs, as last heard of."""

    status: JobStatus
    view: JobView = field(init=False)

    def __post_init__(self) -> None:
        self.view = {
            "job": self.status.job,
            "mine": False,
            "call": None,
            "who": _who(self.status.client),
            "state": "queued",
            "prompt": self.status.prompt,
            "model": None,
            "position": 0,
            "seconds": self.status.eta_s,
            "stage": None,
            "step": None,
            "steps": None,
            "fraction": None,
            "count": self.status.count,
            "index": 0,
            "preview": None,
        }

    def apply(self, event: JobEvent) -> None:
        """Bring the view up to date with one event."""
        view = self.view
        match event:
            case Progressed(image, inner, preview):
                if image != view["index"]:
                    view |= {"index": image, "preview": None, "step": None, "stage": None}
                self._progress(inner, event)
                if preview is not None:
                    view["preview"] = f"data:{preview.mime};base64,{preview.base64}"
            case ImageSaved(image):
                view |= {"index": min(image + 1, view["count"] - 1)}

    def _progress(self, event: Queued | Loading | Stage | Step | Saving, progressed: Progressed) -> None:
        view = self.view
        match event:
            case Queued(position, seconds):
                view |= {"state": "queued", "position": position, "seconds": seconds}
            case Loading(model, fraction):
                view |= {"state": "loading", "model": model, "fraction": fraction}
            case Stage("denoise", share) if share:
                whole = (view["index"] + progressed.share(share)) / view["count"]
                view |= {"state": "running", "stage": "denoise", "fraction": whole}
            case Stage(name):
                view |= {"state": "running", "stage": name, "fraction": view["fraction"] if view["step"] else None}
            case Saving():
                view |= {"state": "running", "stage": "save"}
            case Step(done, total):
                share = (view["index"] + progressed.share(done / total)) / view["count"]
                view |= {"state": "running", "step": done, "steps": total, "fraction": share}


def _log_fault(task: "asyncio.Task[None]") -> None:
    """Log the error of ours that ended a task."""
    if not task.cancelled() and (fault := task.exception()):
        log.error("the studio no longer follows what happens", exc_info=fault)


class Feed:
    """News of one front end's readers. Belongs to one event loop."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._jobs: dict[str, _Job] = {}
        self._numbers = itertools.count(1)
        self._seq = next(self._numbers)
        self._library = 0
        self._revision: tuple[int, int] | None = None
        self._news = asyncio.Event()
        self._readers = 0
        self._task: asyncio.Task[None] | None = None

    async def now(self, client: str, *, after: int, seconds: float = 1.0) -> Now:
        """Return the state once it is newer than `after`, or after `seconds`."""
        async with self._reading():
            if self._seq <= after:
                await self._wait(seconds)
            return self._view(client)

    async def stream(self, client: str) -> AsyncGenerator[Now | None]:
        """Yield the state whenever it changes, and None now and then."""
        async with self._reading():
            seen = 0
            while True:
                if self._seq > seen:
                    seen = self._seq
                    yield self._view(client)
                elif not await self._wait(HEARTBEAT):
                    yield None

    def library_changed(self) -> None:
        """Tell readers at once of a change by this process.

        The next look tells them once more.
        """
        self._library = next(self._numbers)
        self._tell()

    def _view(self, client: str) -> Now:
        jobs = sorted(self._jobs.values(), key=lambda job: job.status.created)
        views: list[JobView] = [{**job.view, "mine": job.status.client == client} for job in jobs]
        return {"seq": self._seq, "library": self._library, "jobs": views}

    @contextlib.asynccontextmanager
    async def _reading(self) -> AsyncIterator[None]:
        self._readers += 1
        if self._task is None:
            self._task = asyncio.create_task(self._follow())
        try:
            yield
        finally:
            self._readers -= 1

    async def _wait(self, seconds: float) -> bool:
        """Return whether there was news within `seconds`."""
        news = self._news
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await news.wait()
        return news.is_set()

    def _tell(self) -> None:
        self._seq = next(self._numbers)
        self._news.set()
        self._news = asyncio.Event()

    # -- following -------------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        """Run until nobody has read for a while."""
        tasks = [asyncio.create_task(self._follow_jobs()), asyncio.create_task(self._follow_library())]
        for task in tasks:
            task.add_done_callback(_log_fault)
        idle = 0.0
        try:
            while idle < LINGER:
                await asyncio.sleep(0.5)
                idle = 0.0 if self._readers else idle + 0.5
        finally:
            for task in tasks:
                task.cancel()
            # Before any pause: a reader that comes while these end follows anew.
            self._jobs.clear()
            self._task = None
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow_jobs(self) -> None:
        while True:
            with contextlib.suppress(EngineError, OSError):
                async with contextlib.aclosing(self._service.jobs.watch()) as changes:
                    async for news in changes:
                        if news is not None:
                            self._apply(*news)
            if self._jobs:  # the daemon is gone, and its jobs with it
                self._jobs.clear()
                self._tell()
            await asyncio.sleep(RETRY)

    def _apply(self, status: JobStatus, event: JobEvent | None) -> None:
        if status.state in OVER:
            self._jobs.pop(status.job, None)
        else:
            job = self._jobs.setdefault(status.job, _Job(status))
            job.status = status
            if event is not None:
                job.apply(event)
        if isinstance(event, ImageSaved):
            self.library_changed()
        else:
            self._tell()

    async def _follow_library(self) -> None:
        while True:
            # A library that is busy or damaged may be well again at the next look.
            with contextlib.suppress(RequestError, OSError, sqlite3.Error):
                revision = await anyio.to_thread.run_sync(lambda: self._service.store.revision())
                first, changed = self._revision is None, revision != self._revision
                self._revision = revision
                if changed and not first:
                    self._library = next(self._numbers)
                    self._tell()
            await asyncio.sleep(LIBRARY_EVERY)
