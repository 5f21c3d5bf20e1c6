"""Calls of the studio's page, which outlive the request that makes one.

A browser has six connections to a server. Calls that held one each until their image is there would leave none for
images and for Cancel; and a page that is loaded anew asks after its calls again.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any

from mcp_types import CallToolResult

from klein_mcp.studio.contract import Now

MOST_ANSWERS = 20
"""Answers that can still be asked for, with a preview of up to 0.5 MB each.

The calls of ten times as many jobs are known.
"""


class UnknownCall(LookupError):
    """No such call, or its answer was dropped."""


class StoppedCall(Exception):
    """The person stopped this call."""


class PageCalls:
    """Runs calls under the names that the page gave them.

    Belongs to one event loop.
    """

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[CallToolResult]] = {}
        self._calls: dict[str, str] = {}

    def start(self, name: str, work: Coroutine[Any, Any, CallToolResult]) -> None:
        """Run `work` in the background.

        A name that still runs goes on as it is.
        """
        running = self._tasks.pop(name, None)
        if running is not None and not running.done():
            work.close()
            self._tasks[name] = running
            return
        self._tasks[name] = asyncio.create_task(work)
        over = [each for each, task in self._tasks.items() if task.done()]
        for each in over[:-MOST_ANSWERS]:
            del self._tasks[each]

    async def result(self, name: str, seconds: float) -> CallToolResult | None:
        """Return the result, or None.

        seconds: to wait for it. Raises UnknownCall, StoppedCall, and what the call raised.
        """
        task = self._tasks.get(name)
        if task is None:
            raise UnknownCall(name)
        await asyncio.wait({task}, timeout=seconds)
        if task.cancelled():
            raise StoppedCall(name)
        return task.result() if task.done() else None

    def stop(self, name: str) -> str | None:
        """Stop a call.

        Return the job that it started, which may go on without it.
        """
        if task := self._tasks.get(name):
            task.cancel()
        return next((job for job, call in reversed(self._calls.items()) if call == name), None)

    def note_job(self, job: str, name: str) -> None:
        """Note which call started a job."""
        self._calls[job] = name
        for old in list(self._calls)[: -10 * MOST_ANSWERS]:
            del self._calls[old]

    def with_calls(self, now: Now) -> Now:
        """Return the state with the calls of its jobs."""
        return {**now, "jobs": [{**job, "call": self._calls.get(job["job"])} for job in now["jobs"]]}
