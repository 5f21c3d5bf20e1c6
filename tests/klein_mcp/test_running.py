"""Tests of a job that runs: its events, its errors, and how it is cancelled."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from engine.contract import (
    EngineError,
    EngineFailed,
    Event,
    Exact,
    InvalidJob,
    Job,
    Native,
    Result,
    Stage,
)
from klein_mcp.jobs import running
from klein_mcp.jobs.executor import nobody_watches
from klein_mcp.jobs.status import QueueStatus
from tests.klein_mcp.stepping import IMAGE, StepExecutor, Waiter, until, working


def test_watched_may_change_while_a_job_runs():
    executor = StepExecutor()
    with working(executor) as queue:
        waiter = Waiter(queue, "a", "a")
        executor.go.release()
        until(lambda: executor.previews == [False], "the first step was never taken")
        waiter.ticket.watched = True
        executor.go.release(2)
        assert isinstance(waiter.end, Result)
    assert executor.previews == [False, True, True]


@pytest.mark.parametrize("odd", [{"size": "wide"}, {"size": Exact(10**400, 3)}, {"prompt": 7}])
def test_job_with_odd_values_is_an_error_and_the_next_runs(odd: dict[str, Any]):
    class Strict(StepExecutor):
        def run(self, job: Job, watched: Callable[[], bool] = nobody_watches) -> Iterator[Event]:
            if not isinstance(job.prompt, str) or job.size != Native():  # as the engine does
                raise TypeError("a job of another kind")
            return super().run(job, watched)

    with working(Strict(free=True)) as queue:
        ended = threading.Event()

        def tell(event: Event | EngineError) -> None:
            if isinstance(event, EngineError):
                ended.set()

        job = Job(**{"prompt": "x", **odd})
        queue.put(job, "a", tell)
        assert ended.wait(10)
        assert isinstance(Waiter(queue, "fine", "a").end, Result)


def test_cancelled_job_stops_within_a_step_and_the_next_begins():
    executor = StepExecutor()
    with working(executor) as queue:
        doomed, next_one = Waiter(queue, "doomed", "a"), Waiter(queue, "next", "b")
        executor.go.release()
        until(lambda: executor.steps == ["doomed"], "the first step was never taken")
        queue.cancel(doomed.ticket)
        executor.go.release(100)
        assert isinstance(next_one.end, Result)
        assert not doomed.over.is_set()
    assert executor.stopped == ["doomed"]
    assert executor.steps.count("doomed") <= 2


def test_engine_error_reaches_its_caller_and_the_next_job_runs():
    with working(StepExecutor(free=True)) as queue:
        assert isinstance(Waiter(queue, "refuse", "a").end, InvalidJob)
        broken = Waiter(queue, "break", "a").end
        assert isinstance(broken, EngineFailed)
        assert "ZeroDivisionError: by nothing" in str(broken)
        assert "\n" not in str(broken)
        assert isinstance(Waiter(queue, "fine", "a").end, Result)
        assert queue.status() == QueueStatus(waiting=0, size=32, clients=0, running=False, done=1, failed=2)


class PromptExecutor(StepExecutor):
    """Reads a prompt of a hundred layers, each when `go` is released."""

    def run(self, job: Job, watched: Callable[[], bool] = nobody_watches) -> Iterator[Event]:
        try:
            for layer in range(100):
                assert self.go.acquire(timeout=120)
                self.steps.append(job.prompt)
                yield Stage("prompt", layer / 100)
            yield Stage("denoise")
            yield Result(IMAGE, job.seed, "fake", "", 3, 1.0)
        except GeneratorExit:
            self.stopped.append(job.prompt)
            raise


def test_job_cancelled_while_its_prompt_is_read_stops_before_the_next_layer() -> None:
    executor = PromptExecutor()
    with working(executor) as queue:
        waiter = Waiter(queue, "long", "a")
        executor.go.release(3)
        while len(executor.steps) < 3:
            assert not waiter.over.is_set()
        queue.cancel(waiter.ticket)
        executor.go.release(97)
        other = Waiter(queue, "next", "a")
        executor.go.release(100)
        assert isinstance(other.end, Result)
    # One layer may have begun before the cancellation was seen.
    assert executor.steps.count("long") <= 4
    assert executor.stopped == ["long"]


def test_layers_of_a_prompt_are_reported_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    reported = []
    for pause in (3600.0, 0.0):
        monkeypatch.setattr(running, "STAGE_PAUSE", pause)
        with working(PromptExecutor(free=True)) as queue:
            waiter = Waiter(queue, "fast", "a")
            assert isinstance(waiter.end, Result)
        reported.append([event.name for event in waiter.events if isinstance(event, Stage)])
    assert reported == [["prompt", "denoise"], ["prompt"] * 100 + ["denoise"]]
