"""How a painting call ends: with its pictures, or handed over to go on without its caller."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from klein_mcp.images.library import Store

if TYPE_CHECKING:
    from klein_mcp.jobs.save import SavedImage


@dataclass(frozen=True, slots=True)
class JobResult:
    """What a call brought: pictures, what to know about them, and milliseconds by stage."""

    made: tuple["SavedImage", ...]
    warnings: tuple[str, ...]
    ms: dict[str, float]


@dataclass(frozen=True, slots=True)
class PendingJob:
    """What goes on in the engine's process. progress: 0 … 1; eta_s: seconds, None while nobody can say."""

    job: str
    state: str
    progress: float
    message: str
    eta_s: float | None
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(cls, job: str, state: Mapping[str, Any]) -> "PendingJob":
        """state: as Backend.kept tells it."""
        return cls(job, state["state"], state["progress"], state["message"], state["eta_s"])


def outcome_of(state: Mapping[str, Any], store: Store) -> JobResult:
    """Of a job that is done: what the caller had already, and what was painted since. Blocking."""
    from klein_mcp.jobs.save import SavedImage

    before: Mapping[str, Any] = state.get("made") or {"pictures": [], "warnings": [], "ms": {}}
    pictures = [SavedImage.from_json(picture, store) for picture in (*before["pictures"], *state["pictures"])]
    ms = {stage: before["ms"].get(stage, 0) + spent for stage, spent in state["ms"].items()}
    return JobResult(tuple(pictures), (*before["warnings"], *state["warnings"]), ms)
