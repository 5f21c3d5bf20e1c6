"""Where a job is painted: one verb, `run`, whatever stands behind it."""

from collections.abc import AsyncIterator, Mapping
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

    async def keep(self, order: Mapping[str, Any], *, client: str, made: Mapping[str, Any] | None = None) -> str:
        """Hand an order over: it is painted to its end and saved in the library even if nobody waits.

        order: `Order.to_json()` of what is still to be painted, with handles for references. Called while the
        iterator of `run` is still open, it takes that job with it; the iterator is closed afterwards.
        made: what of the call is finished already, given back by `kept` as it is.
        Returns the job's handle, for `kept`. Raises EngineError.
        """
        ...

    async def kept(self, job: str) -> dict[str, Any]:
        """How far an order is that was handed over; answers when it is done, or after a second or so.

        {"state": "queued" | "painting" | "done" | "failed", "progress": 0 … 1, "message", "eta_s": float | None,
        "made": as given to `keep`, "pictures": [{"handle", "seed", "model", "fingerprint", "steps", "guidance",
        "cache", "changed", "save_ms"}, …], "warnings": […], "ms": {…}, "error": {"message", "hint"} if it failed}
        Raises UnknownJob, EngineError.
        """
        ...

    async def status(self) -> dict[str, Any]:
        """What the engine holds and does: models, device, memory, queue. Never starts an engine."""
        ...


class UnknownJob(LookupError):
    """No such order was handed over, or it was long ago."""
