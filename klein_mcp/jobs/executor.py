"""The boundary behind which pixels are computed: a job in, events out."""

from collections.abc import Callable, Iterator
from typing import Protocol

from engine.contract import EngineStatus, Event, Job, Rgb8


def nobody_watches() -> bool:
    """For a job whose steps need no preview."""
    return False


class Executor(Protocol):
    """Runs jobs.

    The engine of this process, another machine, or a fake in a test.
    Methods may be called from several threads, `run` from at most `slots` at once.
    """

    @property
    def slots(self) -> int:
        """Jobs it runs at once."""
        ...

    def run(self, job: Job, watched: Callable[[], bool] = nobody_watches) -> Iterator[Event]:
        """Run `job`.

        The last event is its Result. Closing the iterator cancels it. Raises EngineError.
        watched: asked before each step whether it should carry a preview.
        """
        ...

    def prefetch(self, image: Rgb8) -> bool:
        """Do one piece of the work that an edit of `image` needs.

        False when nothing is left to do.
        """
        ...

    def release(self) -> None:
        """Give back the memory of weights.

        The next job loads again.
        """
        ...

    def status(self) -> EngineStatus:
        """Describe the engine, from any thread and without waiting for a job."""
        ...
