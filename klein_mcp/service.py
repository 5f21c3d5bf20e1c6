"""The one road every picture takes: open the references, paint, put back, save, tell.

What is heavy to import (numpy, Pillow) comes in with the first picture, so that a door answers at once.
"""

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import anyio.to_thread

from engine.contract import EngineFailed, Job, Painting, Queued
from engine.variants import EMBEDDED
from klein_mcp.backends import Backend
from klein_mcp.call import Call
from klein_mcp.errors import RequestError
from klein_mcp.images.store import Store
from klein_mcp.order import MAX_SEED, Order
from klein_mcp.progress import Progress
from klein_mcp.settings import Settings

if TYPE_CHECKING:
    from klein_mcp.finish import Made
    from klein_mcp.images.source import Opened, Sources

T = TypeVar("T")

DEMO = "demo model; klein-mcp pull klein-4b for the real one"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a call brought: pictures, what to know about them, and milliseconds by stage."""

    made: tuple["Made", ...]
    warnings: tuple[str, ...]
    ms: dict[str, float]


class Service:
    """One per door. Its methods are what tools do; blocking work goes to worker threads."""

    def __init__(self, settings: Settings, backend: Backend) -> None:
        self.settings = settings
        self.backend = backend
        self.estimate: float | None = None
        """Seconds from call to picture, as they were lately; None before the first."""
        self._demo_told: set[str] = set()

    @cached_property
    def store(self) -> Store:
        return Store(self.settings.library)

    @cached_property
    def sources(self) -> "Sources":
        from klein_mcp.images.source import Sources

        return Sources(self.settings, self.store)

    def close(self) -> None:
        if "store" in self.__dict__:
            self.store.close()

    async def open(self, reference: str, call: Call) -> "Opened":
        """Raises RequestError."""
        return await _in_thread(lambda: self.sources.open(reference, call.client))

    async def paint(self, order: Order, call: Call) -> Outcome:
        """Raises RequestError or EngineError. Cancelling the task cancels the job."""
        from klein_mcp.work import Work

        clock = _Clock()
        progress = Progress(call.tell, order.count)
        async with progress.heartbeat():
            work = await _in_thread(lambda: Work.open(order, self.sources, call.client))
            made: list[Made] = []
            for job in work.jobs():
                painting = await self._run(job, call, progress, clock)
                made.append(await _in_thread(lambda p=painting: work.finish(self.store, p, call.client)))
                clock.add({**painting.ms, "save": made[-1].save_ms})
        for picture in made:
            await call.painted(f"klein://images/{picture.record.handle}")
        told = [warning for picture in made for warning in picture.painting.warnings]
        warnings = dict.fromkeys((*work.warnings, *told, *self._demo(order, made[0].painting, call)))
        ms = clock.ms()
        self.estimate = (ms["total"] - ms["queue"] - ms["load"]) / 1000 / order.count
        return Outcome(tuple(made), tuple(warnings), ms)

    async def _run(self, job: Job, call: Call, progress: Progress, clock: "_Clock") -> Painting:
        waiting = time.perf_counter()
        queued = True
        # Closing the iterator is how a job is cancelled, so it must close when this task is.
        async with aclosing(self.backend.run(job, client=call.client)) as events:  # type: ignore[type-var]
            async for event in events:
                if queued and not isinstance(event, Queued):
                    queued = False
                    clock.add({"queue": 1000 * (time.perf_counter() - waiting)})
                await progress.event(event)
                if isinstance(event, Painting):
                    return event
        raise EngineFailed(
            "The engine ended without a picture.", hint="Try again; `klein-mcp doctor` looks for causes."
        )

    def _demo(self, order: Order, painting: Painting, call: Call) -> Sequence[str]:
        """Said once per client: the model that was taken because there is no other is a demo."""
        if order.model != "auto" or painting.model != EMBEDDED or call.client in self._demo_told:
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


class _Clock:
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
