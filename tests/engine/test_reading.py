"""Tests of prompt rewriting for small models.

Cases without a model use an invented vocabulary; nano's edits are scored.
"""

from dataclasses import replace

import numpy as np
import pytest

from engine.contract import EngineConfig, Job, KeepSource, Result, Rgb8
from engine.engine import Engine
from engine.families.klein.reading import read_prompt
from engine.families.klein.variants import VARIANTS
from engine.nano.training.compositor import BACKGROUNDS
from engine.nano.training.edits import touched
from engine.nano.training.prompts import Example
from engine.nano.training.scenes import MIDDLE, NORMAL, Scene, Thing
from engine.nano.training.score import draw, edit_done, look
from engine.nano.training.sprites import KINDS
from tests.embedded import in_units

NOUNS = {"cat": ("orange",), "dog": (), "apple": ("red",), "rocket": (), "house": (), "octopus": ("pink",)}
SHAPES = frozenset({"circle", "star"})
COLOURS = frozenset({"red", "blue", "green", "gray", "white"})
_OTHERS = """
    a an the of in on at to from with and above beside left right make background remove add move change color drawing
    photo image night sea sunset please replace put picture
"""
SMALL = replace(
    VARIANTS["nano"],
    nouns=NOUNS,
    shapes=SHAPES,
    colours=COLOURS,
    words=frozenset((*_OTHERS.split(), *NOUNS, *SHAPES, *COLOURS)),
)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("Make the background green. Keep everything else as it is.", "Make the background green"),
        ("Make the background green, keeping everything else exactly the same.", "Make the background green"),
        ("Don't change the background. Move the apple to the left.", "Move the apple to the left"),
        ("Please remove the cat without changing anything else", "Please remove the cat"),
        ("add a dog on the left. The rest stays.", "add a dog on the left"),
        ("a cat on blue, no text", "a cat on blue"),
        ("A shiny red apple centred on a grey background", "a red apple on a gray background"),
        ("recolour the circle blue", "color the circle blue"),
        ("two kittens beside apples", "a cat beside an apple"),
        ("A sticker of an octopus, isolated on a white background", "a drawing of an octopus, on a white background"),
        ("a spaceship above a house at night", "a rocket above a house at night"),
        ("a DOG and a CAT", "a dog and a cat"),
        ("A red apple, centered, on a white background", "a red apple, on a white background"),
        ("a cat, fresh and bright", "a cat"),
        ("a cat that is on a blue background", "a cat on a blue background"),
        ("a photo of a dog, 4k, highly detailed", "a photo of a dog"),
        ("make the light blue circle red", "make the blue circle red"),
        ("a cat with no hat on a red background", "a cat on a red background"),
        ("a red circle and no star", "a red circle"),
        ("a red circle without border on blue background", "a red circle on blue background"),
        ("a cat, no text on the image, blue background", "a cat, blue background"),
        ("a dog, no people in the background", "a dog"),
        ("a cat and no dog on the left", "a cat"),
        ("A dog. No star on the left.", "a dog"),
        ("a cat without a dog on blue", "a cat on blue"),
        ("Keep the cat and insert a dog", "add a dog"),
        ("No people, just a dog at night. A blue background.", "a dog at night. a blue background."),
        ("Keep the cat and add a star", "add a star"),
        ("Remove the cat, and do not add or move anything", "Remove the cat"),
        ("keep everything else the same and move the apple left", "move the apple left"),
        ("an apple plus a cat", "an apple and a cat"),
        ("make the star emerald", "make the star green"),
        ("an emerald star", "a green star"),
        ("a catering dog", "a dog"),
    ],
)
def test_prompt_is_rewritten_in_known_words(prompt: str, text: str) -> None:
    reading = read_prompt(prompt, SMALL)
    assert reading.text.lower() == text.lower()
    # Only "two" is ignored, so only "two" causes a warning.
    assert len(reading.warnings) == ("two" in prompt)


@pytest.mark.parametrize(
    ("prompt", "text", "named"),
    [
        ("a blue cat on a red background", "a cat on a red background", "blue is ignored"),
        ("a blue apple", "an apple", "blue is ignored"),
        ("a cat sitting on a house", "a cat on a house", "does not know sitting"),
        ("a cat on blue sea", "a cat on the sea", ""),
        ("a red apple on white, studio lighting", "a red apple on white", "does not know studio, lighting"),
        ("an astronaut riding a house", "an astronaut riding a house", "does not know astronaut"),
        ("A wizard rides over mountains. A dog on red.", "a dog on red", "does not know wizard"),
        ("an emerald on red", "an emerald on red", "does not know emerald"),
        ("remove the star, keep the cat, and add a dog", "remove the star, and add a dog", "one change at a time"),
    ],
)
def test_words_that_would_only_distract_are_named_and_left_out(prompt: str, text: str, named: str) -> None:
    reading = read_prompt(prompt, SMALL)
    assert reading.text == text
    assert named in " ".join(reading.warnings)


