"""Misspelt words of a prompt, and words of English that only look like it."""

import pytest

from engine.families.klein.reading import Reading, read_prompt
from engine.families.klein.spelling import corrected
from engine.families.klein.variants import Variant
from tests.engine.worlds import BOTH_WORLDS, LARGER, PLAIN


@BOTH_WORLDS
@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("make the backgroud purple", "make the background purple"),
        ("make the bakground gren", "make the background green"),
        ("a aple on a yelow backround", "an apple on a yellow background"),
        ("a pengiun on white", "a penguin on white"),
        ("an elefant on white", "an elephant on white"),
        ("a bleu star on white", "a blue star on white"),
        ("repalce the cat with a dog", "replace the cat with a dog"),
        ("make the circle smaler", "make the circle smaller"),
        ("Bananna on the left on red", "Banana on the left on red"),
    ],
)
def test_misspelt_words_are_read_as_the_known_word(variant: Variant, prompt: str, text: str) -> None:
    assert read_prompt(prompt, variant) == Reading(text)


def test_misspelt_plural_is_read_as_the_plural() -> None:
    assert read_prompt("two aples on white", LARGER).text == "two apples on white"
    assert read_prompt("two aples on white", PLAIN).text == "an apple on white"


_ENGLISH = """
    fox bear boar lion goat bat hen ant bed sun box cap mat rat pear boat coat goal king wing corn crow clown glass
    class grease brass mouse moose horse hose hearse rose nose cake cape cage cave lake rake bake bird bard beard
    bread bead fist dish wish hook cook look boot root roof moon noon spoon stair star stage snake snack shake
    rocket pocket racket socket locket carrot parrot garrote crown brown frown clock cloak block flock crane frame
    plate place palace plant pant paint point print white write while black back block green greed queen grain blank
    plank planet plane pine pink wine whale wheel whip ship shop sheep sheet shirt skirt shell train brain
    trail tray truck track trick table tablet cable stable chair choir cheese chase chess chest church bench beach
    peach perch torch porch night knight light flight right fight sight bottle battle button bottom kettle cattle
    castle candle handle sandal saddle cotton robot robin ribbon rabbit ring rink sink song string strong street
    stream storm stone store story snow snot desert dessert forest frost ghost guest coast toast roast heart earth
    hearth heat hear head heard flower flour tower shower floor flood blood field shield yield cactus circus circle
    cycle camera camel cameo guitar sitar tiger tier turtle turret tractor traitor factor butter butterfly balloon
    ballot banana bandana burger burglar bus bush dust duck dock deck neck book brook broom groom drum dream cream
    cross grass crops class cart card yard sword word world wood wolf golf gulf glove globe stove dove cup cub tub
    tube cube cuff cliff scarf shark spark park bark barn yarn corner change chance charge remote remove room broth
    winner winter painter printer singer finger hammer hamper ladder lather
"""


@BOTH_WORLDS
def test_words_of_english_are_never_corrected(variant: Variant) -> None:
    for word in _ENGLISH.split():
        assert corrected(word, variant) == word


def test_word_that_is_not_surely_misspelt_gets_a_suggestion() -> None:
    (warning,) = read_prompt("an olephant on white", PLAIN).warnings
    assert warning == "nano does not know olephant (did you mean elephant?); klein-mcp pull klein-4b"
    (warning,) = read_prompt("a boxx on white", PLAIN).warnings
    assert warning == "nano does not know boxx; klein-mcp pull klein-4b"
