"""An executor of deterministic images, for tests of everything around the engine."""

import hashlib
import threading
from collections.abc import Callable, Iterator

import numpy as np

from engine.contract import (
    Aspect,
    EngineStatus,
    Event,
    Exact,
    InvalidJob,
    Job,
    KeepSource,
    KnownModel,
    Loading,
    Mode,
    Result,
    Rgb8,
    Stage,
    Step,
)
from engine.families.klein.variants import VARIANTS
from klein_mcp.images.codec import resize
from klein_mcp.jobs.executor import nobody_watches

STEPS = 4


def painted(job: Job) -> Rgb8:
    """Return an image that depends on every field of the job: a base colour, and noise of its own in it."""
    seed = hashlib.sha256(f"{job.prompt}|{job.seed}|{job.steps}|{job.guidance}".encode())
    for reference in job.references:
        seed.update(reference.tobytes())
    random = np.random.default_rng(int.from_bytes(seed.digest()[:8], "big"))
    width, height = size(job)
    coarse = random.integers(0, 256, (max(1, height // 16), max(1, width // 16), 3), np.uint8)
    return resize(coarse, width, height)


def size(job: Job) -> tuple[int, int]:
    """Return the size by the contract's rules, for a model whose native size is 128."""
    if isinstance(job.size, KeepSource):
        height, width = job.references[0].shape[:2]
        return width, height
    if isinstance(job.size, Exact):
        return job.size.width, job.size.height
    if isinstance(job.size, Aspect):
        across, along = job.size.width, job.size.height
        scale = 128 * (across * along) ** -0.5
        return round(across * scale / 16) * 16, round(along * scale / 16) * 16
    if job.references:
        height, width = job.references[0].shape[:2]
        return max(16, width // 16 * 16), max(16, height // 16 * 16)
    return 128, 128


class FakeExecutor:
    """An Executor that remembers its jobs.

    cancelled: how many of them were stopped.

    events_before: yielded before the first stage. error: raised instead of an image.
    """

    slots = 1

    def __init__(self, model: str = "nano") -> None:
        self.model = model
        self.mode: Mode = "eager"
        self.dtype = "float32"
        self.jobs: list[Job] = []
        self.cancelled = 0
        self.seconds_per_step = 0.0
        self.events_before: list[Event] = []
        self.error: Exception | None = None
        self.paint: Callable[[Job], Rgb8] = painted
        self.prefetched: list[Rgb8] = []
        self.released = 0
        self._hurry = threading.Event()

    def run(self, job: Job, watched: Callable[[], bool] = nobody_watches) -> Iterator[Event]:
        self.jobs.append(job)
        if self.error is not None:
            raise self.error
        most = VARIANTS[self.model].max_references
        if len(job.references) > most:
            raise InvalidJob(f"{len(job.references)} references; {self.model} takes at most {most}.")
        try:
            yield from self.events_before
            yield Loading(self.model, 1.0)
            yield Stage("prompt")
            if job.references:
                yield Stage("references")
            yield Stage("denoise")
            for step in range(STEPS):
                self._hurry.wait(self.seconds_per_step)
                yield Step(step + 1, STEPS, np.zeros((8, 8, 3), np.uint8) if watched() else None)
            yield Stage("decode")
        except GeneratorExit:
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
            dtype=self.dtype,
            mode=job.mode or self.mode,
        )

    def hurry(self) -> None:
        """End all waiting between steps, now and from now on."""
        self._hurry.set()

    def prefetch(self, image: Rgb8) -> bool:
        self.prefetched.append(image)
        return False

    def release(self) -> None:
        self.released += 1

    def status(self) -> EngineStatus:
        return EngineStatus(
            device="cpu",
            dtype="float32",
            threads=1,
            loaded=self.model if self.jobs else None,
            free_bytes=10**9,
            models=(KnownModel(self.model, "Apache-2.0", "/models/fake"),),
        )
