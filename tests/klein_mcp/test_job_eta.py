"""Tests of the seconds that a job's status promises."""

import pytest

from engine.contract import Loading, Queued, Stage, Step
from klein_mcp.jobs import record as record_module
from klein_mcp.jobs.events import Progressed
from klein_mcp.jobs.record import JobRecord
from klein_mcp.jobs.request import ImageRequest
from klein_mcp.studio.feed import _Job


class Clock:
    now = 1000.0

    @classmethod
    def monotonic(cls) -> float:
        return cls.now

    @staticmethod
    def time() -> float:
        return 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> type[Clock]:
    monkeypatch.setattr(record_module, "time", Clock)
    monkeypatch.setattr(Clock, "now", 1000.0)
    return Clock


def test_loading_promises_nothing(clock: type[Clock]) -> None:
    job = JobRecord("j0", ImageRequest("generate_image", "x"), "a")
    job.publish(Progressed(0, Queued(0, 12.0437)))
    assert job.status().eta_s == 12
    job.publish(Progressed(0, Loading("nano", 0.5)))
    clock.now += 5
    assert job.status().eta_s is None


def test_estimate_of_the_engine_counts_down(clock: type[Clock]) -> None:
    job = JobRecord("j0", ImageRequest("generate_image", "x"), "a")
    job.publish(Progressed(0, Stage("prompt", 0.0, 371.0)))
    assert job.status().eta_s == 371
    clock.now += 21
    assert job.status().eta_s == 350
    job.publish(Progressed(0, Step(1, 4, seconds=200.0)))
    assert job.status().eta_s == 200
    clock.now += 300
    assert job.status().eta_s == 0


def test_later_images_are_counted_like_the_one_being_painted(clock: type[Clock]) -> None:
    job = JobRecord("j0", ImageRequest("generate_image", "x", count=4), "a")
    job.publish(Progressed(0, Stage("prompt", 0.0, 100.0)))
    assert job.status().eta_s == 400
    clock.now += 150
    job.publish(Progressed(1, Stage("denoise", 0.0, 50.0)))
    assert job.status().eta_s == 50 + 2 * 100


def test_progress_rises_within_a_step_and_meets_it_at_its_end() -> None:
    """On a slow processor a step takes minutes."""
    events = [Stage("prompt", 0.5), Stage("denoise"), Stage("denoise", 0.1), Stage("denoise", 0.24), Step(1, 4),
              Stage("denoise", 0.3), Stage("denoise", 0.5), Step(2, 4), Stage("decode")]  # fmt: skip
    job, shares = JobRecord("j0", ImageRequest("generate_image", "x"), "a"), []
    for event in events:
        job.publish(Progressed(0, event))
        shares.append(job.status().progress)
    assert shares == sorted(shares)
    assert shares[6] == shares[7], "half of the stage is the second of four steps"


def test_the_studios_meter_rises_within_a_step() -> None:
    running, seen = _Job(JobRecord("j0", ImageRequest("generate_image", "x", count=2), "a").status()), []
    for event in (Stage("denoise"), Stage("denoise", 0.2), Step(1, 4), Stage("denoise", 0.5), Step(2, 4)):
        running.apply(Progressed(0, event))
        seen.append((running.view["step"], running.view["fraction"]))
    assert seen == [(None, None), (None, 0.1), (1, 0.125), (1, 0.25), (2, 0.25)]