def test_what_stands_behind_a_thing_that_shall_not_be_there_is_kept() -> None:
    reading = read_prompt("a cat, no dogs and no text, on a red background", SMALL)
    assert reading.text == "a cat, on a red background"
    assert read_prompt("make the background blue, no other changes.", SMALL).text == "make the background blue"
    assert read_prompt("a cat, no dogs. A red background", SMALL).text == "a cat. a red background"


def test_emoji_are_named_as_words_that_are_not_known() -> None:
    (warning,) = read_prompt("\N{CAT FACE}", SMALL).warnings
    assert warning.startswith("nano does not know \N{CAT FACE};")
    assert not read_prompt("a cat on red, 100 %", SMALL).warnings


def test_two_changes_in_one_sentence_cause_a_warning() -> None:
    (warning,) = read_prompt("Make the background blue and add a cat", SMALL).warnings
    assert warning == "nano makes one change at a time: give a list of prompts"
    assert read_prompt("make a picture of a cat and a dog", SMALL).warnings == ()


def test_stems_are_not_taken_from_other_words() -> None:
    knows_rid = replace(SMALL, words=SMALL.words | {"rid"})
    assert read_prompt("a cat riding a dog", knows_rid).text == "a cat riding a dog"


@pytest.mark.parametrize("prompt", ["make the background green", "Put the cat from image 1 beside the dog.", "keep it"])
def test_plain_prompt_is_unchanged(prompt: str) -> None:
    assert read_prompt(prompt, SMALL).text == prompt


def test_unknown_nouns_get_the_nearest_noun_and_a_suggestion() -> None:
    (warning,) = read_prompt("an astronaut on the sofa", SMALL).warnings
    assert warning == "nano does not know astronaut (nearest: rocket), sofa; klein-mcp pull klein-4b"


def test_number_of_things_whose_plural_is_known_is_reported() -> None:
    night = replace(SMALL, words=SMALL.words | {"stars"})
    for number in ("two", "three"):
        (warning,) = read_prompt(f"{number} stars on a blue background", night).warnings
        assert warning == f"nano paints one star: it knows no {number}"


SIZED = replace(SMALL, words=SMALL.words | {"small", "big", "huge", "next"})


@pytest.mark.parametrize(
    ("prompt", "text", "number"),
    [
        ("4 cats on a red background", "a cat on a red background", "four"),
        ("a pair of cats", "a cat", "pair"),
        ("a dozen red circles", "a red circle", "dozen"),
        ("twelve stars", "a star", "twelve"),
        ("a group of four small stars on red", "small star on red", "four"),
    ],
)
def test_number_in_any_form_is_reported_and_left_out(prompt: str, text: str, number: str) -> None:
    reading = read_prompt(prompt, SIZED)
    assert reading.text.removeprefix("a ") == text.removeprefix("a ")
    assert reading.warnings[0].endswith(f": it knows no {number}")


COUNTS = replace(SIZED, words=SIZED.words | {"two", "three", "four", "cats", "stars", "octopuses", "inside", "pair"})


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("three small kittens on red", "three small cats on red"),
        ("4 red stars", "four red stars"),
        ("a couple of cats", "two cats"),
        ("a pair of octopuses", "a pair of octopuses"),
        ("two cats and dogs", "two cats and a dog"),
        ("a cat inside a huge red star", "a cat inside a huge red star"),
    ],
)
def test_numbers_that_the_model_knows_are_kept(prompt: str, text: str) -> None:
    reading = read_prompt(prompt, COUNTS)
    assert (reading.text, reading.warnings) == (text, ())


def test_number_beyond_those_that_the_model_knows_is_reported() -> None:
    reading = read_prompt("five cats on red", COUNTS)
    assert reading.warnings == ("nano paints one cat: it knows no five",)


def test_number_of_things_without_a_name_is_reported() -> None:
    reads = replace(SMALL, words=SMALL.words | {"object"})
    (warning,) = read_prompt("Four objects on a red background", reads).warnings
    assert warning == "nano paints things that are named, each by its noun: it knows no four objects"
    assert not read_prompt("three objects: a cat, a dog and a star", reads).warnings
    assert not read_prompt("the cat from image 1 beside the dog from image 2", reads).warnings


@pytest.mark.parametrize("prompt", ["a small dog next to a big cat", "a huge rocket above a star on a blue background"])
def test_big_thing_beside_another_is_reported(prompt: str) -> None:
    assert read_prompt(prompt, SIZED).warnings == ("nano paints a big thing well only when it is alone",)


@pytest.mark.parametrize(
    "prompt", ["a big dog on a red background", "replace the cat with a big dog", "a small dog next to a cat"]
)
def test_sizes_that_nano_practised_are_not_reported(prompt: str) -> None:
    assert not read_prompt(prompt, SIZED).warnings


def test_endless_unknown_word_is_named_by_its_beginning() -> None:
    (warning,) = read_prompt("a red apple " + "x" * 3900, SMALL).warnings
    assert "x…" in warning
    assert len(warning) < 120


