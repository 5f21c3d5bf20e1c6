"""Runs one job and tells its events, frequent ones now and then."""

import logging
import time
from collections.abc import Callable
from contextlib import closing

from engine.contract import EngineError, EngineFailed, Loading, Result, Stage
from klein_mcp.jobs.executor import Executor
from klein_mcp.jobs.turns import Ticket

log = logging.getLogger(__name__)

STAGE_PAUSE = 0.5
"""Seconds between two events of one stage that listeners hear of."""


def run(ticket: Ticket, ready: Callable[[Ticket], Executor], began: Callable[[], None]) -> Result | EngineError | None:
    """Return a job's result or error, None if it was cancelled.

    ready: returns the executor, which may have to be made first. began: called with the first event.
    """
    try:
        return _pass_events(ready(ticket), ticket, began)
    except EngineError as exc:
        # Its traceback and its cause hold the frames it came from, and these whatever they had loaded.
        exc.__cause__ = exc.__context__ = None
        return exc.with_traceback(None)
    except Exception as exc:
        log.exception("the engine broke off")
        ticket.broke_off = True
        reason = f"{type(exc).__name__}: {(str(exc).splitlines() or [''])[0]}".rstrip(": ")
        return EngineFailed(
            f"The engine broke off: {reason}.",
            hint="Its log, named by `klein-mcp status`, has the details.",
        )


def _pass_events(executor: Executor, ticket: Ticket, began: Callable[[], None]) -> Result | None:
    with closing(executor.run(ticket.job, lambda: ticket.watched)) as events:  # type: ignore[type-var]
        last_percent = None
        stage, stage_at = "", 0.0
        first, result = True, None
        for event in events:
            if first:
                first = False
                began()
            if ticket.cancelled:
                return None
            if isinstance(event, Result):
                result = event
                continue
            if isinstance(event, Loading):
                # The engine yields after each of some hundred tensors; a hundred events are enough.
                percent = int(100 * event.fraction)
                if percent == last_percent:
                    continue
                last_percent = percent
            if isinstance(event, Stage):
                # It yields after each layer of a prompt, too: on a fast machine hundreds in a second.
                now = time.monotonic()
                if event.name == stage and now < stage_at + STAGE_PAUSE:
                    continue
                stage, stage_at = event.name, now
            ticket.tell(event)
    if not result:
        ticket.broke_off = True
        raise EngineFailed("The engine ended without an image.", hint="Try again; `klein-mcp doctor` looks for causes.")
    return result
