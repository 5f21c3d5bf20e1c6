"""The engine of this process as an executor, made from settings."""

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from engine.contract import EngineStatus, Event, Job, Rgb8
from klein_mcp.jobs.executor import nobody_watches
from klein_mcp.settings import Settings

if TYPE_CHECKING:
    from engine.engine import Engine


class LocalExecutor:
    """Runs jobs on an engine in this process, one at a time."""

    slots = 1

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine

    def run(self, job: Job, watched: Callable[[], bool] = nobody_watches) -> Iterator[Event]:
        """Run `job`. Closing the iterator cancels it. Raises EngineError."""
        self._engine.previews = watched()
        for event in self._engine.run(job):
            yield event
            self._engine.previews = watched()

    def prefetch(self, image: Rgb8) -> bool:
        """Let the engine prepare for an edit of `image`."""
        return self._engine.prefetch(image)

    def release(self) -> None:
        """Give the weights' memory back."""
        self._engine.release()

    def status(self) -> EngineStatus:
        """Describe the engine."""
        return self._engine.status()


def make_engine(settings: Settings) -> "Engine":
    """Make the engine as the settings want it.

    What they leave open is the engine's to choose.
    """
    # Read once, when torch is imported. Spinning threads on a busy machine of 2 cores made 0.1 s of work 0.6 s, and
    # 1.3 s at worst; sleeping ones cost nothing when it is idle. Measured: engine/SPEED.md.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # On an H200 the allocator then holds 0.6 GB beyond the peak, instead of 2.8 GB.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    from engine.engine import Engine

    return Engine(settings.engine_config())


def make_local(settings: Settings) -> LocalExecutor:
    """Make the executor of a daemon that computes on its own machine."""
    return LocalExecutor(make_engine(settings))
