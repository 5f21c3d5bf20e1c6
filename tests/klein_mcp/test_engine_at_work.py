"""The real engine behind the queue: a cancelled job frees its memory, a full device is one clear error."""

import gc
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from engine.contract import EngineConfig, Event, Job, OutOfMemory, Result, Step
from engine.engine import Engine
from klein_mcp.daemon.executors.local import LocalExecutor
from klein_mcp.jobs.queue import Queue
from tests.klein_mcp.stepping import Waiter
from tests.waiting import wait_until

EDIT = Job("make it green", (np.full((128, 128, 3), 90, np.uint8),), model="nano", steps=60)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(EngineConfig(device="cpu", threads=1, cache_bytes=10**8))


@pytest.fixture
def queue(engine: Engine) -> Iterator[Queue]:
    queue = Queue(lambda: LocalExecutor(engine), size=32, keep_alive=600)
    yield queue
    queue.close(60)


def live_bytes() -> int:
    """Sum the storages of all tensors, each once, without the compiler's fakes, which hold nothing."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_job_cancelled_at_a_step_frees_its_memory(queue: Queue, engine: Engine):
    over = threading.Event()
    # Once to its end: prompt, reference and the tables of its noise levels are remembered, on purpose.
    queue.put(EDIT, "a", lambda event: over.set() if isinstance(event, Result) else None)
    assert over.wait(120)
    wait_until(lambda: not queue.status().running)
    engine._latest = None
    gc.collect()
    level, within = live_bytes(), []

    def tell(event: Event | Exception) -> None:
        if isinstance(event, Step) and event.done == 3:
            within.append(live_bytes())
            queue.cancel(ticket)

    # Not by the collector's grace: a device is full long before Python looks for circles.
    gc.disable()
    try:
        ticket = queue.put(EDIT, "a", tell)
        wait_until(lambda: bool(within) and not queue.status().running)
        assert within[0] > level, "the measure sees what a job holds"
        wait_until(lambda: live_bytes() <= level)  # the queue hears of it a moment before its thread lets go
    finally:
        gc.enable()
    assert queue.status().done == 1


def test_device_that_stays_full_is_an_error_with_numbers(queue: Queue, engine: Engine, monkeypatch: pytest.MonkeyPatch):
    assert isinstance(Waiter(queue, "a cat", "a").end, Result)
    assert engine._klein is not None
    attempts = []

    def decode(latent: torch.Tensor) -> torch.Tensor:
        attempts.append(latent.shape)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation.")

    with monkeypatch.context() as full:
        full.setattr(engine._klein.autoencoder, "decode", decode)
        error = Waiter(queue, "a dog", "a").end
    assert isinstance(error, OutOfMemory)
    assert len(attempts) == 2
    assert "\n" not in str(error)
    assert str(error).count(" GB") == 3
    assert isinstance(Waiter(queue, "a dog", "a").end, Result)
    status = queue.engine_status()
    assert status is not None
    assert status.cache.entries >= 1
