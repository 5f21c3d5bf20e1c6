"""Tests running out of device memory during a job.

The engine clears its cache and tries once more. If that fails too, the error gives numbers.
"""

import weakref
from collections.abc import Callable, Iterator
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from engine import engine as engine_module
from engine.contract import EngineConfig, Event, Job, Loading, OutOfMemory, Result, Stage
from engine.engine import Engine
from engine.families.klein.pipeline import Klein
from engine.memory.device import Device
from tests.embedded import SIDE

DOG = Job("a dog on yellow", model="nano", seed=3)
GB = 10**9


def on_cuda() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation.")


def on_metal() -> None:
    raise RuntimeError("MPS backend out of memory (MPS allocated: 9.0 GB, max allowed: 9.1 GB).")


def on_this_machine() -> None:
    torch.empty(10**14)  # torch's own message on the CPU


def in_python() -> None:
    raise MemoryError


@pytest.fixture
def engine() -> Engine:
    engine = Engine(EngineConfig(device="cpu", cache_bytes=10**7))
    paint(engine, DOG)
    return engine


def paint(engine: Engine, job: Job) -> Result:
    *_, painting = engine.run(job)
    assert isinstance(painting, Result)
    return painting


def full(engine: Engine, monkeypatch: pytest.MonkeyPatch, times: int, how: Callable[[], None] = on_cuda) -> list[Any]:
    """Make the next `times` decodings fail.

    Returns a list that receives a weak reference to the latent of each decoding.
    """
    assert engine._klein is not None
    decode, latents = engine._klein.autoencoder.decode, []

    def decode_or_fail(latent: torch.Tensor) -> torch.Tensor:
        latents.append(weakref.ref(latent))
        if len(latents) <= times:
            how()
        return decode(latent)

    monkeypatch.setattr(engine._klein.autoencoder, "decode", decode_or_fail)
    return latents


@pytest.mark.parametrize("how", [on_cuda, on_metal, on_this_machine, in_python])
def test_out_of_memory_clears_the_cache_and_retries_the_job(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, how: Callable[[], None]
) -> None:
    undisturbed = paint(engine, DOG).image
    paint(engine, Job("remembered until memory is short", model="nano"))
    assert len(engine.cache) == 2
    latents = full(engine, monkeypatch, 1, how)
    events = list(engine.run(DOG))
    assert len(latents) == 2
    stages = [name for name, _ in groupby(event.name for event in events if isinstance(event, Stage))]
    assert stages == ["prompt", "denoise", "decode"] * 2
    assert isinstance(events[-1], Result)
    assert np.array_equal(events[-1].image, undisturbed)
    assert events[-1].cache["prompt"] == "miss"
    assert len(engine.cache) == 1, "its own prompt, read again"


def test_second_attempt_on_a_gpu_decodes_in_bands(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine._klein is not None
    run, attempts = engine._klein.run, []

    def run_or_fail(job: Job, previews: Callable[[], bool], *, in_bands: bool) -> Iterator[Event]:
        attempts.append(in_bands)
        if len(attempts) == 1:
            on_cuda()
        monkeypatch.setattr(Device, "is_cuda", property(lambda self: False))
        yield from run(job, previews, in_bands=in_bands)

    monkeypatch.setattr(engine._klein, "run", run_or_fail)
    monkeypatch.setattr(Device, "is_cuda", property(lambda self: True))
    assert paint(engine, DOG).image.shape == (SIDE, SIDE, 3)
    assert attempts == [False, True]


def test_image_that_ran_out_of_memory_ends_capturing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or idle time captures the graphs again, and the next image is computed twice, too."""
    assert engine._klein is not None
    full(engine, monkeypatch, 1)
    stopped: list[int] = []
    monkeypatch.setattr(engine._klein.runner, "stop_capturing", lambda: stopped.append(1))
    paint(engine, DOG)
    paint(engine, DOG)
    assert stopped == [1]


def test_failed_attempt_holds_no_tensors_when_memory_is_released(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents, alive = full(engine, monkeypatch, 1), []
    monkeypatch.setattr(Device, "empty_cache", lambda self: alive.append(latents[0]() is not None))
    paint(engine, DOG)
    assert alive == [False]


def test_second_failure_gives_numbers_and_the_next_job_runs(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = full(engine, monkeypatch, 2)
    monkeypatch.setattr(Device, "label", "GPU")
    monkeypatch.setattr(Device, "total_bytes", lambda self: 24 * GB)
    monkeypatch.setattr(Device, "free_bytes", lambda self: 1_234_000_000)
    monkeypatch.setattr(engine, "_weight_bytes", lambda: 7_800_000_000)
    with pytest.raises(OutOfMemory) as error:
        list(engine.run(DOG))
    assert len(latents) == 2, "no third attempt"
    assert str(error.value) == (
        "The GPU ran full twice: of its 24.0 GB, weights hold 7.8 GB and 1.2 GB are free, too little for this image. "
        "Ask for a smaller size or fewer references, or end what else uses it."
    )
    assert paint(engine, DOG).ms["load"] == 0, "the weights stayed"


def test_numbers_are_those_of_this_machine(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    full(engine, monkeypatch, 2)
    with pytest.raises(OutOfMemory, match=r"^The memory ran full twice: of its \d+\.\d GB, weights hold 0\.\d GB and "):
        list(engine.run(DOG))


def test_other_errors_are_not_retried(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    latents = full(engine, monkeypatch, 1, broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        list(engine.run(DOG))
    assert len(latents) == 1


@pytest.mark.parametrize("times", [1, 2])
def test_out_of_memory_while_loading_weights_is_retried(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    load, begun = Klein.load.__func__, []  # type: ignore[attr-defined]

    def load_or_fail(cls: type[Klein], *arguments: Any) -> Iterator[Loading]:
        begun.append(1)
        loading = load(cls, *arguments)
        yield next(loading)
        if len(begun) <= times:
            on_cuda()
        return (yield from loading)

    monkeypatch.setattr(Klein, "load", classmethod(load_or_fail))
    engine = Engine(EngineConfig(device="cpu"))
    if times == 1:
        assert paint(engine, DOG).image.shape == (SIDE, SIDE, 3)
    else:
        with pytest.raises(OutOfMemory, match=r"ran full twice.*weights hold 0\.0 GB"):
            list(engine.run(DOG))
    assert len(begun) == 2


def test_prefetch_fails_silently(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine._klein is not None
    monkeypatch.setattr(engine._klein.autoencoder, "encode", lambda pixels: on_cuda())
    assert len(engine.cache) == 1
    assert engine.prefetch()
    assert len(engine.cache) == 0
    assert not engine.prefetch()


def test_all_that_a_release_gives_back_counts_as_free(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the choice of the next model: the cache had kept a larger one from being chosen."""
    held: list[int] = []

    def prepare(*given: Any) -> Any:
        held.append(given[3])
        return SimpleNamespace(is_resident=True)

    monkeypatch.setattr(engine_module, "prepare", prepare)
    monkeypatch.setattr(engine_module, "ring_bytes", lambda *networks: 5000)
    paint(engine, DOG)
    cached = engine.cache.stats().bytes
    assert engine._is_resident(engine.registry.resolve("nano"))
    assert cached > 0
    assert held == [engine._weight_bytes() + cached + 5000]
