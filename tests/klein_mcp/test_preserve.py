"""Untouched means untouched: bytes outside a change are the original's, and the measured change is true."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.contract import ChangeMask
from klein_mcp.images import preserve, region
from tests.images import noise, scene


def opacity(height: int, width: int, seed: int) -> np.ndarray:
    """Random opacities, two thirds of them 0."""
    rng = np.random.default_rng(seed)
    return (rng.integers(0, 256, (height, width)) * (rng.random((height, width)) < 1 / 3)).astype(np.uint8)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 9), st.integers(0, 9), st.integers(0, 99))
def test_bytes_are_the_originals_wherever_opacity_is_zero(width, height, x, y, seed):
    original, painted = noise(width + x + 3, height + y + 2, seed), noise(width, height, seed + 1)
    weight = opacity(height, width, seed)
    result = preserve.put_back(painted, original, weight, (x, y))
    assert preserve.is_kept(result, original, weight, (x, y))
    inside = result[y : y + height, x : x + width]
    assert np.array_equal(inside[weight == 255], painted[weight == 255])


def test_one_foreign_byte_outside_the_change_is_noticed():
    original = noise(40, 30)
    weight = np.zeros((30, 40), np.uint8)
    weight[5:9, 5:9] = 255
    result = preserve.put_back(noise(40, 30, 1), original, weight)
    result[20, 20, 1] ^= 1
    assert not preserve.is_kept(result, original, weight)


def test_share_and_box_tell_what_changed_visibly():
    original = scene(100, 80)
    result = original.copy()
    result[10:30, 50:90] ^= 128
    changed = preserve.measure(result, original, kept=True)
    assert changed.box == (50, 10, 40, 20)
    assert changed.share == pytest.approx(800 / 8000, abs=0.001)  # the corners count as specks
    assert changed.to_json() == {"share": changed.share, "box": [50, 10, 40, 20], "kept": True}


@pytest.mark.parametrize(
    "disturb",
    [
        lambda image: np.clip(image.astype(int) + np.random.default_rng(0).integers(-20, 21, image.shape), 0, 255),
        lambda image: np.concatenate([255 - image[:, :1], image[:, 1:]], axis=1),
    ],
    ids=["noise below what is seen", "a border of one pixel"],
)
def test_what_nobody_sees_is_no_change(disturb):
    original = scene(64, 64)
    changed = preserve.measure(disturb(original).astype(np.uint8), original, kept=False)
    assert changed.share == 0
    assert changed.box is None


def test_share_within_a_region_counts_the_region_alone():
    original = scene(100, 100)
    result = original.copy()
    result[20:40, 20:40] ^= 128
    allowed = np.zeros((100, 100), bool)
    allowed[20:60, 20:60] = True
    assert preserve.measure(result, original, allowed, kept=True).share == pytest.approx(0.25, abs=0.01)


def test_region_and_change_meet():
    image = scene(400, 320)
    part = region.edit_region(image, (200, 160, 180, 140), None)
    seen = part.crop(image)
    found = np.zeros(seen.shape[:2], np.uint8)
    found[: seen.shape[0] // 2] = 255
    result = part.composite(255 - seen, image, ChangeMask(found))
    differs = (result != image).any(axis=2)
    _, top, _, bottom = part.box
    assert differs.any()
    assert not differs[:, :100].any()
    assert not differs[top + (bottom - top) // 2 + 1 :].any()


def test_global_change_fills_all_of_its_region():
    image = scene(400, 320)
    part = region.edit_region(image, (200, 160, 180, 140), None)
    seen = part.crop(image)
    whole = ChangeMask(np.full(seen.shape[:2], 255, np.uint8), whole=True)
    assert np.array_equal(part.composite(255 - seen, image, whole), part.composite(255 - seen, image))


@pytest.mark.parametrize("channels", [3, 4])
def test_difference_is_the_largest_of_any_channel(channels: int) -> None:
    rng = np.random.default_rng(channels)
    first, second = (rng.integers(0, 256, (17, 23, channels), dtype=np.uint8) for _ in range(2))
    expected = np.abs(first.astype(int) - second.astype(int)).max(axis=2)
    assert np.array_equal(preserve.difference(first, second), expected)
