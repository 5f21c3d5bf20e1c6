"""The one road every picture takes: open the references, paint, put back, save, tell.

What is heavy to import (numpy, Pillow) comes in with the first picture, so that a door answers at once.
"""

import math
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import anyio.to_thread

from engine.contract import EngineFailed, Job, Queued, Result
from engine.families.klein.variants import EMBEDDED
from klein_mcp.errors import RequestError, shown
from klein_mcp.images.library import Store
from klein_mcp.jobs.backend import Backend, UnknownJob
from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.outcome import JobResult, PendingJob, outcome_of
from klein_mcp.jobs.progress import Progress
from klein_mcp.jobs.request import MAX_SEED, ImageRequest
from klein_mcp.settings import Settings

if TYPE_CHECKING:
    from klein_mcp.images.resolver import ImageResolver, ResolvedImage
    from klein_mcp.jobs.save import SavedImage

T = TypeVar("T")

DEMO = "demo model; klein-mcp pull klein-4b for the real one"


class Service:
    """One per door. Its methods are what tools do; blocking work goes to worker threads."""

    def __init__(self, settings: Settings, backend: Backend) -> None:
        self.settings = settings
        self.backend = backend
        self.estimate: float | None = None
        """Seconds from call to picture, as they were lately; None before the first."""
        self._demo_told: set[str] = set()
        self._store: Store | None = None
        self._opening = threading.Lock()

    @property
    def store(self) -> Store:
        """Opened by the first call that needs it, which may be two at once."""
        with self._opening:
            if self._store is None:
                self._store = Store(self.settings.library)
            return self._store

    @property
    def sources(self) -> "ImageResolver":
        from klein_mcp.images.resolver import ImageResolver

        return ImageResolver(self.settings, self.store)

    def close(self) -> None:
        if self._store is not None:
            self._store.close()

    async def open(self, reference: str, call: CallContext) -> "ResolvedImage":
        """Raises RequestError."""
        opened = await _in_thread(lambda: self.sources.open(reference, call.client))
        if opened.new:
            await call.painted(f"klein://images/{opened.record.handle}")
        return opened

    async def paint(self, order: ImageRequest, call: CallContext) -> JobResult:
        """However long it takes. Raises RequestError or EngineError. Cancelling the task cancels the job."""
        outcome = await self.paint_within(math.inf, order, call)
        assert isinstance(outcome, JobResult)
        return outcome

    async def paint_within(self, seconds: float, order: ImageRequest, call: CallContext) -> JobResult | PendingJob:
        """As paint; what is not done after `seconds` goes on in the engine's process, for `wait` to ask after."""
        from klein_mcp.jobs.execute import PreparedRequest

        clock, deadline = _CallClock(), time.monotonic() + seconds
        made: list[SavedImage] = []
        progress = Progress(call.tell, order.count)

        def warnings() -> list[str]:
            paintings = [one.painting for one in made]
            told = (warning for one in paintings for warning in (*one.warnings, *work.misshapen(one)))
            return [*work.warnings, *told]

        async def hand_over() -> JobResult | PendingJob:
            rest = replace(work.order, seed=work.order.seed + len(made), count=work.order.count - len(made))
            told = {"pictures": [one.to_json() for one in made], "warnings": warnings(), "ms": clock.ms()}
            job = await self.backend.keep(rest.to_json(), client=call.client, made=told)
            state = await self.backend.kept(job)
            if state["state"] == "done":  # while we asked: nobody needs to wait for it
                return await _in_thread(lambda: outcome_of(state, self.store))
            return PendingJob.of(job, state)

        async with progress.heartbeat():
            work = await _in_thread(lambda: PreparedRequest.open(order, self.sources, call.client))
            for job in work.jobs():
                painting = await self._run(job, call, progress, clock, deadline, hand_over)
                if isinstance(painting, PendingJob):
                    return painting
                if isinstance(painting, JobResult):
                    return await self._announced(painting, order.model, call)
                made.append(await _in_thread(lambda p=painting: work.finish(self.store, p, call.client)))
                clock.add({**painting.ms, "save": made[-1].save_ms})
                progress.saved()
        ms = clock.ms()
        self.estimate = (ms["total"] - ms["queue"] - ms["load"]) / 1000 / order.count
        return await self._announced(JobResult(tuple(made), tuple(warnings()), ms), order.model, call)

    async def wait_within(self, seconds: float, job: str, call: CallContext) -> JobResult | PendingJob:
        """Ask after what was handed over. Raises RequestError or EngineError."""
        deadline = time.monotonic() + seconds
        progress = Progress(call.tell, 1)
        async with progress.heartbeat():
            while True:
                state = await self._kept(job)
                if state["state"] == "done":
                    outcome = await _in_thread(lambda state=state: outcome_of(state, self.store))
                    return await self._announced(outcome, "auto", call)
                await progress.share(state["progress"], state["message"])
                if time.monotonic() > deadline:
                    return PendingJob.of(job, state)

    async def _kept(self, job: str) -> dict[str, Any]:
        try:
            state = await self.backend.kept(job)
        except UnknownJob:
            raise RequestError(
                f"There is no job {shown(job)}.", hint="Jobs are remembered for a day; list_images shows the pictures."
            ) from None
        if state["state"] == "failed":
            raise RequestError(state["error"]["message"], hint=state["error"]["hint"])
        return state

    async def _run(
        self,
        job: Job,
        call: CallContext,
        progress: Progress,
        clock: "_CallClock",
        deadline: float,
        hand_over: Callable[[], Awaitable[JobResult | PendingJob]],
    ) -> Result | JobResult | PendingJob:
        waiting: float | None = time.perf_counter()
        taken = False
        # Closing the iterator is how a job is cancelled, so it must close when this task is.
        async with aclosing(self.backend.run(job, client=call.client)) as events:  # type: ignore[type-var]
            async for event in events:
                if waiting is not None and not isinstance(event, Queued):
                    clock.add({"queue": 1000 * (time.perf_counter() - waiting)})
                    waiting = None
                await progress.event(event)
                if isinstance(event, Result):
                    return event
                expected = event.seconds or 0.0 if isinstance(event, Queued) else 0.0
                # Until an engine has taken the job there is nobody to hand it over to: it may be unable to start.
                taken = taken or isinstance(event, Queued)
                if taken and time.monotonic() + expected > deadline:
                    return await hand_over()
        raise EngineFailed(
            "The engine ended without a picture.", hint="Try again; `klein-mcp doctor` looks for causes."
        )

    async def _announced(self, outcome: JobResult, asked: str, call: CallContext) -> JobResult:
        for one in outcome.made:
            await call.painted(f"klein://images/{one.record.handle}")
        demo = self._demo(asked, outcome.made[0].painting, call)
        return replace(outcome, warnings=tuple(dict.fromkeys((*outcome.warnings, *demo))))

    def _demo(self, asked: str, painting: Result, call: CallContext) -> Sequence[str]:
        """Said once per client: the model that was taken because there is no other is a demo."""
        if asked != "auto" or painting.model != EMBEDDED or call.client in self._demo_told:
            return ()
        self._demo_told.add(call.client)
        return (DEMO,)

    def model(self, asked: str | None) -> str:
        return asked or self.settings.model

    def seed(self, asked: int | None, count: int) -> int:
        """Without one, a seed short enough to be read aloud. Raises RequestError."""
        if asked is not None and asked > MAX_SEED - count + 1:
            raise RequestError(f"seed {asked} leaves no room for {count} pictures; at most {MAX_SEED - count + 1}.")
        return secrets.randbelow(2**32) if asked is None else asked


class _CallClock:
    """Milliseconds by stage, over all pictures of a call."""

    STAGES = ("queue", "load", "prompt", "references", "denoise", "decode", "save")

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._ms: dict[str, float] = dict.fromkeys(self.STAGES, 0.0)

    def add(self, ms: Mapping[str, float]) -> None:
        for stage, spent in ms.items():
            self._ms[stage] = self._ms.get(stage, 0.0) + spent

    def ms(self) -> dict[str, float]:
        total = 1000 * (time.perf_counter() - self._started)
        return {stage: round(spent) for stage, spent in {**self._ms, "total": total}.items()}


async def _in_thread(work: Callable[[], T]) -> T:
    return await anyio.to_thread.run_sync(work)
