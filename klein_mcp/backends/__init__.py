"""Where a job is painted: one verb, `run`, whatever stands behind it."""

from collections.abc import AsyncIterator
from typing import Any, Protocol

from engine.contract import Event, Job


class Backend(Protocol):
    """The daemon, an engine in this process, or a fake painter in a test."""

    def run(self, job: Job, *, client: str) -> AsyncIterator[Event]:
        """Paint `job`: events as they happen, the last one a Painting.

        client: whose turn it takes in the queue. Closing the iterator cancels the job.
        Raises EngineError.
        """
        ...

    async def status(self) -> dict[str, Any]:
        """What the engine holds and does: models, device, memory, queue. Never starts an engine."""
        ...
