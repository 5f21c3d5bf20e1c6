"""Events of a job as MCP progress.

Always rising, never silent for long.
"""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio

from engine.contract import Event, Loading, Queued, Result, Stage, Step
from klein_mcp.jobs.events import Progressed, Saving

HEARTBEAT = 4.0
"""Seconds; clients that count on progress give up after 5 to 60 s of silence."""

# Share of one image's progress at which a phase ends. Loading is long but rare, denoising is the work itself.
_QUEUED, _LOADED, _PROMPT, _REFERENCES, _DENOISED, _DECODED = 0.05, 0.3, 0.35, 0.4, 0.9, 0.95
_STAGES = {
    "prompt": (_LOADED, _PROMPT, "reading the prompt"),
    "references": (_PROMPT, _REFERENCES, "looking at the references"),
    "denoise": (_REFERENCES, _DENOISED, "painting"),
    "decode": (_DENOISED, _DECODED, "developing"),
}


class Progress:
    """Reports how far `images` images are, one after the other."""

    def __init__(self, report: Callable[[float, float, str], Awaitable[None]], images: int) -> None:
        self._send = report
        self._images = images
        self._image = 0
        self._value = 0.0
        self._message = "waiting for the engine"
        self._sent_at = time.monotonic()

    async def event(self, event: Progressed) -> None:
        """Report an event of a job."""
        share, self._message = describe(event.event)
        self._image = event.image
        await self._report(event.image + event.share(share))

    @asynccontextmanager
    async def heartbeat(self) -> AsyncIterator[None]:
        """Repeat the latest report while nothing happens."""
        failure = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._beat)
            try:
                yield
            except Exception as exc:  # out of the task group it would come wrapped in an ExceptionGroup
                failure = exc
            tasks.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _beat(self) -> None:
        while True:
            quiet = time.monotonic() - self._sent_at
            if quiet >= HEARTBEAT:
                await self._report(0.0)
                quiet = 0.0
            await anyio.sleep(HEARTBEAT - quiet)

    async def _report(self, value: float) -> None:
        # Strictly rising, as the protocol wants it: what brings no news moves a thousandth towards the end. The end
        # itself is never reported, or there would be nowhere to rise to while an image is saved or sent.
        ceiling = float(self._images)
        self._value = value if self._value < value < ceiling else self._value + (ceiling - self._value) / 1000
        self._sent_at = time.monotonic()
        counted = f"image {self._image + 1} of {self._images}: " if self._images > 1 else ""
        await self._send(round(100 * self._value, 4), 100 * ceiling, counted + self._message)


def describe(event: Event | Saving) -> tuple[float, str]:
    """Return how much of one image is done at `event`.

    0 … 1, and words for it.
    """
    match event:
        case Queued(position):
            return 0.0, f"{position} ahead in the queue" if position else "next in the queue"
        case Loading("auto", 0.0):  # no engine is there yet that could say which model that is
            return _QUEUED, "starting the engine"
        case Loading(model, fraction):
            return _QUEUED + fraction * (_LOADED - _QUEUED), f"loading {model} {fraction:.0%}"
        case Stage(name, fraction):
            begin, end, words = _STAGES[name]
            return begin + fraction * (end - begin), words
        case Step(done, total):
            return _REFERENCES + done / total * (_DENOISED - _REFERENCES), f"step {done} of {total}"
        case Result() | Saving():
            return _DECODED, "saving"
