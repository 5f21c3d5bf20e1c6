"""Events of the engine as MCP progress: always rising, never silent for long."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio

from engine.contract import Event, Loading, Queued, Result, Stage, Step

HEARTBEAT = 4.0
"""Seconds; clients that count on progress give up after 5 to 60 s of silence."""

# Share of one picture's progress at which a phase ends. Loading is long but rare, denoising is the work itself.
_QUEUED, _LOADED, _PROMPT, _REFERENCES, _DENOISED, _DECODED = 0.05, 0.3, 0.35, 0.4, 0.9, 0.95
_STAGES = {
    "prompt": (_LOADED, "reading the prompt"),
    "references": (_PROMPT, "looking at the references"),
    "denoise": (_REFERENCES, "painting"),
    "decode": (_DENOISED, "developing"),
}


class Progress:
    """Tells how far `pictures` pictures are, one after the other."""

    def __init__(self, tell: Callable[[float, float, str], Awaitable[None]], pictures: int) -> None:
        self._tell = tell
        self._pictures = pictures
        self._finished = 0
        self._value = 0.0
        self._message = "waiting for the engine"
        self._told = time.monotonic()

    async def event(self, event: Event) -> None:
        share, self._message = read(event)
        await self._report(self._finished + share)

    def saved(self) -> None:
        """One picture more is finished."""
        self._finished += 1

    async def share(self, share: float, message: str) -> None:
        """For work that somebody else follows: 0 … 1 of all pictures."""
        self._message = message
        await self._report(share * self._pictures)

    @asynccontextmanager
    async def heartbeat(self) -> AsyncIterator[None]:
        """Says the latest again while nothing happens."""
        failure = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._beat)
            try:
                yield
            except Exception as problem:  # out of the task group it would come wrapped in an ExceptionGroup
                failure = problem
            tasks.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _beat(self) -> None:
        while True:
            quiet = time.monotonic() - self._told
            if quiet >= HEARTBEAT:
                await self._report(0.0)
                quiet = 0.0
            await anyio.sleep(HEARTBEAT - quiet)

    async def _report(self, value: float) -> None:
        # Strictly rising, as the protocol wants it: what brings no news moves a thousandth towards the end. That is
        # never told, or there would be nowhere to rise to while a picture is saved or sent.
        ceiling = float(self._pictures)
        self._value = value if self._value < value < ceiling else self._value + (ceiling - self._value) / 1000
        self._told = time.monotonic()
        counted = f"picture {self._finished + 1} of {self._pictures}: " if self._pictures > 1 else ""
        await self._tell(round(100 * self._value, 4), 100 * ceiling, counted + self._message)


def read(event: Event) -> tuple[float, str]:
    """How much of one picture is done when this is said, 0 … 1, and what to say."""
    match event:
        case Queued(position):
            return 0.0, f"{position} ahead in the queue" if position else "next in the queue"
        case Loading("auto", 0.0):  # no engine is there yet that could say which model that is
            return _QUEUED, "starting the engine"
        case Loading(model, fraction):
            return _QUEUED + fraction * (_LOADED - _QUEUED), f"loading {model} {fraction:.0%}"
        case Stage(name):
            return _STAGES[name]
        case Step(done, total):
            return _REFERENCES + done / total * (_DENOISED - _REFERENCES), f"step {done} of {total}"
        case Result():
            return _DECODED, "saving"
