"""One job's state, in memory and in a file that survives restarts."""

import asyncio
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from engine.contract import EngineError, Loading, Queued, Stage, Step
from klein_mcp.errors import RequestError, explain
from klein_mcp.jobs.events import (
    LAST,
    Cancelled,
    Done,
    Failed,
    JobEvent,
    Listen,
    Progressed,
    error_from_json,
    error_to_json,
)
from klein_mcp.jobs.progress import describe
from klein_mcp.jobs.request import ImageRequest
from klein_mcp.jobs.results import SavedImage
from klein_mcp.jobs.status import JobState, JobStatus
from klein_mcp.jobs.turns import Ticket

STAGES = ("queue", "load", "prompt", "references", "denoise", "decode", "save")


def _one_line(error: EngineError | RequestError) -> str:
    return explain(error) if isinstance(error, EngineError) else str(error)


@dataclass(eq=False, slots=True)
class Listener:
    """Somebody who hears the events of a job.

    inbox: None in it ends what they hear, though the job is not over.
    """

    options: Listen
    inbox: "asyncio.Queue[JobEvent | None]" = field(default_factory=asyncio.Queue)


JobNews = tuple[JobStatus, JobEvent | None]
"""A job as it is now, and the event that made it so."""


class Watchers:
    """Everybody who follows all jobs.

    One that does not keep up misses the oldest news.
    """

    MOST = 256
    """News that may wait for a watcher, a few kilobytes each where they hold a preview."""

    def __init__(self) -> None:
        self._inboxes: set[asyncio.Queue[JobNews]] = set()

    def __bool__(self) -> bool:
        return bool(self._inboxes)

    def add(self) -> "asyncio.Queue[JobNews]":
        """Return the inbox of a new watcher."""
        inbox: asyncio.Queue[JobNews] = asyncio.Queue(self.MOST)
        self._inboxes.add(inbox)
        return inbox

    def remove(self, inbox: "asyncio.Queue[JobNews]") -> None:
        self._inboxes.discard(inbox)

    def tell(self, status: JobStatus, event: JobEvent | None) -> None:
        """Pass an event of a job on to all."""
        for inbox in self._inboxes:
            if inbox.full():
                inbox.get_nowait()
            inbox.put_nowait((status, event))


