"""A painter of deterministic pictures, for tests of everything around the engine."""

import hashlib
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

import anyio
import numpy as np

from engine.contract import EngineError, Event, InvalidJob, Job, Loading, Queued, Result, Rgb8, Stage, Step
from engine.families.klein.variants import VARIANTS
from klein_mcp.images.codec import resize
from klein_mcp.jobs.backend import UnknownJob
from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.request import ImageRequest
from klein_mcp.jobs.service import Service

STEPS = 4


def painted(job: Job) -> Rgb8:
    """A picture that depends on every field of the job: a base colour, and noise of its own in it."""
    seed = hashlib.sha256(f"{job.prompt}|{job.seed}|{job.steps}|{job.guidance}".encode())
    for reference in job.references:
        seed.update(reference.tobytes())
    random = np.random.default_rng(int.from_bytes(seed.digest()[:8], "big"))
    width, height = size(job)
    coarse = random.integers(0, 256, (max(1, height // 16), max(1, width // 16), 3), np.uint8)
    return resize(coarse, width, height)


def size(job: Job) -> tuple[int, int]:
    """By the contract's rules, for a model whose native size is 128."""
    if job.align:
        height, width = job.references[0].shape[:2]
        return width, height
    if job.width and job.height:
        return job.width, job.height
    if job.aspect:
        across, along = job.aspect
        scale = 128 * (across * along) ** -0.5
        return round(across * scale / 16) * 16, round(along * scale / 16) * 16
    if job.references:
        height, width = job.references[0].shape[:2]
        return max(16, width // 16 * 16), max(16, height // 16 * 16)
    return 128, 128


class FakePainter:
    """A Backend. jobs: what it was given; cancelled: how many of them were hung up on.

    service: what finishes the orders that were handed over, once a test sets it.
    """

    def __init__(self, model: str = "nano") -> None:
        self.model = model
        self.jobs: list[Job] = []
        self.clients: list[str] = []
        self.cancelled = 0
        self.seconds_per_step = 0.0
        self.events_before: list[Event] = []
        self.error: EngineError | None = None
        self.paint: Callable[[Job], Rgb8] = painted
        self.kept_orders: dict[str, tuple[ImageRequest, str, Any]] = {}
        self.service: Service | None = None

    async def run(self, job: Job, *, client: str) -> AsyncGenerator[Event]:
        self.jobs.append(job)
        self.clients.append(client)
        if self.error is not None:
            raise self.error
        most = VARIANTS[self.model].max_references
        if len(job.references) > most:
            raise InvalidJob(f"{len(job.references)} references; {self.model} takes at most {most}.")
        try:
            yield Queued(0)
            for event in self.events_before:
                yield event
            yield Loading(self.model, 1.0)
            yield Stage("prompt")
            if job.references:
                yield Stage("references")
            yield Stage("denoise")
            for step in range(STEPS):
                await anyio.sleep(self.seconds_per_step)
                yield Step(step + 1, STEPS)
            yield Stage("decode")
        except BaseException:
            self.cancelled += 1
            raise
        yield Result(
            image=self.paint(job),
            seed=job.seed,
            model=self.model,
            fingerprint="f" * 16,
            steps=STEPS,
            guidance=1.0,
            ms={"load": 0.0, "prompt": 1.0, "references": 1.0, "denoise": 4.0, "decode": 1.0},
            cache={"prompt": "miss", "references": "miss" if job.references else "none"},
        )

    async def keep(self, order: Mapping[str, Any], *, client: str, made: Mapping[str, Any] | None = None) -> str:
        job = f"j{len(self.kept_orders)}"
        self.kept_orders[job] = (ImageRequest.from_json(order), client, made)
        return job

    async def kept(self, job: str) -> dict[str, Any]:
        if job not in self.kept_orders:
            raise UnknownJob(job)
        state = {"progress": 0.5, "message": "step 2 of 4", "eta_s": 3.0}
        if self.service is None:
            await anyio.sleep(0.05)
            return {"state": "painting", **state}
        order, client, made = self.kept_orders[job]
        self.seconds_per_step = 0.0
        outcome = await self.service.paint(order, CallContext(client))
        pictures = [picture.to_json() for picture in outcome.made]
        told = {"pictures": pictures, "warnings": list(outcome.warnings), "ms": outcome.ms}
        return {"state": "done", **state, "made": made, **told}

    async def status(self) -> dict[str, Any]:
        return {"running": True, "queue": {"waiting": 0}}
