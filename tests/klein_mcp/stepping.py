"""A queue whose executor takes its steps when a test lets it."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from engine.contract import (
    DeviceLost,
    EngineError,
    EngineStatus,
    Event,
    InvalidJob,
    Job,
    Queued,
    Result,
    Rgb8,
    Stage,
    Step,
)
from klein_mcp.jobs.executor import nobody_watches
from klein_mcp.jobs.queue import Queue

IMAGE = np.zeros((1, 1, 3), np.uint8)


class StepExecutor:
    """Takes a step each time `go` is released, and remembers its jobs."""

    def __init__(self, *, free: bool = False, slots: int = 1) -> None:
        self.slots = slots
        self.go = threading.Semaphore(10**6 if free else 0)
        self.began: list[str] = []
        self.stopped: list[str] = []
        self.steps: list[str] = []
        self.previews: list[bool] = []
        self.prefetched: list[tuple[int, Rgb8]] = []
        self.released = threading.Event()

    def run(self, job: Job, watched: Callable[[], bool] = nobody_watches) -> Iterator[Event]:
        self.began.append(job.prompt)
        if job.prompt == "refuse":
            raise InvalidJob("No.")
        if job.prompt == "break":
            raise ZeroDivisionError("by nothing")
        if job.prompt == "lose":
            raise DeviceLost("The GPU no longer answers.")
        try:
            yield Stage("denoise")
            for done in range(1, 4):
                assert self.go.acquire(timeout=120)
                self.steps.append(job.prompt)
                self.previews.append(watched())
                yield Step(done, 3)
            yield Result(IMAGE, job.seed, "fake", "", 3, 1.0)
        except GeneratorExit:
            self.stopped.append(job.prompt)
            raise

    def status(self) -> EngineStatus:
        return EngineStatus("cpu", "float32", 1, 0)

    def prefetch(self, image: Rgb8) -> bool:
        """Remember how many jobs had begun by then."""
        self.prefetched.append((len(self.began), image))
        return False

    def release(self) -> None:
        self.released.set()


class Waiter:
    """One caller: the events it got, and whether the last has come."""

    def __init__(self, queue: Queue, prompt: str, client: str, **more: bool) -> None:
        self.events: list[Event | EngineError] = []
        self.over = threading.Event()
        self.ticket = queue.put(Job(prompt), client, self._tell, **more)

    def _tell(self, event: Event | EngineError) -> None:
        self.events.append(event)
        if isinstance(event, Result | EngineError):
            self.over.set()

    @property
    def end(self) -> Event | EngineError:
        assert self.over.wait(120)
        return self.events[-1]

    @property
    def positions(self) -> list[int]:
        return [event.position for event in self.events if isinstance(event, Queued)]


@contextmanager
def working(executor: StepExecutor, *, size: int = 32, keep_alive: float = 600.0) -> Iterator[Queue]:
    queue = Queue(lambda: executor, size=size, keep_alive=keep_alive)
    try:
        yield queue
    finally:
        executor.go.release(10**6)
        queue.close(10)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("executor-")]


def until(condition, what: str) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)
