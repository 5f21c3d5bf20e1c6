"""Previews always fit their budget, and sheets show each image."""

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from klein_mcp.images.preview import AIM_BYTES, LONG_EDGE, MAX_BYTES, contact_sheet, preview, thumbnail
from tests.images import noise, scene


@settings(max_examples=25, deadline=None)
@given(
    width=st.integers(1, 2048),
    height=st.integers(1, 2048),
    grain=st.sampled_from([0, 8, 64, 256]),
    alpha=st.sampled_from([None, "opaque", "noise", "half"]),
    longest=st.sampled_from([64, LONG_EDGE, 1568]),
)
def test_preview_fits_whatever_it_shows(width: int, height: int, grain: int, alpha: str | None, longest: int):
    image: Any = scene(width, height)
    random = np.random.default_rng(0)
    if grain:
        image = (image.astype(int) + random.integers(0, grain, image.shape)).clip(0, 255).astype(np.uint8)
    if alpha:
        opacity = {
            "opaque": np.full((height, width), 255, np.uint8),
            "noise": random.integers(0, 256, (height, width), np.uint8),
            "half": np.full((height, width), 128, np.uint8),
        }[alpha]
        image = np.dstack([image, opacity])
    data, mime = preview(image, longest=longest)
    assert len(data) <= MAX_BYTES
    with Image.open(io.BytesIO(data)) as opened:
        assert max(opened.size) <= longest
        assert Image.MIME[opened.format or ""] == mime
        scale = max(opened.size) / max(width, height)
        assert opened.size == (max(1, round(width * scale)), max(1, round(height * scale))) or (
            abs(opened.width - width * scale) <= 1 and abs(opened.height - height * scale) <= 1
        )
        assert (mime, opened.mode) == ("image/jpeg", "RGB")


@pytest.mark.parametrize(("colour", "backing"), [((200, 30, 40), 128), ((128, 128, 130), 255), ((20, 20, 20), 128)])
def test_transparent_image_is_shown_on_a_grey_that_stands_out(colour: tuple[int, int, int], backing: int):
    image = np.zeros((64, 64, 4), np.uint8)
    image[16:48, 16:48] = (*colour, 255)
    with Image.open(io.BytesIO(preview(image)[0])) as opened:
        shown = np.asarray(opened).astype(int)
    assert np.abs(shown[4, 4] - backing).max() < 12
    assert np.abs(shown[32, 32] - colour).max() < 12  # JPEG's error
    cell = contact_sheet([image, image])
    assert (cell == backing).all(axis=2).any()


def test_image_that_fits_keeps_its_quality_and_its_size():
    data, _ = preview(scene(1024, 768))
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.size == (1024, 768)
        error = np.abs(np.asarray(opened).astype(int) - scene(1024, 768).astype(int))
    assert len(data) < AIM_BYTES
    assert error.mean() < 2


def test_quality_goes_down_before_size():
    busy = (noise(1024, 1024) // 2 + 60).astype(np.uint8)
    data, _ = preview(busy)
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.size == (1024, 1024)  # between aim and limit at the lowest quality: kept at full size
        assert np.abs(np.asarray(opened).astype(int) - busy).mean() > 2  # and it cost quality
    assert len(data) <= MAX_BYTES


@pytest.mark.parametrize("count", [2, 3, 4])
def test_sheet_shows_each_image_whole(count: int):
    shades = [40, 90, 140, 190]
    sheet = contact_sheet([np.full((300, 200, 3), shade, np.uint8) for shade in shades[:count]])
    for index, shade in enumerate(shades[:count]):
        assert (sheet == shade).all(axis=2).sum() > 200 * 300 * 0.9, index


def test_label_of_a_narrow_image_does_not_reach_the_next():
    sheet = contact_sheet([np.zeros((60, 20, 3), np.uint8)] * 2, ["original", "1 k7f3q2"])
    gaps = (sheet[:20] == 255).all(axis=(0, 2))
    assert gaps[sheet.shape[1] // 2 - 4 : sheet.shape[1] // 2 + 4].all()


def test_sheet_of_large_images_is_no_larger_than_preview():
    assert max(contact_sheet([scene(2048, 1024)] * 4).shape) <= LONG_EDGE


def test_thumbnail_stays_transparent_and_small() -> None:
    image = np.dstack([scene(512, 512), np.full((512, 512), 255, np.uint8)])
    image[:256, :, 3] = 0
    data, mime = thumbnail(image, 256)
    assert mime == "image/webp"
    assert len(data) < 60_000
    made = np.asarray(Image.open(io.BytesIO(data)))
    assert made.shape == (256, 256, 4)
    assert made[:120, :, 3].max() == 0
    assert made[136:, :, 3].min() == 255
    assert thumbnail(image[:, :, :3], 256)[1] == "image/jpeg"
