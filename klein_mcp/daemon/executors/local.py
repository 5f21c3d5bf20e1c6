"""The queue of this process as a Backend: what the daemon's own doors and its handed-over orders paint with."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from engine.contract import EngineError, Event, Job, Result
from klein_mcp.jobs.queue import Queue

HEARTBEAT = 1.0
"""Seconds after which the latest event is told again, so that whoever waits can count on waking up."""


class LocalBackend:
    """kept: paints for orders that were handed over, whose first job may be in the queue or under the brush already."""

    def __init__(self, queue: Queue, *, kept: bool = False) -> None:
        self._queue = queue
        self._kept = kept

    async def run(self, job: Job, *, client: str) -> AsyncGenerator[Event]:
        """As Backend.run."""
        loop, told = asyncio.get_running_loop(), asyncio.Queue[Event | EngineError]()

        def tell(event: Event | EngineError) -> None:
            loop.call_soon_threadsafe(told.put_nowait, event)

        ticket = self._queue.adopt(job, client, tell) if self._kept else None
        ticket = ticket or self._queue.put(job, client, tell, promised=self._kept)
        try:
            event: Event | EngineError | None = None
            while not isinstance(event, Result):
                try:
                    event = await asyncio.wait_for(told.get(), HEARTBEAT)
                except TimeoutError:
                    if event is None:
                        continue
                if isinstance(event, EngineError):
                    raise event
                yield event
        finally:
            self._queue.cancel(ticket, tell)

    async def status(self) -> dict[str, Any]:
        return self._queue.status()
