"""Reads the events that an engine elsewhere sends, which may be anything."""

from collections.abc import Generator
from typing import TYPE_CHECKING

from engine.contract import EngineError, EngineFailed, Event, Exact, Job, KeepSource, Result
from klein_mcp.daemon import wire
from klein_mcp.daemon.executors.node import NodeFailed
from klein_mcp.limits import MAX_AREA

if TYPE_CHECKING:
    import httpx2

MOST_EVENTS = 100_000
"""Events of one job: one a second for a day. A node that sends more is broken."""

PIXEL_BYTES = 4
"""Bytes of a pixel of a result: its colour, and its opacity in the change mask."""

EVENT_BYTES = 1_000_000
"""Bytes of an event besides a result's pixels: its header and a preview."""


def read_events(job: Job, response: "httpx2.Response") -> Generator[Event, None, bool]:
    """Yield events and return whether the result came.

    Raises NodeFailed for what no honest engine sends.
    """
    frames, count = wire.Frames(_pixels(job) * PIXEL_BYTES + EVENT_BYTES), 0
    for chunk in response.iter_raw():
        for frame in frames.feed(chunk):
            event = wire.decode(frame)
            count += 1
            if isinstance(event, EngineFailed):
                raise NodeFailed(str(event))
            if isinstance(event, EngineError):
                raise event
            if isinstance(event, Job) or count > MOST_EVENTS:
                raise NodeFailed("it sends what is no event")
            if isinstance(event, Result):
                check_result(job, event)
            yield event
            if isinstance(event, Result):
                return True
    return False


def _pixels(job: Job) -> int:
    """Return the most pixels that an honest result has."""
    asked = _asked_size(job)
    return asked[0] * asked[1] if asked else MAX_AREA


def _asked_size(job: Job) -> tuple[int, int] | None:
    """Return the job's width and height, None where the model decides."""
    match job.size:
        case Exact(width, height):
            return width, height
        case KeepSource() if job.references:
            height, width = job.references[0].shape[:2]
            return width, height
    return None


def check_result(job: Job, result: Result) -> None:
    """Raise NodeFailed for a result that does not answer the job."""
    height, width = result.image.shape[:2]
    if (_asked_size(job) or (width, height)) != (width, height) or result.seed != job.seed:
        raise NodeFailed(f"its result is {width}×{height} with seed {result.seed}, which was not asked for")
