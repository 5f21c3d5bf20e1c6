"""Estimates of the next image's seconds from the last ones."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.contract import Exact, Job, Result
from klein_mcp.jobs.timing import MEASUREMENTS, TimingHistory
from tests.embedded import SIDE


def painting(width: int, height: int) -> Result:
    return Result(np.zeros((height, width, 3), np.uint8), 0, "klein-4b", "", 4, 1.0)


def test_a_model_that_never_painted_here_has_no_estimate():
    assert TimingHistory().seconds(Job("a")) is None


def test_estimates_scale_with_the_size():
    history = TimingHistory()
    history.note(Job("a", size=Exact(512, 512)), painting(512, 512), 2.0)
    assert history.seconds(Job("b", size=Exact(512, 512))) == pytest.approx(2.0)
    assert history.seconds(Job("b", size=Exact(1024, 1024))) == pytest.approx(8.0)
    assert history.seconds(Job("b", size=Exact(512, 512), model="klein-4b")) == pytest.approx(2.0)


def test_without_a_size_the_models_own_counts():
    """nano generates less than a megapixel, whose estimate would hand every call over."""
    history = TimingHistory()
    history.note(Job("a"), painting(128, 128), 0.2)
    assert history.seconds(Job("b")) == pytest.approx(0.2)


def test_a_models_own_size_is_remembered_by_the_next_process(tmp_path: Path):
    TimingHistory(tmp_path / "history.json").note(Job("a"), painting(128, 128), 0.2)
    assert TimingHistory(tmp_path / "history.json").seconds(Job("b")) == pytest.approx(0.2)


def test_references_make_a_picture_dearer_up_to_the_megapixel_that_is_read():
    history, photo = TimingHistory(), np.zeros((4000, 4000, 3), np.uint8)
    history.note(Job("a", size=Exact(1024, 1024)), painting(1024, 1024), 3.0)
    assert history.seconds(Job("b", size=Exact(1024, 1024), references=(photo,))) == pytest.approx(6.0)


def test_table_of_a_large_model_scales_to_each_size():
    history = TimingHistory()
    history.note(Job("a", size=Exact(1024, 1024)), painting(1024, 1024), 0.111)
    assert history.tables()["klein-4b"] == {
        "512x512": 0.028, "768x768": 0.062, "1024x1024": 0.11, "1536x1536": 0.25, "2048x2048": 0.44
    }  # fmt: skip


def test_table_of_a_small_model_has_its_own_size():
    """nano generates at its own size, whatever is asked for: the latest of all images tells what the next takes."""
    history = TimingHistory()
    for side, seconds in ((1024, 0.3), (64, 0.4)):
        history.note(
            Job("a", size=Exact(side, side), model="nano"), replace(painting(side, side), model="nano"), seconds
        )
    assert history.tables() == {"nano": {f"{SIDE}x{SIDE}": 0.4}}
    for side in (64, SIDE, 1024):
        assert history.seconds(Job("b", size=Exact(side, side), model="nano")) == pytest.approx(0.4)
    photo = np.zeros((900, 900, 3), np.uint8)
    assert history.seconds(Job("b", references=(photo,), model="nano")) == pytest.approx(0.8)


def test_of_equally_near_measurements_the_latest_counts():
    history = TimingHistory()
    for seconds in (9.0, 1.0):
        history.note(Job("a", size=Exact(512, 512)), painting(512, 512), seconds)
    assert history.seconds(Job("b", size=Exact(512, 512))) == pytest.approx(1.0)


def test_only_images_of_the_default_steps_are_measured():
    """An image of 200 steps would be what `status` says of every image."""
    history = TimingHistory()
    history.note(Job("a", size=Exact(512, 512)), painting(512, 512), 1.0)
    history.note(Job("a", size=Exact(512, 512), steps=200, model="klein-4b"), painting(512, 512), 50.0)
    assert history.tables()["klein-4b"]["512x512"] == 1.0
    # klein-4b is made for 4 steps.
    assert history.seconds(Job("b", size=Exact(512, 512), steps=200, model="klein-4b")) == pytest.approx(50.0)


def test_it_survives_the_process_and_does_not_grow_without_end(tmp_path: Path):
    path = tmp_path / "history.json"
    first = TimingHistory(path)
    for number in range(3 * MEASUREMENTS):
        first.note(Job("a", size=Exact(512, 512)), painting(512, 512), float(number))
    second = TimingHistory(path)
    assert second.seconds(Job("b", size=Exact(512, 512))) == first.seconds(Job("b", size=Exact(512, 512)))
    assert path.stat().st_size < 4000
    assert second.tables()["klein-4b"]["1024x1024"] == pytest.approx(4 * (3 * MEASUREMENTS - 1), rel=0.01)


DAMAGED = [
    b"", b"{", b"[]", b'{"seconds": 3}', b'{"seconds": {"klein-4b": [["x", 1]]}, "native": {}}', b"\xff",
    b'{"seconds": {"auto": [[0, 1]]}, "native": {}}', b'{"seconds": {"auto": [[NaN, 1], [-1, 1]]}, "native": {}}',
    b'{"seconds": {"auto": [[1, Infinity]]}, "native": {"auto": 0}}', b"[" * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_file_is_forgotten(content: bytes, tmp_path: Path):
    path = tmp_path / "history.json"
    path.write_bytes(content)
    history = TimingHistory(path)
    history.note(Job("a", size=Exact(512, 512)), painting(512, 512), 1.0)
    assert TimingHistory(path).seconds(Job("a", size=Exact(512, 512))) == 1.0
    assert history.seconds(Job("b")) is not None


def test_a_full_disk_costs_the_estimate_and_not_the_picture(tmp_path: Path):
    history = TimingHistory(tmp_path / "missing" / "history.json")
    history.note(Job("a"), painting(128, 128), 0.2)
    assert history.seconds(Job("a")) == pytest.approx(0.2)
