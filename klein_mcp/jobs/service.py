"""Resolves a request's references, submits it, listens, and returns its result.

The work of every front end.
Heavy imports (numpy, Pillow) wait for the first file that must be opened, so that a front end answers at once.
"""

import copy
import math
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import anyio
import anyio.to_thread

from engine.contract import EngineError, EngineFailed
from engine.families.klein.variants import EMBEDDED
from klein_mcp.errors import Refused, RequestError, quote
from klein_mcp.images.cache import ImageCache
from klein_mcp.images.library import Store
from klein_mcp.images.paths import is_relative
from klein_mcp.jobs.api import Jobs, UnknownJob
from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.demo import demo_warning
from klein_mcp.jobs.events import Cancelled, Done, Failed, ImageSaved, JobEvent, Listen, Progressed, Starting, Submitted
from klein_mcp.jobs.folders import project_folders
from klein_mcp.jobs.progress import Progress
from klein_mcp.jobs.request import ImageRequest
from klein_mcp.jobs.results import JobResult, PendingJob, SavedImage
from klein_mcp.jobs.status import OVER
from klein_mcp.settings import Settings

if TYPE_CHECKING:
    from klein_mcp.images.resolver import ImageResolver, Reading, ResolvedImage

T = TypeVar("T")
E = TypeVar("E", bound=EngineError | RequestError)

SILENT = 10.0
"""Seconds without an event after which an engine counts as hanging; it repeats the latest each second."""

START_PATIENCE = 30.0
"""Seconds an engine may take to start where the wait budget is shorter; clients give up after 60."""


THUMBS = 6_000_000
"""Bytes of small renditions that are kept: about 400."""


