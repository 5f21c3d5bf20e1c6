"""Tests how images are fitted to a canvas.

Sizes are whole tokens, aspect ratios fill the native area, and colours survive the round trip.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.contract import GRID, InvalidJob
from engine.diffusion.canvas import Canvas, fit_reference, size_for_aspect, to_rgb8, to_tensor

sides = st.integers(1, 4096)


def test_every_colour_survives_the_round_trip_to_the_model() -> None:
    levels = np.arange(256, dtype=np.uint8)
    image = np.stack([levels, levels[::-1], np.roll(levels, 7)], axis=-1).reshape(16, 16, 3)
    assert np.array_equal(to_rgb8(to_tensor(image)), image)


@given(width=sides, height=sides, side=st.sampled_from([128, 256, 1024, 2048]))
@settings(max_examples=300, deadline=None)
def test_canvas_holds_its_content_on_whole_tokens_within_the_area(width: int, height: int, side: int) -> None:
    frame = Canvas.of(width, height, side**2)
    assert frame.canvas_width % GRID == frame.canvas_height % GRID == 0
    assert 0 < frame.content_width <= frame.canvas_width
    assert 0 < frame.content_height <= frame.canvas_height
    assert frame.canvas_width * frame.canvas_height <= side**2
    # Evenly scaled: both sides give the same scale, to within a pixel of rounding.
    scale = frame.content_width / width if width > height else frame.content_height / height
    assert abs(frame.content_width - width * scale) <= 1
    assert abs(frame.content_height - height * scale) <= 1


@pytest.mark.parametrize(
    ("size", "canvas"),
    [
        ((512, 512), (1024, 1024)),
        ((300, 100), (1200, 400)),  # capped at 4×: the native area would need 5.9×
        ((40, 40), (160, 160)),
        ((1024, 1024), (1024, 1024)),
        ((1500, 1500), (1504, 1504)),  # never made smaller
    ],
)
def test_crop_is_enlarged_to_the_native_area_at_most_four_times(size: tuple[int, int], canvas: tuple[int, int]) -> None:
    frame = Canvas.of(*size, 2048**2, least=1024**2)
    assert (frame.canvas_width, frame.canvas_height) == canvas


@given(width=st.integers(17, 300), height=st.integers(17, 300))
@settings(max_examples=60, deadline=None)
def test_padding_then_cropping_returns_the_same_image(width: int, height: int) -> None:
    image = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    frame = Canvas.of(width, height, 1024**2)
    lifted = frame.crop(frame.pad(image))
    assert lifted.shape == image.shape
    if max(width, height) >= 64:
        assert np.array_equal(lifted, image)


def test_padding_repeats_the_edge() -> None:
    image = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    canvas = Canvas.of(90, 70, 1024**2).pad(image)
    assert canvas.shape == (80, 96, 3)
    assert np.array_equal(canvas[70:, :90], np.broadcast_to(image[69], (10, 90, 3)))


@pytest.mark.parametrize(
    ("aspect", "side", "size"),
    [
        ((1, 1), 1024, (1024, 1024)),
        ((16, 9), 1024, (1360, 768)),
        ((9, 16), 1024, (768, 1360)),
        ((3, 2), 1024, (1248, 832)),
        ((16, 9), 128, (160, 96)),
    ],
)
def test_aspect_ratio_fills_the_native_area(aspect: tuple[int, int], side: int, size: tuple[int, int]) -> None:
    assert size_for_aspect(aspect, side**2) == size


@given(st.integers(1, 8), st.integers(1, 8), st.sampled_from([128, 512, 1024]))
def test_aspect_ratio_never_exceeds_the_native_area(across: int, along: int, side: int) -> None:
    width, height = size_for_aspect((across, along), side**2)
    assert width % GRID == height % GRID == 0
    assert 0.4 * side**2 < width * height <= side**2


@given(width=sides, height=sides, side=st.sampled_from([64, 128, 256, 1024]), grid=st.sampled_from([32, 64]))
@settings(max_examples=200, deadline=None)
def test_canvas_has_whole_tokens_of_any_size(width: int, height: int, side: int, grid: int) -> None:
    frame = Canvas.of(width, height, side**2, grid=grid)
    rows, columns = frame.tokens
    assert (rows * grid, columns * grid) == (frame.canvas_height, frame.canvas_width)
    assert 0 < frame.content_width <= frame.canvas_width
    assert 0 < frame.content_height <= frame.canvas_height
    assert frame.canvas_width * frame.canvas_height <= side**2


@pytest.mark.parametrize("size", [(80, 112), (48, 64), (144, 256), (67, 129)])
def test_size_between_two_tokens_is_padded_and_cropped_exactly(size: tuple[int, int]) -> None:
    image = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    frame = Canvas.of(*size, 1024**2, grid=32)
    padded = frame.pad(image)
    assert padded.shape == (-(-size[1] // 32) * 32, -(-size[0] // 32) * 32, 3)
    assert np.array_equal(frame.crop(padded), image)


@given(st.integers(1, 8), st.integers(1, 8), st.sampled_from([64, 128, 256, 1024]))
def test_aspect_ratio_is_one_of_whole_larger_tokens(across: int, along: int, side: int) -> None:
    width, height = size_for_aspect((across, along), side**2, 32)
    assert width % 32 == height % 32 == 0
    assert 0.2 * side**2 < width * height <= side**2
    assert (width > height) <= (across > along)


@given(width=st.integers(64, 520), height=st.integers(64, 520), side=st.sampled_from([64, 256, 1024]))
@settings(max_examples=100, deadline=None)
def test_reference_is_cropped_to_whole_larger_tokens(width: int, height: int, side: int) -> None:
    if max(width, height) > 8 * min(width, height):
        return
    rows, columns, _ = fit_reference(np.zeros((height, width, 3), np.uint8), side**2, 32).shape
    assert rows % 32 == columns % 32 == 0
    assert 0 < rows <= height
    assert 0 < columns <= width


def test_aspect_ratio_beyond_8_to_1_is_refused() -> None:
    with pytest.raises(InvalidJob, match="at most 8:1"):
        size_for_aspect((9, 1), 1024**2)


def test_reference_is_never_enlarged() -> None:
    image = np.zeros((100, 80, 3), np.uint8)
    assert fit_reference(image, 1024**2).shape == (96, 80, 3)


@pytest.mark.parametrize(
    ("size", "seen"),
    [((64, 64), (256, 256)), ((130, 130), (256, 256)), ((222, 222), (256, 256)), ((230, 230), (224, 224)),
     ((260, 260), (256, 256)), ((900, 900), (256, 256)), ((128, 96), (288, 192)), ((288, 224), (288, 224))],
)  # fmt: skip
def test_reference_of_a_model_of_one_area_has_about_that_area(size: tuple[int, int], seen: tuple[int, int]) -> None:
    height, width, _ = fit_reference(np.zeros((size[1], size[0], 3), np.uint8), 256**2, 32, 256**2).shape
    assert (width, height) == seen
