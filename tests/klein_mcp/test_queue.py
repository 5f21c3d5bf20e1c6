"""Who paints next, what the waiting are told, and how a job is put down."""

import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from engine.contract import (
    Busy,
    EngineError,
    EngineFailed,
    EngineStatus,
    Event,
    InvalidJob,
    Job,
    Queued,
    Result,
    Stage,
    Step,
)
from klein_mcp.jobs import queue as queues
from klein_mcp.jobs.queue import Queue
from klein_mcp.jobs.timing import TimingHistory


class Executor:
    """Takes a step each time `go` is released; remembers whose jobs it began and which it put down."""

    def __init__(self, *, free: bool = False) -> None:
        self.go = threading.Semaphore(10**6 if free else 0)
        self.began: list[str] = []
        self.put_down: list[str] = []
        self.steps: list[str] = []
        self.prefetched: list[int] = []
        self.released = threading.Event()

    def run(self, job: Job) -> Iterator[Event]:
        self.began.append(job.prompt)
        if job.prompt == "refuse":
            raise InvalidJob("No.")
        if job.prompt == "break":
            raise ZeroDivisionError("by nothing")
        try:
            yield Stage("denoise")
            for done in range(1, 4):
                assert self.go.acquire(timeout=10)
                self.steps.append(job.prompt)
                yield Step(done, 3)
            yield Result(np.zeros((1, 1, 3), np.uint8), job.seed, "fake", "", 3, 1.0)
        except GeneratorExit:
            self.put_down.append(job.prompt)
            raise

    def status(self) -> EngineStatus:
        return EngineStatus("cpu", "float32", 1, free_bytes=len(self.began))

    def prefetch(self) -> bool:
        """Once a lull; remembers how many jobs had begun by then."""
        self.prefetched.append(len(self.began))
        return False

    def release(self) -> None:
        self.released.set()


class Waiter:
    """One caller: what it was told, and whether that was the end."""

    def __init__(self, queue: Queue, prompt: str, client: str) -> None:
        self.told: list[Event | EngineError] = []
        self.over = threading.Event()
        self.tell = self._tell  # one object, by which the queue knows whose ticket it is
        self.ticket = queue.put(Job(prompt), client, self.tell)

    def _tell(self, event: Event | EngineError) -> None:
        self.told.append(event)
        if isinstance(event, Result | EngineError):
            self.over.set()

    @property
    def end(self) -> Event | EngineError:
        assert self.over.wait(10)
        return self.told[-1]

    @property
    def positions(self) -> list[int]:
        return [event.position for event in self.told if isinstance(event, Queued)]


@contextmanager
def working(painter: Executor, *, size: int = 32, keep_alive: float = 600.0) -> Iterator[Queue]:
    queue = Queue(lambda: painter, size=size, keep_alive=keep_alive)
    worker = threading.Thread(target=queue.work)
    worker.start()
    try:
        yield queue
    finally:
        queue.close()
        painter.go.release(10**6)
        worker.join(10)
        assert not worker.is_alive()


def until(condition, what: str) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def test_clients_take_turns_however_much_one_of_them_asks_for():
    painter = Executor()
    with working(painter) as queue:
        greedy = [Waiter(queue, f"greedy {n}", "greedy") for n in range(4)]
        until(lambda: painter.began, "the first job never began")
        modest = [Waiter(queue, f"modest {n}", "modest") for n in range(2)]
        painter.go.release(100)
        for waiter in greedy + modest:
            assert isinstance(waiter.end, Result)
    assert painter.began == ["greedy 0", "modest 0", "greedy 1", "modest 1", "greedy 2", "greedy 3"]


def test_the_engine_works_ahead_only_when_the_next_job_does_not_follow_at_once(monkeypatch):
    monkeypatch.setattr(queues, "LULL", 2.0)
    painter = Executor(free=True)
    with working(painter) as queue:
        for n in range(3):
            assert isinstance(Waiter(queue, f"picture {n}", "one").end, Result)
        until(lambda: painter.prefetched, "it never worked ahead")
        assert painter.prefetched == [3]


