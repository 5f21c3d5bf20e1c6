"""Tests of prompt rewriting for small models.

Their vocabulary is an invented one, or one of `worlds`.
"""

import time
from dataclasses import replace

import pytest

from engine.families.klein.reading import Reading, read_prompt
from engine.families.klein.variants import VARIANTS, Variant
from engine.nano.training.prompts import PromptSampler, training_prompts
from tests.engine.worlds import BOTH_WORLDS, LARGER, PLAIN

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
        ("Keep the cat and insert a dog on the left", "add a dog on the left"),
        ("No people, just a dog at night. A blue background.", "a dog at night. a blue background."),
        ("Keep the cat and add a star on the right", "add a star on the right"),
        ("Remove the cat, and do not add or move anything", "Remove the cat"),
        ("keep everything else the same and move the apple left", "move the apple left"),
        ("an apple plus a cat", "an apple and a cat"),
        ("make the star emerald", "make the star green"),
        ("an emerald star", "a green star"),
        ("make the light blue star deep red", "make the blue star red"),
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
        ("a catering dog", "a dog", "does not know catering"),
        ("a striped furry red circle", "a red circle", "does not know striped, furry"),
        ("make the sofa blue", "make the sofa blue", "does not know sofa"),
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


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("five cats on red", "a cat on red"),
        ("5 cats on red", "a cat on red"),
        ("a dozen big cats on red", "a big cat on red"),
        ("add several red stars at the top", "add a red star at the top"),
        ("two cats on red", "two cats on red"),
    ],
)
def test_known_plural_without_a_known_number_is_one_thing(prompt: str, text: str) -> None:
    """A bare plural is in no sentence of practice."""
    assert read_prompt(prompt, COUNTS).text == text


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


@pytest.mark.parametrize(
    ("prompt", "then"),
    [
        ("a blue cat", "blue is ignored"),
        ("make the cat blue", "making it blue may spoil it, or do nothing"),
        ("change the color of the cat to blue", "making it blue may spoil it, or do nothing"),
    ],
)
def test_colour_of_an_object_with_fixed_colours_is_reported(prompt: str, then: str) -> None:
    assert read_prompt(prompt, SMALL).warnings == (f"nano paints every cat in its own colours; {then}",)


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


@BOTH_WORLDS
@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("a cat", "a cat on a white background"),
        ("a cat on the left.", "a cat on the left on a white background"),
        ("draw a red star", "draw a red star on a white background"),
        ("a house", "a house on a blue background"),
        ("a white circle and a dog", "a white circle and a dog on a blue background"),
        ("a cat on a red star", "a cat on a red star on a white background"),
        ("a dog in the mountains", "a dog in the mountains on a white background"),
    ],
)
def test_new_image_without_a_background_gets_a_plain_one(variant: Variant, prompt: str, text: str) -> None:
    assert read_prompt(prompt, variant, new=True).text == text
    assert read_prompt(prompt, variant).text == prompt


@BOTH_WORLDS
@pytest.mark.parametrize(
    "prompt",
    [
        "a cat in the snow",
        "a cat at night",
        "a cat under the stars",
        "a cat on grass",
        "a cat on blue",
        "a cat with a red background",
        "in a meadow, a cat",
        "add a cat on the left",
        "something else entirely",
    ],
)
def test_named_backgrounds_and_edits_get_no_other(variant: Variant, prompt: str) -> None:
    assert read_prompt(prompt, variant, new=True).text == prompt


def test_background_that_only_some_models_know_is_a_background_there() -> None:
    for prompt in ("a cat on the floor", "a cat among trees", "a rocket in space"):
        assert read_prompt(prompt, LARGER, new=True) == Reading(prompt)


CROWD = "an apple, a banana, a pizza, a dog and a cat on a green background"


@pytest.mark.parametrize(("variant", "most"), [(PLAIN, "three"), (LARGER, "four")])
def test_more_things_than_it_paints_cause_one_warning(variant: Variant, most: str) -> None:
    assert read_prompt(CROWD, variant, new=True) == Reading(CROWD, (f"nano paints at most {most} things; name fewer",))


def test_things_are_counted_by_their_numbers_and_only_if_new() -> None:
    assert read_prompt("two cats and three dogs on white", LARGER).warnings
    assert not read_prompt("two cats and two dogs on white", LARGER).warnings
    assert not read_prompt("a cat, a dog, a star and a heart among trees", LARGER).warnings
    assert not read_prompt("replace the cat, the dog, the apple and the heart with a star", PLAIN).warnings


@BOTH_WORLDS
@pytest.mark.parametrize(
    ("prompt", "example"),
    [
        ("make it smaller", 'it: "make the circle smaller"'),
        ("make it red", 'it: "make the circle red"'),
        ("turn it into a cat", 'it: "turn the circle into a cat"'),
        ("Remove it.", 'it: "Remove the circle"'),
    ],
)
def test_edit_of_it_asks_for_the_thing(variant: Variant, prompt: str, example: str) -> None:
    assert read_prompt(prompt, variant).warnings == (f"name the thing instead of {example}",)


@pytest.mark.parametrize("prompt", ["put it in the snow", "give it a green background", "put it on a red background"])
def test_it_may_stand_for_the_scene_before_a_background(prompt: str) -> None:
    assert read_prompt(prompt, PLAIN) == Reading(prompt)


@pytest.mark.parametrize("prompt", ["add a red heart", "add a cat", "put a cat", "please place a star"])
def test_thing_to_add_without_a_place_asks_for_one(prompt: str) -> None:
    assert read_prompt(prompt, PLAIN).warnings == ('say where, such as "on the left" or "at the top"',)
    assert not read_prompt(f"{prompt} at the top", PLAIN).warnings


