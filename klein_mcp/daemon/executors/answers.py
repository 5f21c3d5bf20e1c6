"""Reads the events that an engine elsewhere sends, which may be anything."""

import json
import time
from collections.abc import Generator
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

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

MOST_BYTES = 1_000_000
"""Bytes of what a node says about itself: a cluster of 1,000 engines says 300 kB."""

MOST_NUMBER = 2**63
"""The largest number in what a node says; a longer one could not be printed as gigabytes."""

SLOWEST = 10_000
"""Bytes a second: a node that takes longer for an event does not mean to end it."""

T = TypeVar("T")


def get_json(http: "httpx2.Client", url: str, seconds: float, **options: Any) -> Any:
    """Return the JSON at `url`. Raises NodeFailed, ValueError or HTTPError."""
    with http.stream("GET", url, timeout=seconds, **options) as response:
        return read_json(response, seconds)


def read_json(response: "httpx2.Response", seconds: float) -> Any:
    """Return the JSON of an answer, bounded in bytes and in time.

    Whoever answers has not proved anything yet. Raises NodeFailed or ValueError.
    """
    data, deadline = bytearray(), time.monotonic() + seconds
    for chunk in response.iter_raw():
        data += chunk
        if len(data) > MOST_BYTES:
            raise NodeFailed("it does not answer as klein-mcp engine does (it sends without end)")
        if time.monotonic() > deadline:
            raise NodeFailed(f"it has not answered within {seconds:g} s")
    try:
        return json.loads(data, parse_int=_integer)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _integer(digits: str) -> int:
    value = int(digits)
    if abs(value) > MOST_NUMBER:
        raise ValueError("a number without end")
    return value


def read_fields(kind: type[T], data: Any) -> T:
    """Build a value of dataclasses from JSON.

    Unlike their constructors it checks the type of each field. Raises ValueError.
    """
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_python(data)
    except ValidationError as exc:
        first = exc.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


@cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter  # 0.1 s, and only a daemon of engines elsewhere needs it

    return TypeAdapter(kind)


def read_events(job: Job, response: "httpx2.Response", silence: float) -> Generator[Event, None, bool]:
    """Yield events and return whether the result came.

    silence: seconds that an event may take, besides its bytes. Raises NodeFailed for what no honest engine sends.
    """
    frames, count = wire.Frames(_pixels(job) * PIXEL_BYTES + EVENT_BYTES), 0
    since, received = time.monotonic(), 0
    for chunk in response.iter_raw():
        received += len(chunk)
        if time.monotonic() > since + silence + received / SLOWEST:
            raise NodeFailed(f"it has completed no event for {silence:g} s")
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
            since, received = time.monotonic(), 0  # after whoever took the event: that is no silence of the node
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