@pytest.mark.parametrize("prompt", ["a blue cat", "make the cat blue", "change the color of the cat to blue"])
def test_colour_of_an_object_with_fixed_colours_is_reported(prompt: str) -> None:
    assert read_prompt(prompt, SMALL).warnings == ("nano paints every cat in its own colours; blue is ignored",)


@pytest.mark.parametrize("prompt", ["a red apple", "a blue circle", "make the circle blue", "a cat on blue"])
def test_supported_colour_is_not_reported(prompt: str) -> None:
    assert read_prompt(prompt, SMALL).warnings == ()


def test_large_model_gets_the_prompt_unchanged() -> None:
    prompt = "  An astronaut, centred.  Keep everything else AS IT IS.\n"
    reading = read_prompt(prompt, VARIANTS["klein-4b"])
    assert (reading.text, reading.warnings) == (prompt, ())


LIST = "the apple from image 1, the house from image 2 and the rocket from image 3 on a blue background"
PLACES = (
    "the apple from image 1 on the left, the house from image 2 in the middle and the rocket from image 3 on the right"
    " on a blue background"
)
THREE = replace(SMALL, words=SMALL.words | {"1", "2", "3", "middle"})


@pytest.mark.parametrize(("prompt", "text"), [(LIST, PLACES), (PLACES, PLACES)])
def test_three_listed_references_are_given_places(prompt: str, text: str) -> None:
    assert read_prompt(prompt, THREE).text == text


# On nano


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(EngineConfig(device="cpu"))


def scene(ground: str, *things: tuple[str, tuple[int, int]]) -> Scene:
    return Scene(BACKGROUNDS.index(ground), tuple(Thing(KINDS.index(kind), NORMAL, slot) for kind, slot in things))


LEFT, RIGHT = (-1, 0), (1, 0)
SMALL_SIZE = NORMAL - 1
"""Things beside two others are painted smaller."""
EDITS = [
    ("background", "Make the background green", scene("blue", ("apple", MIDDLE)), scene("green", ("apple", MIDDLE))),
    ("background", "Put it in the snow", scene("green", ("dog", MIDDLE)), scene("snow", ("dog", MIDDLE))),
    ("remove", "Remove the cat", scene("white", ("cat", LEFT), ("car", RIGHT)), scene("white", ("car", RIGHT))),
    ("move", "Move the apple to the left", scene("cyan", ("apple", MIDDLE)), scene("cyan", ("apple", LEFT))),
    ("recolour", "Make the ring red", scene("white", ("blue ring", MIDDLE)), scene("white", ("red ring", MIDDLE))),
    ("replace", "Replace the fish with a bird", scene("pink", ("fish", MIDDLE)), scene("pink", ("bird", MIDDLE))),
    ("remove", "Delete the pizza", scene("blue", ("pizza", LEFT), ("duck", RIGHT)), scene("blue", ("duck", RIGHT))),
    ("replace", "Turn the house into a tree", scene("yellow", ("house", MIDDLE)), scene("yellow", ("tree", MIDDLE))),
]  # fmt: skip


def test_three_listed_references_are_all_composed(engine: Engine) -> None:
    sources = tuple(draw(scene("white", (kind, MIDDLE)))[0] for kind in ("apple", "house", "car"))
    listed, placed = (
        next(event for event in engine.run(Job(prompt, model="nano", references=sources)) if isinstance(event, Result))
        for prompt in (LIST.replace("rocket", "car"), PLACES.replace("rocket", "car"))
    )
    assert np.array_equal(listed.image, placed.image)
    kinds = zip(("apple", "house", "car"), (LEFT, MIDDLE, RIGHT), strict=True)
    result = Scene(BACKGROUNDS.index("blue"), tuple(Thing(KINDS.index(kind), SMALL_SIZE, slot) for kind, slot in kinds))
    for index, thing in enumerate(result.things):
        assert look(in_units(listed.image), result, index).nearest == thing.kind


@pytest.mark.parametrize(("kind", "prompt", "before", "after"), EDITS, ids=[edit[1] for edit in EDITS])
def test_edit_succeeds_with_and_without_a_preservation_sentence(
    engine: Engine, kind: str, prompt: str, before: Scene, after: Scene
) -> None:
    (source,) = draw(before)
    example = Example(kind, prompt, after, (before,), touched(before, after))
    plain = paint(engine, source, prompt)
    constrained = paint(engine, source, f"{prompt}. Keep everything else exactly as it is.")
    assert edit_done(plain.image, example)
    assert np.array_equal(constrained.image, plain.image)
    assert (plain.read_as, constrained.read_as) == ("", prompt)


def paint(engine: Engine, source: Rgb8, prompt: str) -> Result:
    *_, result = engine.run(Job(prompt, (source,), size=KeepSource(), model="nano", seed=7))
    assert isinstance(result, Result)
    return result