@pytest.mark.parametrize(
    "prompt", ["add a cat beside the dog", "add a hat on the dog", "put a cat in place of the dog", "draw a cat on red"]
)
def test_relations_and_replacements_are_places(prompt: str) -> None:
    assert not read_prompt(prompt, PLAIN, new=prompt.startswith("draw")).warnings


@pytest.mark.parametrize(
    ("prompt", "plain", "larger"),
    [
        ("a dog in the forest", "a dog in the meadow", "a dog in the forest"),
        ("a dog in the jungle", "a dog in the meadow", "a dog in the forest"),
        ("a dog in the park", "a dog in the meadow", "a dog in the meadow"),
        ("a dog in the garden", "a dog in the meadow", "a dog in the meadow"),
        ("a dog on the beach", "a dog on the sand", "a dog on the beach"),
        ("a sailboat on the lake", "a sailboat on the sea", "a sailboat on the sea"),
        ("change the background to a forest", "change the background to a meadow", "change the background to a forest"),
    ],
)
def test_grounds_are_read_as_grounds_not_as_things(prompt: str, plain: str, larger: str) -> None:
    assert read_prompt(prompt, PLAIN) == Reading(plain)
    assert read_prompt(prompt, LARGER) == Reading(larger)


def test_ground_without_a_known_one_is_named() -> None:
    (warning,) = read_prompt("a dog in the city", PLAIN).warnings
    assert "does not know city" in warning


@BOTH_WORLDS
@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("I would like a green background instead of the yellow one", "make the background green"),
        ("I want a dog instead of the cat", "replace the cat with a dog"),
        ("put a dog instead of the cat", "replace the cat with a dog"),
        ("make the circle red instead of blue", "make the circle red"),
        ("Can you please remove the cat?", "remove the cat"),
        ("I'd like you to make the background green.", "make the background green"),
        ("please give me a cat on blue", "a cat on blue"),
        ("I need to see a cat on blue", "a cat on blue"),
        ("Hello, could you add a cat on the left", "add a cat on the left"),
    ],
)
def test_polite_openings_are_left_out(variant: Variant, prompt: str, text: str) -> None:
    assert read_prompt(prompt, variant) == Reading(text)


def test_rest_of_unknown_words_is_counted_in_right_grammar() -> None:
    named = "nano does not know qa, qb, qc, qd and"
    assert read_prompt("a cat with qa qb qc qd qe", PLAIN).warnings == (
        f"{named} 1 more word; klein-mcp pull klein-4b",
    )
    assert read_prompt("a cat with qa qb qc qd qe qf", PLAIN).warnings[0].startswith(f"{named} 2 more words;")


@BOTH_WORLDS
@pytest.mark.parametrize(
    "prompt",
    [
        "ein Hund auf einer Wiese",
        "Ein Elefant im Schnee",
        "mach den Hintergrund grün",
        "une pomme sur un fond bleu",
        "un gato rojo en la nieve",
        "собака на траве",
        "一只猫在草地上",
    ],
)
def test_other_languages_get_one_line(variant: Variant, prompt: str) -> None:
    line = "nano reads English: translate the prompt, or klein-mcp pull klein-4b"
    assert read_prompt(prompt, variant, new=True) == Reading(prompt, (line,))


@pytest.mark.parametrize(
    "prompt", ["a piñata in the style of Miró", "vintage steampunk airship", "a dog in Los Angeles"]
)
def test_unknown_words_of_english_are_no_other_language(prompt: str) -> None:
    (warning,) = read_prompt(prompt, PLAIN).warnings
    assert "does not know" in warning


@pytest.mark.parametrize(
    "prompt", ["x" * 4000, "red " * 1000, "fluffy " * 500 + "cat", "image 1," * 450, "bleo " * 800]
)
def test_endless_prompt_is_read_at_once(prompt: str) -> None:
    start = time.process_time()
    read_prompt(prompt, LARGER, new=True)
    assert time.process_time() - start < 1  # 0.1 observed


def test_practised_sentences_are_read_as_they_are() -> None:
    """Except for capitals, full stops and "a orange", which nano practised too."""
    sampler = PromptSampler("reading")
    for task in ("generate", "edit"):
        for _ in range(100):
            prompt = training_prompts(sampler, task).prompt
            reading = read_prompt(prompt, LARGER, new=task == "generate")
            assert reading.warnings == ()
            assert _typed(reading.text) == _typed(prompt)


def _typed(text: str) -> str:
    return " ".join(text.lower().rstrip(". ").replace("a orange", "an orange").replace("blue sky", "sky").split())


@pytest.mark.parametrize(
    "prompt",
    [
        "the cat from image 1, the dog from image 2, the car from image 3 and the hat from image 4 on red",
        "the cat from image 1, the dog from image 2 and the car from image 3 in a row on red",
    ],
)
def test_references_whose_places_are_clear_get_no_others(prompt: str) -> None:
    assert read_prompt(prompt, LARGER) == Reading(prompt)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("add a red apple", "add a red apple in the corner"),
        ("Please put a cat here!", "Please put a cat here in the corner"),
        ("draw two dogs.", "draw two dogs in the corner"),
        ("add a dog above the cat", "add a dog above the cat"),
        ("add a star on the left", "add a star on the left"),
        ("make the cat red", "make the cat red"),
    ],
)
def test_thing_that_is_added_gets_the_place_of_the_change(prompt: str, text: str) -> None:
    world = replace(SMALL, words=SMALL.words | {"corner", "draw", "two", "dogs"})
    assert read_prompt(prompt, world, place="in the corner").text == text
    assert read_prompt(prompt, VARIANTS["klein-4b"], place="in the corner") == Reading(prompt)
