"""Which job runs next, what waiting ones hear, and how a job is cancelled."""

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from engine.contract import (
    Busy,
    EngineError,
    EngineFailed,
    EngineStatus,
    Event,
    Exact,
    InvalidJob,
    Job,
    Native,
    Queued,
    Result,
    Rgb8,
    Stage,
    Step,
)
from klein_mcp.jobs import queue as queues
from klein_mcp.jobs import running
from klein_mcp.jobs.executor import nobody_watches
from klein_mcp.jobs.queue import Queue
from klein_mcp.jobs.status import QueueStatus
from klein_mcp.jobs.timing import TimingHistory

IMAGE = np.zeros((1, 1, 3), np.uint8)


class StepExecutor:
    """Takes a step each time `go` is released, and remembers its jobs."""

    def __init__(self, *, free: bool = False, slots: int = 1) -> None:
        self.slots = slots
        self.go = threading.Semaphore(10**6 if free else 0)
        self.began: list[str] = []
        self.stopped: list[str] = []
        self.steps: list[str] = []
        self.previews: list[bool] = []
        self.prefetched: list[tuple[int, Rgb8]] = []
        self.released = threading.Event()

    def run(self, job: Job, watched: Callable[[], bool] = nobody_watches) -> Iterator[Event]:
        self.began.append(job.prompt)
        if job.prompt == "refuse":
            raise InvalidJob("No.")
        if job.prompt == "break":
            raise ZeroDivisionError("by nothing")
        try:
            yield Stage("denoise")
            for done in range(1, 4):
                assert self.go.acquire(timeout=120)
                self.steps.append(job.prompt)
                self.previews.append(watched())
                yield Step(done, 3)
            yield Result(IMAGE, job.seed, "fake", "", 3, 1.0)
        except GeneratorExit:
            self.stopped.append(job.prompt)
            raise

    def status(self) -> EngineStatus:
        return EngineStatus("cpu", "float32", 1, 0)

    def prefetch(self, image: Rgb8) -> bool:
        """Remember how many jobs had begun by then."""
        self.prefetched.append((len(self.began), image))
        return False

    def release(self) -> None:
        self.released.set()


class Waiter:
    """One caller: the events it got, and whether the last has come."""

    def __init__(self, queue: Queue, prompt: str, client: str, **more: bool) -> None:
        self.events: list[Event | EngineError] = []
        self.over = threading.Event()
        self.ticket = queue.put(Job(prompt), client, self._tell, **more)

    def _tell(self, event: Event | EngineError) -> None:
        self.events.append(event)
        if isinstance(event, Result | EngineError):
            self.over.set()

    @property
    def end(self) -> Event | EngineError:
        assert self.over.wait(120)
        return self.events[-1]

    @property
    def positions(self) -> list[int]:
        return [event.position for event in self.events if isinstance(event, Queued)]


@contextmanager
def working(executor: StepExecutor, *, size: int = 32, keep_alive: float = 600.0) -> Iterator[Queue]:
    queue = Queue(lambda: executor, size=size, keep_alive=keep_alive)
    try:
        yield queue
    finally:
        executor.go.release(10**6)
        queue.close(10)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("executor-")]


def until(condition, what: str) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


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


def test_engine_prefetches_only_when_no_job_follows_at_once(monkeypatch):
    monkeypatch.setattr(queues, "IDLE_BEFORE_PREFETCH", 2.0)
    executor = StepExecutor(free=True)
    with working(executor) as queue:
        for n in range(3):
            assert isinstance(Waiter(queue, f"image {n}", "one").end, Result)
            queue.prefetch(IMAGE)
        until(lambda: executor.prefetched, "it never prefetched")
        assert [(began, image is IMAGE) for began, image in executor.prefetched] == [(3, True)]


def test_image_that_is_saved_slowly_is_prefetched_too(monkeypatch):
    monkeypatch.setattr(queues, "IDLE_BEFORE_PREFETCH", 0.05)
    executor = StepExecutor(free=True)
    with working(executor) as queue:
        assert isinstance(Waiter(queue, "image", "one").end, Result)
        time.sleep(0.3)
        queue.prefetch(IMAGE)
        until(lambda: executor.prefetched, "it never prefetched")


def test_as_many_jobs_run_at_once_as_there_are_slots():
    executor = StepExecutor(slots=2)
    with working(executor) as queue:
        waiters = [Waiter(queue, str(n), str(n)) for n in range(4)]
        until(lambda: len(executor.began) == 2, "two never ran at once")
        until(lambda: waiters[2].positions[-1:] == [1], "the third never was next")
        assert waiters[3].positions[-1] == 2
        executor.go.release(100)
        assert all(isinstance(waiter.end, Result) for waiter in waiters)


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


def test_engine_error_reaches_its_caller_and_the_next_job_runs():
    with working(StepExecutor(free=True)) as queue:
        assert isinstance(Waiter(queue, "refuse", "a").end, InvalidJob)
        broken = Waiter(queue, "break", "a").end
        assert isinstance(broken, EngineFailed)
        assert "ZeroDivisionError: by nothing" in str(broken)
        assert "\n" not in str(broken)
        assert isinstance(Waiter(queue, "fine", "a").end, Result)
        assert queue.status() == QueueStatus(waiting=0, size=32, clients=0, running=False, done=1, failed=2)


def test_idle_engine_releases_its_weights_and_runs_again():
    executor = StepExecutor(free=True)
    with working(executor, keep_alive=0.05) as queue:
        assert isinstance(Waiter(queue, "before", "a").end, Result)
        assert executor.released.wait(120)
        assert isinstance(Waiter(queue, "after", "a").end, Result)


def test_engine_start_is_not_expected_of_the_next_job():
    executor, history = StepExecutor(free=True), TimingHistory()

    def start() -> StepExecutor:
        time.sleep(0.5)
        return executor

    queue = Queue(start, size=32, keep_alive=600, history=history)
    try:
        assert isinstance(Waiter(queue, "first", "a").end, Result)
    finally:
        queue.close(10)
    expected = history.seconds(Job("second"))
    assert expected is not None
    assert expected < 0.4


def test_failed_release_does_not_end_the_thread():
    executor = StepExecutor(free=True)
    asked = threading.Event()

    def release() -> None:
        asked.set()
        raise RuntimeError("the device is gone")

    executor.release = release
    with working(executor, keep_alive=0.05) as queue:
        assert isinstance(Waiter(queue, "before", "a").end, Result)
        assert asked.wait(120)
        assert isinstance(Waiter(queue, "after", "a").end, Result)


def test_status_answers_while_weights_are_released():
    executor = StepExecutor(free=True)
    begun, go_on = threading.Event(), threading.Event()

    def release() -> None:
        begun.set()
        go_on.wait(120)

    executor.release = release
    with working(executor, keep_alive=0.05) as queue:
        assert isinstance(Waiter(queue, "before", "a").end, Result)
        assert begun.wait(120)
        status = threading.Thread(target=queue.status, daemon=True)
        status.start()
        status.join(5)
        alive = status.is_alive()
        go_on.set()
        assert not alive


def test_idle_thread_holds_nothing_of_the_last_job():
    executor = StepExecutor(free=True)
    reference = np.zeros((8, 8, 3), np.uint8)
    gone = weakref.ref(reference)
    with working(executor) as queue:
        over = threading.Event()
        queue.put(Job("a", (reference,)), "a", lambda event: over.set() if isinstance(event, Result) else None)
        assert over.wait(120)
        del reference
        until(lambda: gone() is None, "the reference is still held")


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