class Service:
    """One per front end.

    Its methods are what tools do; blocking work goes to worker threads.
    thumbs: small renditions and their types, by the image's file.
    """

    def __init__(self, settings: Settings, jobs: Jobs) -> None:
        self.settings = settings
        self.jobs = jobs
        self.thumbs = ImageCache[tuple[bytes, str]](THUMBS, lambda thumb: len(thumb[0]))
        self._demo_mentioned: set[str] = set()
        self._store: Store | None = None
        self._resolver: ImageResolver | None = None
        self._opening = threading.Lock()

    @property
    def store(self) -> Store:
        """The library, opened by the first call that needs it.

        Two calls may come at once.
        """
        with self._opening:
            if self._store is None:
                self._store = Store(self.settings.library)
            return self._store

    @property
    def sources(self) -> "ImageResolver":
        """The resolver of references under the current settings."""
        from klein_mcp.images.resolver import ImageResolver

        if self._resolver is None or self._resolver.settings is not self.settings:
            self._resolver = ImageResolver(self.settings, self.store)
        return self._resolver

    def close(self) -> None:
        if self._store is not None:
            self._store.close()

    def model(self, asked: str | None) -> str:
        """Return the model that a call means."""
        return asked or self.settings.model

    async def open(self, reference: str, call: CallContext, *, reading: "Reading" = "image") -> "ResolvedImage":
        """Resolve one reference.

        reading: what the transparent pixels of a file mean. Raises RequestError.
        """
        folders = await project_folders(self.settings, call) if is_relative(reference) else ()
        opened = await _in_thread(lambda: self._open(reference, call, reading, folders))
        if opened.new:
            await call.on_new_image(f"klein://images/{opened.record.handle}")
        return opened

    def _open(
        self, reference: str, call: CallContext, reading: "Reading", folders: tuple[Path, ...]
    ) -> "ResolvedImage":
        from klein_mcp.images import resolver

        if call.shared and resolver.is_counted_back(reference):
            raise RequestError(
                f"{quote(reference)} is not known here: other clients call this server in the same way.",
                hint="Name a handle. Or give each client an address of its own, such as …/mcp?client=NAME.",
            )
        if call.remote and self.settings.read_roots is None and resolver.is_path(reference):
            raise Refused(
                "Files of this server are not open to clients on other machines.",
                hint="Send a data: URL, or POST it to /upload. Its owner can open folders with KLEIN_READ_ROOTS.",
            )
        return self.sources.open(reference, call.client, reading=reading, folders=folders)

    async def resolve(self, request: ImageRequest, call: CallContext) -> ImageRequest:
        """Replace each reference of `request` by a library handle. Raises RequestError."""
        images = [await self.open(reference, call) for reference in request.images]
        opened, mask = list(images), None
        if request.mask:
            mask = await self.open(request.mask, call, reading="mask")
            opened.append(mask)
        return replace(
            request,
            images=tuple(image.record.handle for image in images),
            mask=mask.record.handle if mask else None,
            warnings=(*request.warnings, *(warning for image in opened for warning in image.warnings)),
        )

    async def run(self, request: ImageRequest, call: CallContext, *, preview: int = 0) -> JobResult:
        """Return the result, however long it takes. Raises RequestError or EngineError.

        preview: long edge of a preview in the result, 0 for none. Cancelling the task cancels the job.
        """
        result = await self.run_within(math.inf, request, call, preview=preview)
        assert isinstance(result, JobResult)
        return result

    async def run_within(
        self, seconds: float, request: ImageRequest, call: CallContext, *, preview: int = 0
    ) -> JobResult | PendingJob:
        """Run as `run` does.

        Detach what is not done after `seconds`, for `wait_within` to ask after.
        """
        started = time.monotonic()
        progress = Progress(call.progress, request.count)
        async with progress.heartbeat():
            resolved = await self.resolve(request, call)
            events = self.jobs.run(resolved, client=call.client, listen=Listen(preview=preview))
            result = await self._follow(events, started + seconds, progress, call)
        if isinstance(result, PendingJob):
            return replace(result, warnings=resolved.warnings)
        ms = {**result.ms, "total": round(1000 * (time.monotonic() - started))}
        demo = await self._demo(request.model, result.images[0], call)
        return replace(result, ms=ms, warnings=(*result.warnings, *demo))

    async def wait_within(
        self, seconds: float, job: str, call: CallContext, *, preview: int = 0
    ) -> JobResult | PendingJob:
        """Wait for a job that was detached. Raises RequestError or EngineError."""
        try:
            found = await _answered(self.jobs.job(job), seconds + SILENT)
            progress = Progress(call.progress, found.count)
            async with progress.heartbeat():
                events = self.jobs.events(job, Listen(preview=preview))
                result = await self._follow(events, time.monotonic() + seconds, progress, call, job)
        except UnknownJob:
            if await _in_thread(lambda: self.store.find(job)):
                raise RequestError(
                    f"There is no job {quote(job)}.", hint="It is an image:", action="view", shows="it"
                ) from None
            raise RequestError(
                f"There is no job {quote(job)}.",
                hint="Jobs are remembered for a day;",
                action="list",
                shows="the images",
            ) from None
        if isinstance(result, PendingJob):
            return result
        demo = await self._demo(found.model, result.images[0], call)
        return replace(result, warnings=(*result.warnings, *demo))

    async def _follow(
        self,
        events: AsyncGenerator[JobEvent],
        deadline: float,
        progress: Progress,
        call: CallContext,
        job: str | None = None,
    ) -> JobResult | PendingJob:
        """Report events until the job is over.

        One that is not over by `deadline` is detached, and not before: an estimate may be wrong, and whoever gets a
        job at once only asks again.
        """
        images: list[SavedImage] = []
        again = "Make its call again" if job else "Call again"
        taken_by = max(deadline, time.monotonic() + START_PATIENCE)
        async with aclosing(events):
            while True:
                limit = max(0.0, (deadline if job else taken_by) - time.monotonic()) + SILENT
                event = await _answered(anext(events, None), limit)
                if event is None:
                    break
                if job is None and time.monotonic() > taken_by and not isinstance(event, Submitted):
                    raise _silent(limit)
                match event:
                    case Submitted(name):
                        job = name
                        call.on_job(name)
                    case Progressed():
                        if isinstance(event, Starting) and job:  # the engine crashed, and the job gets another id
                            job, taken_by = None, max(deadline, time.monotonic() + START_PATIENCE)
                        await progress.event(event)
                    case ImageSaved(saved=saved):
                        images.append(saved)
                        await call.on_new_image(f"klein://images/{saved.handle}")
                    case Done(warnings, ms, preview):
                        return JobResult(tuple(images), warnings, ms, preview)
                    case Failed(error):
                        raise with_saved(error, images)
                    case Cancelled():
                        cancelled = RequestError("The job was cancelled.", hint=f"{again} to start it anew.")
                        raise with_saved(cancelled, images)
                # Until the daemon has taken the job there is nothing to detach: it may be unable to start.
                if job and not isinstance(event, Submitted) and time.monotonic() >= deadline:
                    try:
                        status = await _answered(self.jobs.detach(job), SILENT)
                    except UnknownJob:
                        continue  # the engine crashed just now, and the next events are of a new one
                    if status.state not in OVER:
                        return PendingJob(job, status.state, status.progress, status.message, status.eta_s)
                    deadline = math.inf  # it ended while we asked: its result is on its way
        raise EngineFailed("The engine ended without an image.", hint="Try again; `klein-mcp doctor` looks for causes.")

    async def _demo(self, asked: str, image: SavedImage, call: CallContext) -> Sequence[str]:
        """Warn once per client that auto took the demo model."""
        if asked != "auto" or image.model != EMBEDDED or call.client in self._demo_mentioned:
            return ()
        self._demo_mentioned.add(call.client)
        engine = (await self.jobs.status()).engine
        return (demo_warning(engine.models if engine else ()),)


def with_saved(error: E, images: Sequence[SavedImage]) -> E:
    """Return the error with the handles of images saved before it.

    Nothing else leads the caller to them.
    """
    if not images:
        return error
    named, saved = copy.copy(error), f"Saved before that: {', '.join(image.handle for image in images)}."
    if isinstance(named, RequestError):
        named.saved = saved  # not in its hint, which its action's sentence may go on from
    else:
        named.hint = f"{error.hint} {saved}".strip()
    return named


async def _answered(waiting: Awaitable[T], seconds: float) -> T:
    """Wait for an engine that should answer within `seconds`.

    A generator that is waited for is cancelled, and so given up, when it does not.
    """
    with anyio.move_on_after(seconds):
        return await waiting
    raise _silent(seconds)


def _silent(seconds: float) -> EngineFailed:
    return EngineFailed(
        f"The engine has not answered for {seconds:.0f} s.",
        hint="Call again; if that does not help, run `klein-mcp stop`, or see `klein-mcp doctor`.",
    )


async def _in_thread(work: Callable[[], T]) -> T:
    return await anyio.to_thread.run_sync(work)
