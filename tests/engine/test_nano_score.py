"""Tests of the scorer that measures how well nano follows prompts.

It accepts the true images and rejects blobs, blurs and unrelated images.
"""

from functools import lru_cache

import numpy as np
import pytest
from PIL import Image, ImageFilter

from engine.nano.training.questions import Question, at_scale, questions
from engine.nano.training.scenes import Scene
from engine.nano.training.score import (
    Rgb8,
    _blob,
    background_right,
    composed,
    draw,
    edit_done,
    in_units,
    look,
    place_right,
    places_right,
    rest_kept,
    sharpness,
)
from engine.nano.training.sprites import atlas
from engine.nano.words import COLOURS


@lru_cache(maxsize=1)
def _asked() -> list[Question]:
    return list(questions())


def _some(*parts: str, every: int) -> list[Question]:
    return [q for q in _asked() if q[0] in parts and q[1] % every == 0]


def _truth(q: Question) -> Rgb8:
    return draw(q[2].target, frame=q[2].frame)[0]


def _blobs(scene: Scene) -> Rgb8:
    """Return the scene with an ellipse of the right place, extent and mean colour for each object."""
    image = draw(Scene(scene.background))[0].astype(float)
    for thing in scene.things:
        left, top, right, bottom = thing.box()
        blob = _blob(atlas()[thing.size][thing.kind].astype(np.float32))
        here = image[top:bottom, left:right]
        here[:] = here * (1 - blob[..., 3:] / 255) + blob[..., :3]
    return image.round().astype(np.uint8)


def _share_right(images: list[Rgb8], asked: list[Question]) -> float:
    """Return the share of objects found, without circles, which are blobs themselves."""
    verdicts = [
        look(image, q[2].target, i).right(thing)
        for q, image in zip(asked, images, strict=True)
        for i, thing in enumerate(q[2].target.things)
        if thing.shape != "circle"
    ]
    return float(np.mean(verdicts))


def test_truth_scores_at_least_99_percent_on_every_measure():
    asked = _some("one", "two", every=20)
    images = [_truth(q) for q in asked]
    assert _share_right(images, asked) >= 0.99
    assert all(background_right(image, q[2].target) for q, image in zip(asked, images, strict=True))
    for (part, _, example), image in zip(asked, images, strict=True):
        assert place_right(image, example.target) if part == "one" else places_right(image, example.target)
        for i, thing in enumerate(example.target.things):
            assert thing.colour in (None, look(image, example.target, i).colour)


def test_truth_of_edits_and_compositions_passes_and_keeps_everything():
    for q in _some("edit", every=10):
        assert edit_done(_truth(q), q[2]), q[2].prompt
        assert rest_kept(_truth(q), q[2]) == 0.0
    assert all(composed(_truth(q), q[2].target) for q in _some("compose", every=30))


def test_truth_of_groups_nested_things_and_other_shapes_passes():
    """Observed: all of the list's."""
    for q in _some("count", "inside", "four", "shape", every=10):
        assert composed(_truth(q), q[2].target), q[2].prompt


def test_truth_at_256_pixels_scores_as_at_128():
    asked = at_scale(_some("one", every=20), 2)
    images = [_truth(q) for q in asked]
    assert images[0].shape == (256, 256, 3)
    small = [in_units(image, q[2].frame) for q, image in zip(asked, images, strict=True)]
    assert _share_right(small, asked) >= 0.99


def test_edit_that_changed_nothing_is_not_done():
    unchanged = [q for q in _some("edit", every=8) if edit_done(draw(*q[2].references)[0], q[2])]
    assert not [q[2].prompt for q in unchanged]


def test_blobs_of_the_right_colour_place_and_extent_fail():
    asked = _some("one", "two", every=20)
    assert _share_right([_blobs(q[2].target) for q in asked], asked) <= 0.03


def test_other_images_score_near_chance():
    asked = _some("one", "two", every=20)
    others = [_truth(q) for q in (*asked[1:], asked[0])]
    assert _share_right(others, asked) <= 0.05
    wrong = [background_right(image, q[2].target) for image, q in zip(others, asked, strict=True)]
    assert np.mean(wrong) <= 0.25


@pytest.mark.parametrize(("radius", "at_most"), [(6, 0.25), (10, 0.05)])
def test_heavy_blur_fails(radius, at_most):
    """Observed on the whole first list: radius 2 keeps 90 %, 4 keeps 48 %, 6 keeps 11 %."""
    asked = _some("one", "two", every=30)
    blurred = [Image.fromarray(_truth(q)).filter(ImageFilter.GaussianBlur(radius)) for q in asked]
    assert _share_right([np.asarray(image) for image in blurred], asked) <= at_most


def test_truth_has_sharpness_one_and_a_blur_has_less():
    """Observed at 256 pixels: a blur of radius 1 keeps 0.26 … 0.49."""
    for q in at_scale(_some("one", every=60), 2):
        truth = _truth(q)
        assert sharpness(truth, q[2], 0) == pytest.approx(1.0)
        blurred = np.asarray(Image.fromarray(truth).filter(ImageFilter.GaussianBlur(1)))
        assert 0.1 < sharpness(blurred, q[2], 0) < 0.6


def test_shape_in_a_neighbouring_colour_has_the_wrong_colour():
    example = next(q[2] for q in _asked() if q[0] == "one" and q[2].target.things[0].name.startswith("red"))
    (thing,) = example.target.things
    image = draw(example.target)[0].copy()
    red, orange = (np.array(COLOURS[name]) for name in ("red", "orange"))
    image[np.abs(image.astype(int) - red).max(axis=-1) < 8] = orange
    finding = look(image, example.target, 0)
    assert finding.colour == list(COLOURS).index("orange")
    assert not finding.right(thing)


def test_object_in_the_wrong_place_is_noticed():
    for _, _, example in _some("two", every=30):
        first, second = example.target.things
        swapped = Scene(
            example.target.background,
            (type(first)(first.kind, first.size, second.slot), type(first)(second.kind, second.size, first.slot)),
        )
        assert not places_right(draw(swapped)[0], example.target)
