"""Tests of the queue between jobs: prefetching, releasing weights, holding nothing."""

import threading
import time
import weakref

import numpy as np

from engine.contract import (
    Job,
    Result,
)
from klein_mcp.jobs import queue as queues
from klein_mcp.jobs.queue import Queue
from klein_mcp.jobs.timing import TimingHistory
from tests.klein_mcp.stepping import IMAGE, StepExecutor, Waiter, until, working


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


def test_idle_engine_releases_its_weights_and_runs_again():
    executor = StepExecutor(free=True)
    with working(executor, keep_alive=0.05) as queue:
        assert isinstance(Waiter(queue, "before", "a").end, Result)
        assert executor.released.wait(120)
        assert isinstance(Waiter(queue, "after", "a").end, Result)


def test_closed_queue_releases_the_weights_unless_the_device_is_lost():
    """The engine counts processes that ended while it tuned a model. One that is asked to end is none of them."""
    for prompt, released in (("image", True), ("lose", False)):
        executor = StepExecutor(free=True)
        with working(executor) as queue:
            assert Waiter(queue, prompt, "a").end
            assert not executor.released.is_set()
        assert executor.released.is_set() == released


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
