"""Warn of what a small model cannot do in a prompt."""

import re
from collections.abc import Iterator

from engine.families.klein.counting import too_many
from engine.families.klein.spelling import suggestion
from engine.families.klein.synonyms import GROUNDS, RELATED, VERBS
from engine.families.klein.variants import Variant
from engine.families.klein.vocabulary import alternatives, names_thing, singulars

NEAREST = 3
"""Number of known nouns that are suggested for an unknown one."""
MOST_NAMED = 4
"""Number of unknown words that a warning names."""
LONGEST_NAMED = 32
"""Letters: of a longer unknown word a warning names the beginning."""

_BIG = re.compile(r"(?<!\bthe )\b(?:big|large|huge)\b", re.IGNORECASE)
_NESTED = re.compile(
    r"\b(?:inside|within|around|in it)\b|\bin (?:the middle of )?(?:an? |the )?(?:big|large|huge)\b", re.IGNORECASE
)
"""What stands for one thing inside another, which is always big."""
_REPLACES = re.compile(r"\s*(?:please )?(?:replace|swap|turn|change)\b", re.IGNORECASE)
_PRONOUN = re.compile(rf"\s*(?:please )?(?:{'|'.join(VERBS)}|color)\s+it\b[^.,;!?]*", re.IGNORECASE)
_GROUND = re.compile(rf"\b(?:background|{'|'.join(sorted(GROUNDS))})\b", re.IGNORECASE)
_ADDS = re.compile(r"\s*(?:please )?(?:add|(?:put|place|draw) (?:an?|one|some|two|three|four))\b", re.IGNORECASE)
_PLACE = re.compile(
    r"\b(?:left|right|top|bottom|middle|center|corners?|above|below|beside|between|under|underneath|over|near|next"
    r"|inside|within|around|in front|in place|(?:on|in|at) (?:an?|the))\b",
    re.IGNORECASE,
)
"""What says where a thing is, or which thing it replaces."""


def warnings_of(text: str, variant: Variant, *, new: bool) -> Iterator[str]:
    """Yield the warnings of a prompt in known words.

    new: whether no reference is edited.
    """
    yield from _own_colours(text, variant)
    yield from too_many(text, variant)
    yield from _big_beside_another(text, variant)
    yield from _several_changes(text, variant)
    yield from _pronoun(text, variant)
    if not new:
        yield from _no_place(text)


def foreign(variant: Variant) -> str:
    """Return the warning of a prompt in another language."""
    return f"{variant.name} reads English: translate the prompt, or klein-mcp pull klein-4b"


def unknown(words: list[str], variant: Variant) -> Iterator[str]:
    """Yield a warning that names unknown words and related known words.

    It also names a remedy.
    """
    if not words:
        return
    named = ", ".join(_named(word, variant) for word in words[:MOST_NAMED])
    left = len(words) - MOST_NAMED
    more = f" and {left} more word{'s' if left > 1 else ''}" if left > 0 else ""
    yield f"{variant.name} does not know {named}{more}; klein-mcp pull klein-4b"


def _named(word: str, variant: Variant) -> str:
    """Return a word with what may be meant by it."""
    if near := _nearest(word, variant):
        return f"{word} (nearest: {', '.join(near)})"
    if meant := suggestion(word, variant):
        return f"{word} (did you mean {meant}?)"
    return word if len(word) <= LONGEST_NAMED else f"{word[:LONGEST_NAMED]}…"


def _nearest(word: str, variant: Variant) -> list[str]:
    singular = next((form for form in (word, *singulars(word)) if form in RELATED), word)
    return [noun for noun in RELATED.get(singular, ()) if names_thing(noun, variant)][:NEAREST]


def _pronoun(text: str, variant: Variant) -> Iterator[str]:
    """Yield a warning for an edit of "it".

    "put it in the snow" is about the background.
    """
    match = _PRONOUN.match(text)
    if match and variant.nouns and not _GROUND.search(text):
        thing = "circle" if "circle" in variant.shapes else next(iter(variant.nouns))
        example = re.sub(r"\bit\b", f"the {thing}", match[0].strip(), count=1)
        yield f'name the thing instead of it: "{example}"'


def _no_place(text: str) -> Iterator[str]:
    """Yield a warning for a thing to add without a place."""
    if _ADDS.match(text) and not _PLACE.search(text):
        yield 'say where, such as "on the left" or "at the top"'


def _big_beside_another(text: str, variant: Variant) -> Iterator[str]:
    """Yield a warning for a big thing beside another.

    A small model practised big things alone, and makes a smear of both. "the big dog" is one that is there already.
    """
    if not variant.nouns:
        return
    things = re.findall(rf"\b(?:{alternatives((*variant.nouns, *variant.shapes))})\b", text, re.IGNORECASE)
    nested = "inside" in variant.words and _NESTED.search(text)
    if len({thing.lower() for thing in things}) > 1 and _BIG.search(text) and not (nested or _REPLACES.match(text)):
        yield f"{variant.name} paints a big thing well only when it is alone"


def _several_changes(text: str, variant: Variant) -> Iterator[str]:
    """Yield a warning for an instruction that asks for two changes."""
    verbs = "|".join(VERBS)
    if re.match(rf"\s*(?:please )?(?:{verbs})\b.*\b(?:and|then) (?:{verbs})\b", text, re.IGNORECASE | re.DOTALL):
        yield f"{variant.name} makes one change at a time: give a list of prompts"


def _own_colours(text: str, variant: Variant) -> Iterator[str]:
    """Yield a warning for each colour requested for a fixed-colour thing."""
    if not variant.nouns:
        return
    colours, nouns = alternatives(variant.colours), alternatives(variant.nouns)
    before = re.compile(rf"\b(?P<colour>{colours}) (?P<noun>{nouns})\b", re.IGNORECASE)
    behind = re.compile(
        rf"\b(?:make|turn|paint|color|change) (?:the color of )?the (?P<noun>{nouns}) (?:to )?(?P<colour>{colours})\b",
        re.IGNORECASE,
    )
    for match in (*before.finditer(text), *behind.finditer(text)):
        noun, colour = match["noun"].lower(), match["colour"].lower()
        if colour not in variant.nouns[noun]:
            # An edit is asked for in the words as they are, and a colour that was never practised blurs the thing.
            then = f"{colour} is ignored" if match.re is before else f"making it {colour} may spoil it, or do nothing"
            yield f"{variant.name} paints every {noun} in its own colours; {then}"
