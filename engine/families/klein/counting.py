"""Read the numbers of things in a prompt."""

import re
from collections.abc import Iterator

from engine.families.klein.synonyms import NUMBERS
from engine.families.klein.variants import Variant
from engine.families.klein.vocabulary import WORD, known_form, names_thing, singulars

_NUMBERS = "|".join(sorted(NUMBERS))
_GROUP = r"(?:an? )?(?:pair|couple|dozen|group|bunch|flock|herd|lots)(?: of)?"
_NUMBER = rf"(?<!image )\b(?:{_NUMBERS}|{_GROUP}|\d{{1,4}})"
_COUNTED = re.compile(rf"({_NUMBER})\s+(?:(?!(?:{_NUMBERS})\b)[^\W\d_]+\s+){{0,2}}?([^\W\d_]+s)\b(?!:)", re.IGNORECASE)
"""A number, and what it counts. "three objects: a cat, a dog and a car" names each."""
_AMOUNT = re.compile(rf"(?<!image )\b({_GROUP}|\d{{1,4}})\s+(?=(?:[^\W\d_]+\s+){{0,3}}?([^\W\d_]+s)\b)", re.IGNORECASE)
"""A number that is no single word."""
_ANY_THING = "object"
"""What small models know as any thing, of those that are in the image already."""
_WORD_OF = {"2": "two", "3": "three", "4": "four", "couple": "two"}
"""Numbers that a small model may know as a word. nano's sentences count to four."""
_VALUES = {"two": 2, "pair": 2, "three": 3, "four": 4}


def without_amounts(prompt: str, variant: Variant) -> str:
    """Replace numbers that are not single words, such as "a pair of".

    Those that the model knows as a word become that word, others "several".
    """

    def amount(match: re.Match[str]) -> str:
        number = _number(match[1])
        if number in variant.words:
            return match[0] if number in match[1].lower() else f"{number} "
        return "several " if _counted(match[2].lower(), variant) else match[0]

    return _AMOUNT.sub(amount, prompt)


def unknown_numbers(prompt: str, variant: Variant) -> Iterator[str]:
    """Yield a warning for a number of things without a known word."""
    for match in _COUNTED.finditer(prompt):
        number, things = _number(match[1]), match[2].lower()
        known = "" if number in variant.words else _counted(things, variant)
        if known == _ANY_THING:
            yield f"{variant.name} paints things that are named, each by its noun: it knows no {number} {things}"
        elif known:
            yield f"{variant.name} paints one {known}: it knows no {number}"


def too_many(text: str, variant: Variant) -> Iterator[str]:
    """Yield a warning for more new things than the model practised.

    "the dog" is there already, and "among trees" is a background. A model that knows "four" paints four.
    """
    total, count = 0, 1
    for word in WORD.findall(text.lower().replace("among trees", "")):
        if word == "the":
            count = 0
        elif word in ("a", "an", "one", "some", "and", "with"):
            count = 1
        elif word in _VALUES:
            count = _VALUES[word]
        elif any(names_thing(form, variant) for form in (word, *singulars(word))):
            total, count = total + count, 1
    most = "four" if "four" in variant.words else "three"
    if variant.nouns and total > _VALUES[most]:
        yield f"{variant.name} paints at most {most} things; name fewer"


def _number(text: str) -> str:
    """Return the word that counts: "pair" of "a pair of"."""
    word = re.sub(r"^an? | of$", "", text.lower())
    return _WORD_OF.get(word, word)


def _counted(things: str, variant: Variant) -> str:
    """Return the noun or shape of a plural, or "".

    That of objects, which may be anything, is `object`.
    """
    # Its plural may be a word of its own: nano has the stars of the night.
    forms = (form for form in singulars(things) if names_thing(form, variant))
    known = next(forms, None) or known_form(things, variant) or ""
    return known if known == _ANY_THING or names_thing(known, variant) else ""
