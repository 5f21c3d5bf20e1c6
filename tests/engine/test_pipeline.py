"""Tests of jobs on the embedded model.

They cover events, exact sizes, seeds, limits, cancellation and caching.
"""

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.contract import (
    Aspect,
    EngineConfig,
    Event,
    Exact,
    InvalidJob,
    Job,
    KeepSource,
    Loading,
    Native,
    Result,
    Rgb8,
    Stage,
    Step,
)
from engine.diffusion.canvas import resize, size_for_aspect
from engine.engine import Engine
from engine.families.klein import stage_clock
from engine.families.klein.variants import EMBEDDED, VARIANTS
from tests import toys
from tests.embedded import SIDE

DOG = Job("a dog at the right on a yellow background", model="nano", seed=3)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(EngineConfig(device="cpu"))


@pytest.fixture(scope="module")
def dog(engine: Engine) -> Rgb8:
    return paint(engine, DOG).image


def paint(engine: Engine, job: Job) -> Result:
    *_, painting = engine.run(job)
    assert isinstance(painting, Result)
    return painting


def picture(width: int, height: int, seed: int = 0) -> Rgb8:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_events_arrive_in_order_and_end_with_the_image(dog: Rgb8) -> None:
    fresh = Engine(EngineConfig(device="cpu"))
    events = list(fresh.run(replace(DOG, prompt="make the background red", references=(dog,))))
    loading = [event.fraction for event in events if isinstance(event, Loading)]
    assert loading[0] == 0.0
    assert loading == sorted(loading)
    assert loading[-1] == pytest.approx(1.0, abs=0.01)
    stages = [event.name for event in events if isinstance(event, Stage) and not within_a_step(event)]
    # The prompt goes on after each of its three layers but the last.
    assert stages == ["prompt", "prompt", "prompt", "references", "denoise", "decode"]
    steps = [(event.done, event.total) for event in events if isinstance(event, Step)]
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert isinstance(events[-1], Result)


def within_a_step(event: Stage) -> bool:
    """Tell an event between two blocks of a step, which only a slow machine yields."""
    return event.name == "denoise" and event.fraction > 0