@dataclass(eq=False, slots=True)
class JobRecord:
    """A job.

    Its request, what is saved of it, its latest progress, and its listeners.
    saved: the first images of the request, in order. ending: its last event, once it is over.
    attempts: daemons whose engine began it, this one included where `begun`. changed: when its state last changed.
    ticket: its place in the queue.
    """

    id: str
    request: ImageRequest
    client: str
    created: float = field(default_factory=time.time)
    changed: float = field(default_factory=time.time)
    attempts: int = 0
    begun: bool = False
    detached: bool = False
    saved: list[SavedImage] = field(default_factory=list)
    warnings: tuple[str, ...] = ()
    ms: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    latest: Progressed | None = None
    ending: Done | Failed | Cancelled | None = None
    listeners: list[Listener] = field(default_factory=list)
    watchers: Watchers = field(default_factory=Watchers)
    cancelling: bool = False
    task: "asyncio.Task[None] | None" = None
    ticket: Ticket | None = None
    _began: float = field(default_factory=time.monotonic)
    _running_since: float | None = None
    _latest_at: float = 0.0

    @property
    def over(self) -> bool:
        return self.ending is not None

    @property
    def watched(self) -> bool:
        """Whether somebody wants previews of the steps."""
        return bool(self.watchers) or any(listener.options.steps for listener in self.listeners)

    def publish(self, event: JobEvent) -> None:
        """Tell all listeners."""
        if isinstance(event, Progressed):
            # Repeated every second, which a partial image is too large for.
            self.latest, self._latest_at = replace(event, partial=None), time.monotonic()
            if self._running_since is None and not isinstance(event.event, Queued):
                self._running_since = time.monotonic()
        elif isinstance(event, LAST):
            self.ending = event
            self.changed = time.time()
        for listener in self.listeners:
            listener.inbox.put_nowait(event)
        if self.watchers:
            self.watchers.tell(self.status(), event)

    def begin(self) -> bool:
        """Count this daemon as one that began the job.

        Returns whether it is news.
        """
        if self.begun:
            return False
        self.begun = True
        self.attempts += 1
        return True

    def add_ms(self, ms: Mapping[str, float]) -> None:
        """Add milliseconds by stage."""
        for stage, spent in ms.items():
            self.ms[stage] = self.ms.get(stage, 0.0) + spent

    def total_ms(self) -> dict[str, float]:
        """Return whole milliseconds by stage, over all images.

        Their total counts from when the job was submitted.
        """
        total = self.ms.get("total", 0.0) + 1000 * (time.monotonic() - self._began)
        return {stage: round(spent) for stage, spent in {**self.ms, "total": total}.items()}

    def all_warnings(self) -> tuple[str, ...]:
        """Warnings of its images, then of the request, each once.

        One that is not of all images names those it is of.
        """
        concerned: dict[str, list[str]] = {}
        for image in self.saved:
            for warning in dict.fromkeys(image.warnings):
                concerned.setdefault(warning, []).append(image.handle)
        of_images = (
            warning if len(handles) == len(self.saved) else f"{', '.join(handles)}: {warning}"
            for warning, handles in concerned.items()
        )
        return tuple(dict.fromkeys((*of_images, *self.warnings)))

    def status(self) -> JobStatus:
        """Describe the job now."""
        progress, message, eta = 0.0, "waiting", None
        if self.latest is not None:
            share, message = describe(self.latest.event)
            progress = (self.latest.image + self.latest.share(share)) / self.request.count
            eta = self._eta(progress)
        if self.ending is not None:
            progress, message, eta = 1.0 if isinstance(self.ending, Done) else progress, self.state, 0.0
        return JobStatus(
            job=self.id,
            client=self.client,
            tool=self.request.tool,
            prompt=self.request.prompt,
            count=self.request.count,
            state=self.state,
            progress=round(progress, 3),
            message=message,
            eta_s=eta,
            created=self.created,
            detached=self.detached,
            images=tuple(self.saved),
            error=_one_line(self.ending.error) if isinstance(self.ending, Failed) else "",
            model=self.request.model,
        )

    @property
    def state(self) -> JobState:
        match self.ending:
            case Done():
                return "done"
            case Failed():
                return "failed"
            case Cancelled():
                return "cancelled"
        return "queued" if self._running_since is None else "painting"

    def _eta(self, progress: float) -> float | None:
        if self.latest and isinstance(self.latest.event, Queued):
            seconds = self.latest.event.seconds
            return None if seconds is None else round(seconds, 1)
        if self.latest and isinstance(self.latest.event, Stage | Step) and self.latest.event.seconds is not None:
            return self._with_other_images(self.latest, self.latest.event.seconds)
        # Loading says nothing about painting: its share of the progress once promised 4 s of an image of 371.
        loading = self.latest is not None and isinstance(self.latest.event, Loading)
        if loading or self._running_since is None or progress <= 0.1:
            return None
        return round((time.monotonic() - self._running_since) * (1 - progress) / progress, 1)

    def _with_other_images(self, latest: Progressed, seconds: float) -> float:
        """Return the seconds left of all images of the job."""
        assert self._running_since is not None
        now = time.monotonic()
        each = (now - self._running_since + seconds) / (latest.image + 1)
        left = max(0.0, seconds - (now - self._latest_at))
        return round(left + each * (self.request.count - latest.image - 1), 1)

    # -- the file ------------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Write everything that the next daemon needs."""
        ending: dict[str, Any] | None = None
        if isinstance(self.ending, Failed):
            ending = {"error": error_to_json(self.ending.error)}
        elif self.ending is not None:
            ending = {"cancelled": isinstance(self.ending, Cancelled)}
        return {
            "request": self.request.to_json(),
            "client": self.client,
            "created": self.created,
            "changed": self.changed,
            "attempts": self.attempts,
            "saved": [asdict(image) for image in self.saved],
            "warnings": list(self.warnings),
            "ms": self.total_ms() if self.ending is None else dict(self.ms),
            "ending": ending,
        }

    @classmethod
    def from_json(cls, name: str, data: Mapping[str, Any]) -> "JobRecord":
        """Read a job that was detached. Raises KeyError, TypeError, ValueError or AttributeError."""
        if "order" in data:
            data = _from_0_1(data)
        record = cls(
            name,
            ImageRequest.from_json(data["request"]),
            str(data["client"]),
            created=_finite(data["created"]),
            changed=_finite(data["changed"]),
            attempts=int(data["attempts"]),
            detached=True,
            saved=[SavedImage.from_json(image) for image in data["saved"]],
            warnings=tuple(data["warnings"]),
            ms={stage: _finite(spent) for stage, spent in data["ms"].items()},
        )
        if ending := data["ending"]:
            done = Done(record.all_warnings(), dict(record.ms))
            cancelled = Cancelled() if ending.get("cancelled") else done
            record.ending = Failed(error_from_json(ending["error"])) if "error" in ending else cancelled
        return record


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} is no time")  # it could not be sent as JSON
    return number


def _from_0_1(data: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a job file of klein-mcp 0.1.

    Its request holds what was still to be done. Raises ValueError if it is done.
    Images that were finished before it was detached are in the library, and not in its result.
    """
    if data["state"] == "done":
        raise ValueError("its result is not in today's form; its images are in the library")
    ending = {"error": {"kind": "RequestError", **data["error"]}} if data["state"] == "failed" else None
    return {
        "request": data["order"],
        "client": data["client"],
        "created": data["since"],
        "changed": data["since"],
        "attempts": data["attempts"],
        "saved": [],
        "warnings": [],
        "ms": {},
        "ending": ending,
    }
