"""Tests that the cache respects its budgets and never changes an image."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.contract import CacheStats, EngineConfig, Exact, Job, KeepSource, Result, Rgb8, image_hash
from engine.engine import Engine
from engine.families.klein import pipeline
from engine.families.klein.footprint import activation_memory
from engine.memory.cache import TensorCache, budgets
from engine.memory.device import Device
from engine.memory.plan import MemoryInfo
from tests import toys


def tensor(count: int, value: float = 0.0) -> torch.Tensor:
    return torch.full((count,), float(value))


def picture(width: int, height: int, seed: int = 0) -> Rgb8:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def paint(engine: Engine, job: Job) -> Result:
    *_, painting = engine.run(job)
    assert isinstance(painting, Result)
    return painting


def test_oldest_entry_moves_to_the_host_and_is_then_dropped() -> None:
    memory = TensorCache(budget=80, spill=40)
    for name in "abc":
        memory.insert(name, [tensor(10, ord(name))])  # 40 bytes each
    assert memory.stats() == CacheStats(entries=3, bytes=80, spilled_bytes=40, hits=0, misses=0)
    assert torch.equal(memory.get("a")[0], tensor(10, ord("a")))  # type: ignore[index]
    memory.insert("d", [tensor(10)])
    assert "b" not in memory, "least recently used: a was used since"
    assert all(name in memory for name in "acd")
    assert memory.get("b") is None
    assert (memory.hits, memory.misses) == (1, 1)


def test_entry_too_large_for_the_device_goes_to_the_host() -> None:
    memory = TensorCache(budget=10, spill=100)
    memory.insert("large", [tensor(20)])
    assert memory.stats().spilled_bytes == 80
    assert memory.get("large") is not None


@pytest.mark.parametrize("seed", range(5))
def test_budgets_hold_under_a_thousand_random_jobs(seed: int) -> None:
    memory, rng = TensorCache(budget=400, spill=700), np.random.default_rng(seed)
    for job in range(1000):
        key, count = int(rng.integers(40)), int(rng.integers(1, 64))
        (kept,), _ = memory.get_or_compute(key, lambda count=count, key=key: [tensor(count, key)])
        assert (kept == key).all(), "another key's tensors"
        counts = memory.stats()
        assert counts.bytes <= 400
        assert counts.spilled_bytes <= 700
        assert counts.hits + counts.misses == job + 1
    assert memory.hits > 50


def test_image_keys_differ_by_pixels_and_by_size() -> None:
    image = picture(32, 16)
    other = image.copy()
    other[3, 5, 1] ^= 1
    assert image_hash(image) == image_hash(image.copy())
    assert len({image_hash(image), image_hash(other), image_hash(image.reshape(32, 16, 3))}) == 3


@pytest.fixture(scope="module")
def kv_toy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(toys.save(tmp_path_factory.mktemp("toy") / "kv", kv=True))


@pytest.fixture(scope="module")
def cold(kv_toy: str) -> Callable[[Job], Rgb8]:
    """Return a function that runs a job on an engine without a cache.

    Each job runs once.
    """
    engine, painted = Engine(EngineConfig(device="cpu", cache_bytes=0, spill_bytes=0)), {}

    def paint_once(job: Job) -> Rgb8:
        key = (job.prompt, *map(image_hash, job.references))
        if key not in painted:
            painted[key] = paint(engine, job).image
        return painted[key]

    return paint_once


# Keys and values of one reference in the toy: 4 blocks · 2 · 20 tokens · 96 channels · 4 bytes = 61,440.
@pytest.mark.parametrize(
    ("remember", "spill"),
    [(0, 0), (1 << 30, 0), (0, 1 << 30), (200_000, 150_000)],
    ids=["off", "on", "spilled", "tight"],
)
def test_cached_run_equals_a_run_without_cache(
    kv_toy: str, cold: Callable[[Job], Rgb8], remember: int, spill: int
) -> None:
    rng = np.random.default_rng(5)
    engine = Engine(EngineConfig(device="cpu", cache_bytes=remember, spill_bytes=spill))
    pool = [picture(64, 80, seed) for seed in range(3)]
    for _ in range(24):
        chosen = tuple(pool[i] for i in rng.integers(0, 3, rng.integers(1, 3)))
        job = Job("ab"[rng.integers(2)], model=kv_toy, references=chosen, size=Exact(64, 64), steps=1)
        assert np.array_equal(paint(engine, job).image, cold(job))
        counts = engine.status().cache
        assert counts.bytes <= remember
        assert counts.spilled_bytes <= spill
    if remember or spill:
        assert engine.status().cache.hits >= 10  # observed: 11 (tight)


def test_cached_tensors_hold_no_more_memory_than_is_counted(kv_toy: str) -> None:
    engine = Engine(EngineConfig(device="cpu"))
    paint(engine, Job("a", model=kv_toy, references=(picture(64, 80), picture(80, 64, 1)), size=Exact(64, 64)))
    kept = [tensor for entry in engine.cache._device.entries.values() for tensor in entry]
    assert len(kept) > 8
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in kept)


def test_edit_of_the_image_just_generated_hits_the_cache(kv_toy: str) -> None:
    engine = Engine(EngineConfig(device="cpu"))
    painted = paint(engine, Job("a", model=kv_toy, size=Exact(70, 90))).image
    assert engine.prefetch() is True
    assert engine.prefetch() is False, "done once"
    edit = Job("b", model=kv_toy, references=(painted,), size=KeepSource())
    warm = paint(engine, edit)
    assert warm.cache["references"] == "hit"
    assert np.array_equal(warm.image, paint(Engine(EngineConfig(device="cpu", cache_bytes=0)), edit).image)


def test_close_up_of_the_same_image_misses_the_cache(tmp_path: Path) -> None:
    """Both fill one canvas, with padding and with an enlarged content."""
    engine, image, small = Engine(EngineConfig(device="cpu")), picture(124, 124), toys.save(tmp_path / "kv", kv=True)
    toys.extras(small, native_size=128)
    kept, close_up = (
        Job("a dog", model=str(small), references=(image,), size=KeepSource(close_up=way), steps=1)
        for way in (False, True)
    )
    assert paint(engine, kept).cache["references"] == "miss"
    second = paint(engine, close_up)
    assert second.cache["references"] == "miss"
    assert np.array_equal(second.image, paint(Engine(EngineConfig(device="cpu", cache_bytes=0)), close_up).image)
    assert paint(engine, kept).cache["references"] == "hit"


def test_another_model_misses_the_cache(kv_toy: str, tmp_path: Path) -> None:
    engine = Engine(EngineConfig(device="cpu"))
    other = str(toys.save(tmp_path / "other", kv=True, seed=1))
    job = Job("a", model=kv_toy, references=(picture(64, 80),), size=Exact(64, 64))
    first = paint(engine, job)
    second = paint(engine, replace(job, model=other))
    assert (second.cache["prompt"], second.cache["references"]) == ("miss", "miss")
    assert first.fingerprint != second.fingerprint


@pytest.mark.parametrize(
    ("free", "host", "expected"),
    [
        (60 << 30, 100 << 30, (30 << 30, 25 << 30)),
        (2 << 30, 8 << 30, (1 << 30, 2 << 30)),
        (100 << 30, 400 << 30, (32 << 30, 32 << 30)),
        (20 << 30, None, (5 << 30, 0)),
    ],
    ids=["a large card", "a small card", "no end of memory", "no memory of its own"],
)
def test_cache_budgets_are_a_share_of_free_memory(free: int, host: int | None, expected: tuple[int, int]) -> None:
    assert budgets(free, host) == expected


def test_cpu_budget_is_small_and_fixed() -> None:
    assert budgets(8 << 30, None, cpu=True) == budgets(800 << 30, None, cpu=True) == (64 << 20, 0)


def test_smaller_budgets_evict_the_oldest_first() -> None:
    memory = TensorCache(budget=120)
    for name in "abc":
        memory.insert(name, [tensor(10, ord(name))])
    memory.resize(80, 0)
    assert "a" not in memory
    assert "b" in memory
    assert "c" in memory


def test_cache_makes_room_from_the_oldest_entry_on() -> None:
    cache = TensorCache(1000, 100)
    for key in "abcd":
        cache.insert(key, [torch.zeros(25)])
    assert not cache.make_room(400)
    assert cache.make_room(199, {"b"})
    assert [key for key in "abcd" if key in cache._device.entries] == ["b", "d"], "what is needed does not count"
    assert ("a" in cache, "c" in cache) == (False, True), "the host's tier holds one"
    assert cache.stats() == CacheStats(3, 200, 100, 0, 0)
    assert torch.equal(cache.get("c")[0], torch.zeros(25))  # type: ignore[index]
    assert cache.make_room(0)
    assert cache.stats().bytes == 0


@pytest.mark.parametrize("kept", [True, False], ids=["its own reference", "another's"])
def test_cache_makes_room_for_a_job_that_was_admitted_for_it(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache counts as free memory, and is what a job of a full device can have."""
    engine = Engine(EngineConfig(device="cpu", dtype="float32", cache_bytes=10**9))
    reference = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    edit = Job("a red ball", model="nano", references=(reference,), seed=1)
    list(engine.run(edit))
    klein = engine._klein
    assert klein is not None
    if not kept:
        edit = replace(edit, references=(255 - reference,))
    engine.cache.insert(("ballast",), [torch.zeros(10_000_000)])
    needed = activation_memory(klein.variant, klein.transformer, klein.autoencoder, torch.float32, pixels=256**2)
    emptied, cached = [], []
    memory = MemoryInfo("memory", needed.bytes // 2, 10**10)
    monkeypatch.setattr(pipeline, "memory_info", lambda device: memory)
    monkeypatch.setattr(Device, "empty_cache", lambda self: emptied.append(engine.cache.stats().bytes))
    decode = klein.autoencoder.decode
    monkeypatch.setattr(klein.autoencoder, "decode", lambda z: cached.append(engine.cache.stats().bytes) or decode(z))
    *_, result = engine.run(edit)
    assert isinstance(result, Result)
    assert result.cache["references"] == ("hit" if kept else "miss")
    assert emptied, "torch's own cache is given back, too"
    assert cached
    assert max(cached) < 40_000_000, "the ballast is gone"
    monkeypatch.setattr(pipeline, "memory_info", lambda device: replace(memory, free=10**9))
    engine.cache.insert(("ballast",), [torch.zeros(10_000_000)])
    list(engine.run(edit))
    assert ("ballast",) in engine.cache, "with memory for both nothing goes"