@pytest.mark.parametrize("parts", [1, 2, 9])
def test_a_step_can_be_left_between_two_blocks(
    parts: int, engine: Engine, dog: Rgb8, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop at the pauses of a machine on which every block takes long."""
    monkeypatch.setattr(stage_clock, "PAUSE", 0.0)
    assert engine._klein is not None
    net = engine._klein.transformer
    ends = [*(block.img_mlp for block in net.double_blocks), *(block.linear2 for block in net.single_blocks)]
    assert len(ends) > 2
    done: list[int] = []
    hooks = [end.register_forward_hook(lambda *_: done.append(1)) for end in ends]  # type: ignore[union-attr] - a ModuleList
    job = engine.run(DOG)
    pauses = (event.fraction for event in job if isinstance(event, Stage) and within_a_step(event))
    try:
        shares = list(islice(pauses, parts))
    finally:
        job.close()  # type: ignore[attr-defined] - a generator
        for hook in hooks:
            hook.remove()
    # There is no pause after a step's last block.
    assert len(done) == parts + (parts - 1) // (len(ends) - 1), "no block was computed after the pause"
    assert shares == sorted(set(shares))
    assert 0 < shares[0] <= shares[-1] < 1


def test_pauses_in_a_step_leave_the_image_as_it_is(engine: Engine, dog: Rgb8, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_clock, "PAUSE", 0.0)
    events = list(engine.run(DOG))
    assert any(isinstance(event, Stage) and within_a_step(event) for event in events)
    assert isinstance(events[-1], Result)
    assert np.array_equal(events[-1].image, dog)


def test_result_records_its_settings(engine: Engine, dog: Rgb8) -> None:
    painting = paint(engine, replace(DOG, references=(dog,)))
    assert (painting.model, painting.seed, painting.steps, painting.guidance) == ("nano", 3, 4, 1.0)
    assert painting.ms.keys() == {"load", "prompt", "references", "denoise", "decode"}
    assert painting.ms["denoise"] > 0
    assert len(painting.fingerprint) > 20


def test_same_job_repeats_its_image_and_another_seed_changes_it(engine: Engine, dog: Rgb8) -> None:
    assert np.array_equal(paint(engine, DOG).image, dog)
    assert not np.array_equal(paint(engine, replace(DOG, seed=4)).image, dog)


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_seeds_range_from_0_to_the_largest_63_bit_number(engine: Engine, seed: int) -> None:
    assert paint(engine, replace(DOG, seed=seed)).seed == seed


@pytest.mark.parametrize("size", [(100, 60), (64, 64), (33, 128), (250, 190), (31, 17)])
def test_an_aligned_edit_has_exactly_the_size_of_its_input(engine: Engine, size: tuple[int, int]) -> None:
    painting = paint(engine, replace(DOG, prompt="red background", references=(picture(*size),), size=KeepSource()))
    assert painting.image.shape == (size[1], size[0], 3)


def test_close_up_runs_at_native_size_and_returns_at_input_size(engine: Engine, tmp_path: Path) -> None:
    small = toys.save(tmp_path / "small")
    toys.extras(small, native_size=128)
    part = replace(DOG, model=str(small), references=(picture(40, 30),), size=KeepSource())
    close, plain = paint(engine, replace(part, size=KeepSource(close_up=True))), paint(engine, part)
    assert close.image.shape == plain.image.shape == (30, 40, 3)
    assert not np.array_equal(close.image, plain.image)
    assert close.warnings == plain.warnings == ()


def test_nano_enlarges_what_is_smaller_than_its_images(engine: Engine) -> None:
    """It practised 64 tokens alone: 64 pixels would be four of them."""
    whole = paint(engine, DOG).image
    half = paint(engine, replace(DOG, size=Exact(SIDE // 2, SIDE // 2)))
    assert half.warnings == ()
    assert np.array_equal(half.image, resize(whole, SIDE // 2, SIDE // 2))
    edit = Job("make the background green", references=(whole,), size=KeepSource(), seed=7, model="nano")
    small, large = paint(engine, replace(edit, references=(half.image,))), paint(engine, edit)
    assert small.image.shape == half.image.shape
    assert np.abs(small.image.astype(int) - resize(large.image, SIDE // 2, SIDE // 2)).mean() < 4


def test_size_above_native_is_resampled_with_a_warning(engine: Engine) -> None:
    painting = paint(engine, replace(DOG, size=Exact(512, 256)))
    assert painting.image.shape == (256, 512, 3)
    assert any("resampled to 512×256" in warning for warning in painting.warnings)


def test_model_of_squares_warns_in_other_shapes(engine: Engine) -> None:
    for size in (Aspect(1, 1), Exact(80, 64)):
        assert not paint(engine, replace(DOG, size=size)).warnings
    for size in (Aspect(4, 3), Aspect(9, 16)):
        (warning,) = paint(engine, replace(DOG, size=size)).warnings
        assert warning.startswith("nano practised on squares alone")


def test_edit_into_another_shape_warns_and_one_in_its_own_does_not(engine: Engine) -> None:
    edit = replace(DOG, prompt="make the background green", references=(picture(SIDE, SIDE),))
    (*_, warning) = paint(engine, replace(edit, size=Exact(SIDE, SIDE // 2))).warnings
    assert warning.startswith("nano practised edits in an image's own shape alone")
    wide = replace(edit, references=(picture(SIDE, SIDE // 2),))
    for size in (Exact(SIDE, SIDE // 2), KeepSource(), Native()):
        assert not any("practised" in warning for warning in paint(engine, replace(wide, size=size)).warnings)


def test_edit_of_an_oblong_into_a_square_is_not_called_oblong(engine: Engine) -> None:
    edit = replace(DOG, prompt="make the background green", references=(picture(SIDE, SIDE // 4),))
    (*_, warning) = paint(engine, replace(edit, size=Exact(SIDE, SIDE))).warnings
    assert warning.startswith("nano practised edits in an image's own shape alone")


def test_aspect_ratio_is_generated_at_the_native_area(engine: Engine) -> None:
    width, height = size_for_aspect((16, 9), SIDE**2, VARIANTS[EMBEDDED].pixels_per_token)
    assert paint(engine, replace(DOG, size=Aspect(16, 9))).image.shape == (height, width, 3)


def test_without_a_size_the_first_reference_decides(engine: Engine) -> None:
    """Small ones are enlarged to the area that nano was made for, by whole tokens of 32 pixels."""
    for side, shape in ((64, (192, 288, 3)), (1000, (192, 288, 3))):
        references = (picture(round(side * 1.45), side), picture(64, 128, 1))
        assert paint(engine, replace(DOG, references=references)).image.shape == shape


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"references": (picture(64, 64),) * 9}, "9 references; nano takes at most"),
        ({"references": (picture(64, 40),)}, "64 pixels"),
        ({"seed": -1}, "seed is -1"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 1000}, "1 … 200"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"guidance": -1.0}, "0 … 100"),
        ({"size": KeepSource()}, "KeepSource needs a reference"),
        ({"size": Exact(4, 64)}, "at least 16 pixels"),
        ({"size": Aspect(1, 20)}, "at most 8:1"),
    ],
)
def test_invalid_job_is_refused_in_one_line(engine: Engine, change: dict, says: str) -> None:
    with pytest.raises(InvalidJob) as refusal:
        paint(engine, replace(DOG, **change))
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert paint(engine, DOG).image.shape == (SIDE, SIDE, 3), "the next job works"


def test_guidance_on_a_distilled_model_is_ignored_with_a_warning(engine: Engine, dog: Rgb8) -> None:
    painting = paint(engine, replace(DOG, guidance=4.0))
    assert any("guidance 4 is ignored" in warning for warning in painting.warnings)
    assert np.array_equal(painting.image, dog)


def test_prompt_over_the_length_limit_is_cut_with_a_warning(engine: Engine) -> None:
    painting = paint(engine, replace(DOG, prompt=DOG.prompt + " and a cat" * 60))
    assert any("its end was cut" in warning for warning in painting.warnings)


def test_unknown_words_are_named_in_a_warning(engine: Engine) -> None:
    painting = paint(engine, replace(DOG, prompt="a dog and a Zeppelin wearing a fedora"))
    (warning,) = painting.warnings
    assert warning.startswith("nano does not know zeppelin (nearest: helicopter, airplane, rocket), wearing, fedora;")
    assert not paint(engine, DOG).warnings


def test_empty_prompt_generates_an_image(engine: Engine) -> None:
    assert paint(engine, replace(DOG, prompt="")).image.shape == (SIDE, SIDE, 3)


def _live_tensors() -> int:
    gc.collect()
    return sum(1 for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))


def test_closing_stops_within_a_step_and_frees_the_jobs_memory(engine: Engine) -> None:
    # One full run first: the tables of its 50 noise levels stay cached for the next such job, on purpose.
    paint(engine, replace(DOG, steps=50))
    before = _live_tensors()
    running: Iterator[Event] = engine.run(replace(DOG, steps=50))
    for event in running:
        if isinstance(event, Step):
            break
    assert _live_tensors() > before
    running.close()  # type: ignore[attr-defined] - a generator
    assert _live_tensors() <= before
    assert paint(engine, DOG).steps == 4, "the next job works"


def test_a_yield_does_not_leak_inference_mode_into_its_consumer(engine: Engine) -> None:
    for _ in engine.run(DOG):
        assert not torch.is_inference_mode_enabled()


def test_release_frees_the_weights_and_the_next_job_reloads(dog: Rgb8) -> None:
    fresh = Engine(EngineConfig(device="cpu"))
    paint(fresh, DOG)
    assert fresh.status().loaded == "nano"
    fresh.release()
    assert fresh.status().loaded is None
    assert fresh.status().weights_bytes == 0
    painting = paint(fresh, DOG)
    assert painting.ms["load"] > 0
    assert np.array_equal(painting.image, dog)


def test_released_model_is_freed_immediately() -> None:
    fresh = Engine(EngineConfig(device="cpu"))
    paint(fresh, DOG)
    assert fresh._klein is not None
    weights = weakref.ref(fresh._klein.transformer)
    gc.disable()
    try:
        fresh.release()
        assert weights() is None, "something holds the model in a circle"
    finally:
        gc.enable()


def test_auto_keeps_its_choice_after_its_weights_fill_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = Engine(EngineConfig(device="cpu"))
    assert paint(fresh, replace(DOG, model="auto")).ms["load"] > 0
    monkeypatch.setattr(fresh.auto, "_search", lambda loaded: pytest.fail("asked again while its choice is loaded"))
    assert paint(fresh, replace(DOG, model="auto")).ms["load"] == 0


def test_auto_works_after_a_model_requested_by_name() -> None:
    fresh = Engine(EngineConfig(device="cpu"))
    paint(fresh, DOG)
    assert paint(fresh, replace(DOG, model="auto")).model == "nano"


def test_auto_falls_back_to_the_embedded_model() -> None:
    assert paint(Engine(EngineConfig(device="cpu")), replace(DOG, model="auto")).model == "nano"


@pytest.mark.parametrize("kind", ["plain", "kv"])
def test_cached_tensors_give_the_same_bytes(kind: str, tmp_path: Path) -> None:
    folder = toys.save(tmp_path / kind, kv=kind == "kv")
    job = Job("a", model=str(folder), references=(picture(64, 80), picture(80, 64, 1)), size=Exact(64, 64))
    cold, warm = Engine(EngineConfig(device="cpu", cache_bytes=0)), Engine(EngineConfig(device="cpu"))
    jobs = [job, job, replace(job, seed=5), replace(job, prompt="b"), replace(job, references=job.references[::-1])]
    known = []
    for each in [*jobs, job]:
        painting = paint(warm, each)
        known.append((painting.cache["prompt"], painting.cache["references"]))
        assert np.array_equal(painting.image, paint(cold, each).image)
    # Latents are cached per image, keys and values per ordered list of images.
    turned = "miss" if kind == "kv" else "hit"
    assert known == [("miss", "miss"), ("hit", "hit"), ("hit", "hit"), ("miss", "hit"), ("hit", turned), ("hit", "hit")]


def test_bf16_gives_nearly_the_same_image(tmp_path: Path) -> None:
    job = Job("a", model=str(toys.save(tmp_path / "toy")), size=Exact(64, 64))
    fp32, bf16 = (
        paint(Engine(EngineConfig(device="cpu", dtype=dtype)), job).image.astype(int)
        for dtype in ("float32", "bfloat16")
    )
    # Observed: mean 1.4 of 255, emulated bf16 on an AVX2 CPU.
    assert 0 < np.abs(fp32 - bf16).mean() < 4


def test_missing_device_is_refused_with_a_list_of_available_ones() -> None:
    for device in ("tpu", "cpu:one", "cpu:1"):
        with pytest.raises(InvalidJob, match=r"this machine has: .*cpu.*Set device to"):
            Engine(EngineConfig(device=device))
