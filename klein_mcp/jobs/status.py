"""Status of jobs, queue and daemon, and its one JSON form."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from engine.contract import EngineStatus
from engine.families.klein.variants import VARIANTS
from klein_mcp.jobs.results import SavedImage

JobState = Literal["queued", "painting", "done", "failed", "cancelled"]
OVER = ("done", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class JobStatus:
    """A job and its progress, 0 … 1.

    eta_s: seconds, None while unknown. error: one line, "" where there is none.
    model: as it was asked for; a daemon of an older build does not tell it.
    """

    job: str
    client: str
    tool: str
    prompt: str
    count: int
    state: JobState
    progress: float
    message: str
    eta_s: float | None
    created: float
    detached: bool = False
    images: tuple[SavedImage, ...] = ()
    error: str = ""
    model: str = "auto"


@dataclass(frozen=True, slots=True)
class QueueStatus:
    """Counts of jobs.

    done: jobs that have ended since the daemon started. size: jobs that may wait.
    """

    waiting: int
    size: int
    clients: int
    running: bool
    done: int
    failed: int


@dataclass(frozen=True, slots=True)
class DaemonStatus:
    """Everything the daemon tells about itself.

    running: whether there is one. silent: its process is there and does not answer.
    seconds: by model and size, how long an image of the default steps takes here. engine: None before the first image.
    """

    running: bool
    silent: bool = False
    version: str = ""
    pid: int = 0
    started: str = ""
    log: str = ""
    draining: bool = False
    queue: QueueStatus | None = None
    seconds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    engine: EngineStatus | None = None

    def seconds_per_image(self, model: str) -> float | None:
        """Return the seconds of an image of a model's own size."""
        sizes = self.seconds.get(model)
        if not sizes:
            return None
        side = VARIANTS[model].native_size if model in VARIANTS else 0
        return sizes.get(f"{side}x{side}", next(iter(sizes.values())))


def to_json(status: DaemonStatus | JobStatus | QueueStatus) -> dict[str, Any]:
    """Write any status.

    What a daemon does not know is left out.
    """
    if not isinstance(status, DaemonStatus):
        return asdict(status)
    if not status.running:
        return {"running": False, **({"silent": True} if status.silent else {})}
    values = asdict(status)
    del values["silent"]
    if status.engine:
        values["engine"] = status.engine.to_json()
    else:
        del values["engine"]
    return values


def daemon_from_json(data: Mapping[str, Any]) -> DaemonStatus:
    """Raises KeyError, TypeError or ValueError."""
    values = dict(data)
    if queue := values.get("queue"):
        values["queue"] = QueueStatus(**queue)
    if engine := values.get("engine"):
        values["engine"] = EngineStatus.from_json(engine)
    return DaemonStatus(**values)


def job_from_json(data: Mapping[str, Any]) -> JobStatus:
    """Raises KeyError, TypeError or ValueError."""
    return JobStatus(**{**data, "images": tuple(SavedImage.from_json(image) for image in data["images"])})