def test_two_clients_that_loop_get_equal_service_though_one_sends_five_at_a_time():
    painter, served, enough = Executor(free=True), {"one": 0, "five": 0}, threading.Event()
    with working(painter) as queue:

        def loop(client: str) -> None:
            while not enough.is_set():
                if isinstance(Waiter(queue, client, client).end, Result) and not enough.is_set():
                    served[client] += 1
                if sum(served.values()) >= 60:
                    enough.set()
                time.sleep(0.002)  # an answer travels to its client and back

        painter.run = slow(painter.run)  # type: ignore[method-assign]
        threads = [threading.Thread(target=loop, args=(client,)) for client in ("one", *["five"] * 5)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert abs(served["one"] - served["five"]) <= 0.2 * max(served.values())


def slow(run):
    def slowly(job: Job) -> Iterator[Event]:
        for event in run(job):
            time.sleep(0.004)
            yield event

    return slowly


def test_the_waiting_are_told_each_time_their_place_changes():
    painter = Executor()
    with working(painter) as queue:
        first = Waiter(queue, "first", "a")
        until(lambda: painter.began == ["first"], "the first job never began")
        second, third = Waiter(queue, "second", "a"), Waiter(queue, "third", "b")
        painter.go.release(100)
        assert isinstance(third.end, Result)
        assert isinstance(first.end, Result)
    assert third.positions == [1]  # client b has not been served yet
    assert second.positions == [1, 2, 1]


def test_a_full_queue_says_how_many_wait_and_when_to_come_again():
    painter = Executor()
    with working(painter, size=2) as queue:
        Waiter(queue, "running", "a")
        until(lambda: painter.began, "the first job never began")
        waiting = [Waiter(queue, "waiting", "a"), Waiter(queue, "waiting", "b")]
        with pytest.raises(Busy, match=r"2 pictures are waiting, at most 2 may") as full:
            Waiter(queue, "one too many", "c")
        assert full.value.retry_after >= 1
        painter.go.release(100)
        assert all(isinstance(waiter.end, Result) for waiter in waiting)
        assert isinstance(Waiter(queue, "later", "c").end, Result)


def test_a_cancelled_job_stops_within_a_step_and_the_next_begins():
    painter = Executor()
    with working(painter) as queue:
        doomed, next_one = Waiter(queue, "doomed", "a"), Waiter(queue, "next", "b")
        painter.go.release()
        until(lambda: painter.steps == ["doomed"], "the first step was never taken")
        queue.cancel(doomed.ticket, doomed.tell)
        painter.go.release(100)
        assert isinstance(next_one.end, Result)
        assert not doomed.over.is_set()
    assert painter.put_down == ["doomed"]
    assert painter.steps.count("doomed") <= 2


def test_a_job_cancelled_while_it_waits_is_never_begun_and_those_behind_move_up():
    painter = Executor()
    with working(painter) as queue:
        Waiter(queue, "running", "a")
        until(lambda: painter.began, "the first job never began")
        doomed, last = Waiter(queue, "doomed", "a"), Waiter(queue, "last", "a")
        queue.cancel(doomed.ticket, doomed.tell)
        queue.cancel(doomed.ticket, doomed.tell)
        assert last.positions == [2, 1]
        painter.go.release(100)
        assert isinstance(last.end, Result)
    assert "doomed" not in painter.began


def test_an_error_of_the_engine_reaches_its_caller_and_the_next_job_is_painted():
    with working(Executor(free=True)) as queue:
        assert isinstance(Waiter(queue, "refuse", "a").end, InvalidJob)
        broken = Waiter(queue, "break", "a").end
        assert isinstance(broken, EngineFailed)
        assert "ZeroDivisionError: by nothing" in str(broken)
        assert "\n" not in str(broken)
        assert isinstance(Waiter(queue, "fine", "a").end, Result)
        assert queue.status()["queue"] == {
            "waiting": 0, "size": 32, "clients": 0, "running": False, "done": 1, "failed": 2,
        }  # fmt: skip


def test_an_idle_engine_lets_go_of_its_weights_and_paints_again_afterwards():
    painter = Executor(free=True)
    with working(painter, keep_alive=0.05) as queue:
        assert isinstance(Waiter(queue, "before", "a").end, Result)
        assert painter.released.wait(10)
        assert isinstance(Waiter(queue, "after", "a").end, Result)


def test_what_the_engine_takes_to_start_is_not_expected_of_the_next_job():
    painter, history = Executor(free=True), TimingHistory()

    def start() -> Executor:
        time.sleep(0.5)
        return painter

    queue = Queue(start, size=32, keep_alive=600, history=history)
    worker = threading.Thread(target=queue.work)
    worker.start()
    try:
        assert isinstance(Waiter(queue, "first", "a").end, Result)
    finally:
        queue.close()
        worker.join(10)
    expected = history.seconds(Job("second"))
    assert expected is not None
    assert expected < 0.4


def test_weights_that_cannot_be_released_do_not_end_the_painting():
    painter = Executor(free=True)
    asked = threading.Event()

    def release() -> None:
        asked.set()
        raise RuntimeError("the device is gone")

    painter.release = release
    with working(painter, keep_alive=0.05) as queue:
        assert isinstance(Waiter(queue, "before", "a").end, Result)
        assert asked.wait(10)
        assert isinstance(Waiter(queue, "after", "a").end, Result)


def test_status_is_told_while_weights_are_put_away():
    painter = Executor(free=True)
    begun, go_on = threading.Event(), threading.Event()

    def release() -> None:
        begun.set()
        go_on.wait(10)

    painter.release = release
    with working(painter, keep_alive=0.05) as queue:
        assert isinstance(Waiter(queue, "before", "a").end, Result)
        assert begun.wait(10)
        told = threading.Thread(target=queue.status, daemon=True)
        told.start()
        told.join(5)
        alive = told.is_alive()
        go_on.set()
        assert not alive


def test_an_idle_engine_keeps_nothing_of_the_last_job():
    painter = Executor(free=True)
    reference = np.zeros((8, 8, 3), np.uint8)
    gone = weakref.ref(reference)
    with working(painter) as queue:
        over = threading.Event()
        queue.put(Job("a", (reference,)), "a", lambda event: over.set() if isinstance(event, Result) else None)
        assert over.wait(10)
        del reference
        until(lambda: gone() is None, "the reference is still held")


def test_closing_tells_everyone_and_takes_nobody_more():
    painter = Executor()
    with working(painter) as queue:
        waiters = [Waiter(queue, f"{n}", "a") for n in range(3)]
        until(lambda: painter.began, "the first job never began")
        queue.close()
        for waiter in waiters:
            assert isinstance(waiter.end, EngineFailed)
        with pytest.raises(EngineFailed, match="stopped"):
            Waiter(queue, "late", "a")
    assert painter.put_down == ["0"]
