"""Which job runs next, what waiting ones hear, and how the queue ends."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from engine.contract import (
    Busy,
    DeviceLost,
    EngineFailed,
    Event,
    InvalidJob,
    Job,
    Result,
)
from klein_mcp.jobs import running
from klein_mcp.jobs.executor import nobody_watches
from klein_mcp.jobs.queue import Queue
from klein_mcp.jobs.timing import TimingHistory
from tests.embedded import SIDE
from tests.fakes import FakeExecutor
from tests.klein_mcp.stepping import IMAGE, StepExecutor, Waiter, until, working


def test_clients_take_turns_however_much_one_asks_for():
    executor = StepExecutor()
    with working(executor) as queue:
        greedy = [Waiter(queue, f"greedy {n}", "greedy") for n in range(4)]
        until(lambda: executor.began, "the first job never began")
        modest = [Waiter(queue, f"modest {n}", "modest") for n in range(2)]
        executor.go.release(100)
        for waiter in greedy + modest:
            assert isinstance(waiter.end, Result)
    assert executor.began == ["greedy 0", "modest 0", "greedy 1", "modest 1", "greedy 2", "greedy 3"]


def test_as_many_jobs_run_at_once_as_there_are_slots():
    executor = StepExecutor(slots=2)
    with working(executor) as queue:
        waiters = [Waiter(queue, str(n), str(n)) for n in range(4)]
        until(lambda: len(executor.began) == 2, "two never ran at once")
        until(lambda: waiters[2].positions[-1:] == [1], "the third never was next")
        assert waiters[3].positions[-1] == 2
        executor.go.release(100)
        assert all(isinstance(waiter.end, Result) for waiter in waiters)


def test_burst_before_there_is_an_executor_fills_every_slot():
    executor, ready = StepExecutor(slots=4), threading.Event()

    def make() -> StepExecutor:
        assert ready.wait(60)
        return executor

    queue = Queue(make, size=32, keep_alive=600)
    waiters = [Waiter(queue, str(n), str(n)) for n in range(4)]
    ready.set()
    until(lambda: len(executor.began) == 4, "four never ran at once")
    executor.go.release(100)
    assert all(isinstance(waiter.end, Result) for waiter in waiters)
    queue.close(10)


def test_burst_fills_slots_that_the_first_job_finds():
    """A cluster is asked how many engines it has by the first job that goes there."""

    class Cluster(StepExecutor):
        def run(self, job: Job, watched: Callable[[], bool] = nobody_watches) -> Iterator[Event]:
            self.slots = 4
            return super().run(job, watched)

    executor = Cluster()
    with working(executor) as queue:
        waiters = [Waiter(queue, str(n), str(n)) for n in range(5)]
        until(lambda: len(executor.began) == 4, "four never ran at once")
        until(lambda: waiters[-1].positions[-1:] == [1], "the fifth never was next")
        executor.go.release(100)
        assert all(isinstance(waiter.end, Result) for waiter in waiters)


def test_accepted_request_finds_a_place_in_a_full_queue():
    executor = StepExecutor()
    with working(executor, size=1) as queue:
        Waiter(queue, "running", "a")
        until(lambda: executor.began, "the first job never began")
        Waiter(queue, "waiting", "a")
        with pytest.raises(Busy):
            Waiter(queue, "new", "b")
        accepted = Waiter(queue, "accepted", "b", bypass_limit=True)
        executor.go.release(100)
        assert isinstance(accepted.end, Result)


def test_clients_in_a_loop_get_equal_service_whatever_they_send():
    executor, served, enough = StepExecutor(free=True), {"one": 0, "five": 0}, threading.Event()
    with working(executor) as queue:

        def loop(client: str) -> None:
            while not enough.is_set():
                if isinstance(Waiter(queue, client, client).end, Result) and not enough.is_set():
                    served[client] += 1
                if sum(served.values()) >= 60:
                    enough.set()
                time.sleep(0.002)  # an answer travels to its client and back

        executor.run = slow(executor.run)  # type: ignore[method-assign]
        threads = [threading.Thread(target=loop, args=(client,)) for client in ("one", *["five"] * 5)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert abs(served["one"] - served["five"]) <= 0.2 * max(served.values())


def slow(run):
    def slowly(job: Job, watched: Callable[[], bool]) -> Iterator[Event]:
        for event in run(job, watched):
            time.sleep(0.004)
            yield event

    return slowly


def test_waiting_jobs_hear_each_time_their_position_changes():
    executor = StepExecutor()
    with working(executor) as queue:
        first = Waiter(queue, "first", "a")
        until(lambda: executor.began == ["first"], "the first job never began")
        second, third = Waiter(queue, "second", "a"), Waiter(queue, "third", "b")
        executor.go.release(100)
        assert isinstance(third.end, Result)
        assert isinstance(first.end, Result)
    assert third.positions == [1]  # client b has not been served yet
    assert second.positions == [1, 2, 1]


def test_one_client_leaves_places_for_others():
    executor = StepExecutor()
    with working(executor, size=32) as queue:
        Waiter(queue, "running", "greedy")
        until(lambda: executor.began, "the first job never began")
        for _ in range(16):
            Waiter(queue, "greedy", "greedy")
        for _ in range(45 - 16):
            with pytest.raises(Busy, match="16 of your images are waiting; the other 16 places are for other clients"):
                Waiter(queue, "greedy", "greedy")
        modest = [Waiter(queue, "modest", "modest") for _ in range(6)]
        third = Waiter(queue, "third", "third")
        executor.go.release(1000)
        assert all(isinstance(waiter.end, Result) for waiter in [*modest, third])


def test_refusal_of_one_image_and_one_place_is_a_sentence():
    executor = StepExecutor()
    with working(executor, size=2) as queue:
        Waiter(queue, "running", "greedy")
        until(lambda: executor.began, "the first job never began")
        Waiter(queue, "waiting", "greedy")
        with pytest.raises(Busy, match=r"1 of your images is waiting; the other place is for other clients\."):
            Waiter(queue, "greedy", "greedy")


class ColdExecutor(FakeExecutor):
    """Needs three seconds to load its model, by its own account."""

    def run(self, job: Job, watched: Callable[[], bool] = nobody_watches) -> Iterator[Event]:
        for event in super().run(job, watched):
            cold = {"load": 3000.0, "denoise": 35.0, "decode": 5.0}
            yield replace(event, ms=cold) if isinstance(event, Result) else event


def test_seconds_of_an_image_leave_out_what_loading_took():
    history = TimingHistory()
    queue = Queue(ColdExecutor, size=4, keep_alive=600, history=history)
    try:
        assert isinstance(Waiter(queue, "first", "a").end, Result)
        assert history.tables()["nano"] == {f"{SIDE}x{SIDE}": 0.04}
    finally:
        queue.close(10)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 32])
def test_new_client_finds_a_place_until_the_queue_is_full(size: int):
    executor = StepExecutor()
    with working(executor, size=size) as queue:
        Waiter(queue, "running", "0")
        until(lambda: executor.began, "the first job never began")
        for client in range(size):
            if queue.status().waiting == size:
                break
            Waiter(queue, "new", str(client))
            with contextlib.suppress(Busy):
                while True:
                    Waiter(queue, "more", str(client))
        assert queue.status().waiting == size


class OddHistory(TimingHistory):
    """Fails as one would that a file or a job makes divide by zero."""

    def seconds(self, job: Job) -> float | None:
        raise ZeroDivisionError

    def note(self, job: Job, result: Result, seconds: float) -> None:
        raise OverflowError


def test_history_that_fails_stops_no_job():
    executor = StepExecutor(free=True)
    queue = Queue(lambda: executor, size=32, keep_alive=600, history=OddHistory())
    try:
        for _ in range(2):
            assert isinstance(Waiter(queue, "image", "a").end, Result)
    finally:
        queue.close(10)


class SlowHistory(TimingHistory):
    """Fails if it is read while it changes."""

    changing, changed = threading.Event(), threading.Event()

    def note(self, job: Job, result: Result, seconds: float) -> None:
        self.changing.set()
        time.sleep(0.2)
        self.changed.set()

    def tables(self) -> dict[str, dict[str, float]]:
        assert self.changed.is_set()
        return {}


def test_seconds_are_not_read_while_they_change():
    executor, history = StepExecutor(free=True), SlowHistory()
    queue = Queue(lambda: executor, size=32, keep_alive=600, history=history)
    Waiter(queue, "image", "a")
    assert history.changing.wait(60)
    assert queue.seconds() == {}
    queue.close(10)


def test_death_of_the_thread_tells_everybody_and_closes_the_queue(monkeypatch: pytest.MonkeyPatch):
    executor, died = StepExecutor(), threading.Event()
    queue = Queue(lambda: executor, size=32, keep_alive=600, on_death=died.set)
    first, second = Waiter(queue, "first", "a"), Waiter(queue, "second", "b")
    until(lambda: executor.began, "the first job never began")
    monkeypatch.setattr(running, "run", None)  # an error of ours, in the loop itself
    executor.go.release(100)
    assert died.wait(10)
    for waiter in (first, second):
        assert isinstance(waiter.end, Result | EngineFailed)
    assert isinstance(second.end, EngineFailed)
    with pytest.raises(EngineFailed):
        Waiter(queue, "late", "a")


@contextlib.contextmanager
def replaceable() -> Iterator[tuple[Queue, StepExecutor, list[bool]]]:
    """Yield a queue, its executor, and a list that grows each time the engine is found to be broken."""
    executor, broken = StepExecutor(free=True), []
    queue = Queue(lambda: executor, size=32, keep_alive=600, on_broken=lambda: broken.append(True))
    try:
        yield queue, executor, broken
    finally:
        queue.close(10)


def has_ended() -> bool:
    return not [thread for thread in threading.enumerate() if thread.name.startswith("executor-")]


def test_three_jobs_that_break_off_in_a_row_end_the_queue():
    with replaceable() as (queue, executor, broken):
        for prompt in ("break", "break", "fine", "break", "refuse", "break", "refuse"):
            assert isinstance(Waiter(queue, prompt, "a").end, Result | EngineFailed | InvalidJob)
        assert not broken
        assert not queue.is_broken
        assert "ZeroDivisionError" in str(Waiter(queue, "break", "a").end)
        assert broken == [True]
        assert queue.is_broken
        late = Waiter(queue, "late", "b")
        until(has_ended, "the thread went on")
        assert "late" not in executor.began
        assert not late.over.is_set(), "whoever takes over is asked for it"


def test_lost_device_ends_the_queue_at_once():
    with replaceable() as (queue, _, broken):
        assert isinstance(Waiter(queue, "lose", "a").end, DeviceLost)
        assert broken == [True]
        until(has_ended, "the thread went on")


def test_device_that_is_lost_while_the_engine_is_idle_ends_the_queue():
    def lose(image: object) -> bool:
        raise DeviceLost("The GPU no longer answers.")

    with replaceable() as (queue, executor, broken):
        executor.prefetch = lose  # type: ignore[method-assign]
        assert isinstance(Waiter(queue, "fine", "a").end, Result)
        queue.prefetch(IMAGE)
        until(has_ended, "the thread went on")
        assert broken == [True]


def test_broken_engine_that_nobody_replaces_runs_on():
    with working(StepExecutor(free=True)) as queue:
        assert isinstance(Waiter(queue, "lose", "a").end, DeviceLost)
        assert queue.is_broken
        assert isinstance(Waiter(queue, "fine", "a").end, Result)
        assert not queue.is_broken


def test_full_queue_says_how_many_wait_and_when_to_retry():
    executor = StepExecutor()
    with working(executor, size=2) as queue:
        Waiter(queue, "running", "a")
        until(lambda: executor.began, "the first job never began")
        waiting = [Waiter(queue, "waiting", "a"), Waiter(queue, "waiting", "b")]
        with pytest.raises(Busy, match=r"2 images are waiting, at most 2 may") as full:
            Waiter(queue, "one too many", "c")
        assert full.value.retry_after >= 1
        executor.go.release(100)
        assert all(isinstance(waiter.end, Result) for waiter in waiting)
        assert isinstance(Waiter(queue, "later", "c").end, Result)


def test_job_cancelled_while_it_waits_never_begins():
    executor = StepExecutor()
    with working(executor) as queue:
        Waiter(queue, "running", "a")
        until(lambda: executor.began, "the first job never began")
        doomed, last = Waiter(queue, "doomed", "a"), Waiter(queue, "last", "a")
        queue.cancel(doomed.ticket)
        queue.cancel(doomed.ticket)
        assert last.positions == [2, 1]
        executor.go.release(100)
        assert isinstance(last.end, Result)
    assert "doomed" not in executor.began


def test_closing_tells_every_waiter_and_takes_no_job_more():
    executor = StepExecutor()
    with working(executor) as queue:
        waiters = [Waiter(queue, f"{n}", "a") for n in range(3)]
        until(lambda: executor.began, "the first job never began")
        queue.close()
        for waiter in waiters:
            assert isinstance(waiter.end, EngineFailed)
        with pytest.raises(EngineFailed, match="stopped"):
            Waiter(queue, "late", "a")
    assert executor.stopped == ["0"]
