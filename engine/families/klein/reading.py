"""Rewrite a prompt for a small model, in the words it knows.

Sentences that only ask for something to stay as it is are left out.
A model that knows more words than could be listed gets every prompt unchanged.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from engine.families.klein.synonyms import (
    ALTERNATIVES,
    BOTH,
    COLOUR_NAMES,
    CONSTRAINTS,
    FILLERS,
    GROUNDS,
    NEGATIONS,
    NO_STEMS,
    NUMBERS,
    RELATED,
    SYNONYMS,
    VERBS,
)
from engine.families.klein.variants import Variant

_HEX = re.compile(r"#[0-9A-Fa-f]{3,8}\b ?")
_RELATIVE = re.compile(r"\b(?:that|which|who)(?: is| are|['’]s) ", re.IGNORECASE)
"""What joins a thing to its place or posture, as in "a cat that is sitting on grass"."""
_WORD = re.compile(r"(?<!\d)[^\W\d_]+(?:['’-][^\W\d_]+)*")
"""Not the letters behind a number, as in "4k"."""
_SENTENCE = re.compile(r"[^.!?;\n]+[.!?;\n]*")
_BEGINS = "|".join(re.escape(begin) for begin in CONSTRAINTS) + (
    r"|the (?:light|shadow)(?=\s+(?:and|or|of|in|from|is|should|must|stays?|remains?)\b|\s*[,.;!?]|\s*\Z)"
)
"""How a wish begins that something stays: "the light of the sun", not "the light blue circle"."""
_ASKS = "|".join(
    ("draw", "color", "give", "place", "set", *VERBS, *(word for word in SYNONYMS if SYNONYMS[word] in VERBS))
)
_NEXT = (
    rf"(?=(?:,\s*(?:and\s+|but\s+)?|\b(?:and|but|then)\s+)(?:then\s+|also\s+|just\s+|please\s+){{0,3}}(?:{_ASKS})"
    r"\s+(?:the|an?|it|them|image|another|some|two|three|four)\b)"
)
"""Where the next instruction begins: "keep the cat and add a star"."""
_NEGATIONS = "|".join(re.escape(begin) for begin in NEGATIONS)
_CLAUSE = re.compile(
    # Bounded, or a prompt of 4,000 commas takes a second.
    rf"(?:[,\s]|\b(?:and|but|then|please|also)\b){{0,8}}\b(?:(?:{_NEGATIONS})\b.*|(?:{_BEGINS})\b.*?(?:{_NEXT}|\Z))",
    re.IGNORECASE | re.DOTALL,
)
_GROUND = "|".join(("background", "backdrop", *sorted(GROUNDS), *sorted(COLOUR_NAMES)))
_ENDS = (
    rf"(?=(?!\s+in\s+the\s+background)\s+(?:on|in|at|against)\s+(?:an?\s+|the\s+)?(?:\w+\s+){{0,2}}(?:{_GROUND})\b"
    r"|\s+(?:and|but)\b|[,.;:!?]|\s*\Z)"
)
"""What does not belong to a thing that shall not be there: the background, and what else is named."""
_WITHOUT = re.compile(
    rf"(?:,\s*(?:and\s+|but\s+|with\s+)?|\A\s*)no\b[^,.;!?]*|\b(?:with|and|but|or)\s+no\b[^,.;!?]*?{_ENDS}"
    rf"|,?\s*\bwithout\s+(?:\w+ing\b.*|[^,.;!?]*?{_ENDS})",
    re.IGNORECASE | re.DOTALL,
)
"""What shall not be there: "a logo, no text, white background", "a circle without border on blue"."""
_PLUS = re.compile(r"\bplus (?=(?:an?|the|one|two|three|four)\b)", re.IGNORECASE)
_FROM = r"the [^,.;]+? (?:from|in|of) image \d"
_PLACED = r"(?:(?:on|to|at|in) the (?:left|right|top|bottom|middle|center)|above|below)"
_THREE = re.compile(rf"({_FROM}), ({_FROM}),? and ({_FROM})\b(?! {_PLACED})", re.IGNORECASE)
"""Three references in a list without places, of which a small model loses the first."""
_NUMBERS = "|".join(sorted(NUMBERS))
_GROUP = r"(?:an? )?(?:pair|couple|dozen|group|bunch|flock|herd|lots)(?: of)?"
_NUMBER = rf"(?<!image )\b(?:{_NUMBERS}|{_GROUP}|\d{{1,4}})"
_COUNTED = re.compile(rf"({_NUMBER})\s+(?:(?!(?:{_NUMBERS})\b)[^\W\d_]+\s+){{0,2}}?([^\W\d_]+s)\b(?!:)", re.IGNORECASE)
"""A number, and what it counts. "three objects: a cat, a dog and a car" names each."""
_AMOUNT = re.compile(rf"(?<!image )\b({_GROUP}|\d{{1,4}})\s+(?=(?:[^\W\d_]+\s+){{0,3}}?([^\W\d_]+s)\b)", re.IGNORECASE)
"""A number that is no single word."""
_ANY_THING = "object"
"""What small models know as any thing, of those that are in the image already."""
_BIG = re.compile(r"(?<!\bthe )\b(?:big|large|huge)\b", re.IGNORECASE)
_NESTED = re.compile(r"\b(?:inside|within|around)\b|\bin (?:an? |the )?(?:big|large|huge)\b", re.IGNORECASE)
"""What stands for one thing inside another, which is always big."""
_WORD_OF = {"2": "two", "3": "three", "4": "four", "couple": "two"}
"""Numbers that a small model may know as a word. nano's sentences count to four."""
_REPLACES = re.compile(r"\s*(?:please )?(?:replace|swap|turn|change)\b", re.IGNORECASE)
NEAREST = 3
"""Number of known nouns that are suggested for an unknown one."""
MOST_NAMED = 4
"""Number of unknown words that a warning names."""

LONGEST_NAMED = 32
"""Letters: of a longer unknown word a warning names the beginning."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A prompt as the model gets it.

    text: the rewritten prompt. warnings: the parts of the prompt that the model cannot do.
    """

    text: str
    warnings: tuple[str, ...] = ()


def read_prompt(prompt: str, variant: Variant) -> Reading:
    """Return the prompt in the variant's words, unchanged if it lists none."""
    if not variant.words:
        return Reading(prompt)
    # A hex code is not a word; its letters must not be read as some.
    plain = _without_amounts(_PLUS.sub("and ", _RELATIVE.sub("", _HEX.sub("", prompt))), variant)
    sentences = [_Sentence.of(text, variant) for text in _sentences(plain)]
    kept = [sentence for sentence in sentences if sentence.is_understood] or sentences[:1]
    text = " ".join(sentence.text for sentence in kept)
    if len(sentences) > len(kept) or len(kept) == 1:
        text = text.rstrip(" .!;")
    warnings = (
        *_unknown(" ".join(sentence.text for sentence in sentences), variant),
        *_own_colours(text, variant),
        *_counts(prompt, variant),
        *_big_beside_another(text, variant),
        *_several_changes(text, variant),
    )
    text = _THREE.sub(r"\1 on the left, \2 in the middle and \3 on the right", _without_distractions(text, variant))
    return Reading(prompt if _plain(text) == _plain(prompt) else text, warnings)


def unknown_words(text: str, variant: Variant) -> list[str]:
    """Return the words the variant does not know, in order, without repeats.

    The list is empty if the variant lists no words.
    """
    if not variant.words:
        return []
    words = (word.lower() for word in _WORD.findall(text))
    emoji = (symbol for symbol in text if unicodedata.category(symbol) == "So")
    return list(dict.fromkeys(word for word in (*words, *emoji) if not _is_known(word, variant)))


def _plain(text: str) -> str:
    return " ".join(text.split()).rstrip(".")


def _is_known(word: str, variant: Variant) -> bool:
    return all(part in variant.words for part in re.split("['’-]", word))


def _sentences(prompt: str) -> Iterator[str]:
    """Yield the sentences without clauses about what stays as it is.

    Yields all of them if nothing would be left.
    """
    left = False
    for sentence in _SENTENCE.findall(prompt):
        sentence = " ".join(sentence.split())
        text = _CLAUSE.sub("", _WITHOUT.sub("", sentence))
        if text != sentence:
            text = re.sub(r"^(?:[\s,;]|\b(?:and|but|then|just)\b)+", "", text)
            text = re.sub(r"(?:[\s,.;!?]|\b(?:and|but|with|in|on))+$", "", text) + "."
        if _WORD.search(text):
            left = True
            yield " ".join(text.split())
    if not left:
        yield " ".join(prompt.split())


@dataclass(frozen=True, slots=True)
class _Sentence:
    """A sentence in known words as far as possible.

    known, unknown: how many of its meaningful words are known and unknown.
    """

    text: str
    known: int
    unknown: int

    @property
    def is_understood(self) -> bool:
        return self.known > 0 and self.known >= self.unknown

    @classmethod
    def of(cls, text: str, variant: Variant) -> "_Sentence":
        pieces, end, known, unknown = [], 0, 0, 0
        determined = False  # whether the previous word is an article or belongs to the same noun phrase
        counted = False  # whether a number stands before it
        words = list(_WORD.finditer(text))
        for i, match in enumerate(words):
            before = words[i - 1][0].lower() if i else ""
            behind = words[i + 1][0] if i + 1 < len(words) else ""
            as_thing = _names_thing(before, behind, variant)
            lower, word = match[0].lower(), _known_form(match[0], variant, as_thing=as_thing)
            pieces.append(text[end : match.start()])
            end = match.end()
            if lower in FILLERS | NUMBERS and not _is_known(lower, variant):
                continue
            if word is not None and word.lower() != lower and _is_plural(lower, word.lower(), variant):
                several = _plural(word.lower(), variant) if counted else ""
                word = several or (word if determined else f"a {word}")
            pieces.append(match[0] if word is None else word)
            unknown += word is None
            known += word is not None and _says_something(word, variant)
            determined = word is not None and word.lower() in (*_ARTICLES, *_SIZES, *variant.colours)
            counted = lower in NUMBERS or (counted and determined)
        plain = re.sub(r"\s+([,.!?;])", r"\1", " ".join("".join([*pieces, text[end:]]).split()))
        return cls(_without_adjectives(_with_articles(plain), variant), known, unknown)


def _names_thing(before: str, behind: str, variant: Variant) -> bool:
    """Return whether a word between these names a thing, no colour."""
    if before and before not in (*_ARTICLES, *_SIZES, *NUMBERS, *variant.colours):
        return False
    following = _known_form(behind, variant) if behind else None
    return (following or "").lower() not in (*variant.nouns, *variant.shapes, "background")


def _is_plural(word: str, known: str, variant: Variant) -> bool:
    """Return whether a plural was replaced by a singular."""
    return word.endswith("s") and not known.endswith("s") and (known in variant.nouns or known in variant.shapes)


def _plural(word: str, variant: Variant) -> str:
    """Return the plural if the model knows it, else ""."""
    forms = (f"{word}s", f"{word}es", f"{word[:-1]}ies")
    return next((form for form in forms if form in variant.words), "")


def _says_something(word: str, variant: Variant) -> bool:
    """Return whether the word names a thing, a colour or an action.

    "the", "of" and "image" can stand in any sentence.
    """
    return word.lower().removeprefix("a ") not in _ANYWHERE


_ARTICLES = ("a", "an", "the")
_NOT = ("no", "not", "neither", "nor", "without")
"""Words that turn a meaning round, and are no adjectives."""
_SIZES = ("small", "little", "tiny", "big", "large", "huge")
_ANYWHERE = {*_ARTICLES, "and", "image", "picture", "photo", "side", "one", "it", "me", "its", "is",
             "of", "in", "on", "at", "to", "from", "with", "by", "for"}  # fmt: skip


def _known_form(word: str, variant: Variant, *, as_thing: bool = True) -> str | None:
    """Return the word as the model knows it, else None.

    as_thing: what a word means that names a thing and a colour.
    """
    lower = word.lower()
    if _is_known(lower, variant):
        return word if word[0].isupper() and not word.isupper() else lower
    for form in (lower, *(stem for stem in _singulars(lower) if stem not in NO_STEMS)):
        verbal = form != lower and lower.endswith(("ing", "ed"))
        for candidate in (form, *ALTERNATIVES.get(form, ()), SYNONYMS.get(form, "")):
            if verbal and (candidate in variant.nouns or candidate in variant.shapes):
                continue  # a fishing boat is no fish
            if form in BOTH and as_thing == (candidate in variant.colours):
                continue
            if candidate in variant.words:
                return candidate.capitalize() if word[0].isupper() and not word.isupper() else candidate
    return None


def _singulars(word: str) -> Iterator[str]:
    for ending, stem in (("ies", "y"), ("ves", "f"), ("es", ""), ("s", ""), ("ing", ""), ("ing", "e"), ("ed", "")):
        if word.endswith(ending) and len(word) > len(ending) + 2:
            yield word.removesuffix(ending) + stem


def _with_articles(text: str) -> str:
    """Correct "a" and "an" to match the words that follow them."""
    text = re.sub(r"\b([Aa])n (?=[^aeiouAEIOU\s])", r"\1 ", text)
    return re.sub(r"\b([Aa]) (?=[aeioAEIO]|u(?!ni))", r"\1n ", text)


def _without_adjectives(text: str, variant: Variant) -> str:
    """Remove adjectives that the model cannot use.

    These are unknown words before a known thing, and a colour before a thing that has its own.
    """
    things = variant.nouns.keys() | variant.shapes | variant.colours
    while True:
        words = list(_WORD.finditer(text))
        for word, following in pairwise(words):
            between = text[word.end() : following.start()]
            if between.strip(" ,") or following[0].lower() not in things:
                continue
            lower = word[0].lower()
            if lower not in (*RELATED, *_NOT) and not _is_known(lower, variant):
                text = _with_articles(text[: word.start()] + text[following.start() :])
                break
        else:
            return text


def _without_distractions(text: str, variant: Variant) -> str:
    """Remove what a warning has named and would only distract.

    These are clauses without a known word, unknown postures, and colours of things and grounds that have their own.
    """
    clauses = text.split(",")
    understood = [
        clause
        for clause in clauses
        if any(_is_known(word.lower(), variant) and _says_something(word, variant) for word in _WORD.findall(clause))
    ]
    text = ",".join(understood or clauses).strip()

    def posture(match: re.Match[str]) -> str:
        known = _is_known(match[1].lower(), variant) or match[1].lower() in RELATED
        return match[0] if known else ""

    text = re.sub(r"\b(\w+ing) (?=(?:on|in|at|under|beside|near|above|below|with|next)\b)", posture, text)
    if not variant.nouns:
        return text
    colours, nouns = _alternatives(variant.colours), _alternatives(variant.nouns)

    def own(match: re.Match[str]) -> str:
        return match[0] if match[1].lower() in variant.nouns[match[2].lower()] else match[2]

    text = re.sub(rf"\b({colours}) ({nouns})\b", own, text, flags=re.IGNORECASE)
    text = re.sub(rf"\b(?:the |an? )?(?:{colours}) ({'|'.join(GROUNDS)})\b", r"the \1", text, flags=re.IGNORECASE)
    return _with_articles(text)


def _alternatives(words: Iterable[str]) -> str:
    return "|".join(map(re.escape, sorted(words)))


def _unknown(text: str, variant: Variant) -> Iterator[str]:
    """Yield a warning that names unknown words and related known words.

    It also names a remedy.
    """
    words = unknown_words(text, variant)
    if not words:
        return
    named = [
        f"{word} (nearest: {', '.join(near)})" if (near := _nearest(word, variant)) else _shorten(word)
        for word in words[:MOST_NAMED]
    ]
    more = f" and {len(words) - MOST_NAMED} more words" if len(words) > MOST_NAMED else ""
    yield f"{variant.name} does not know {', '.join(named)}{more}; klein-mcp pull klein-4b"


def _shorten(word: str) -> str:
    """Return a word as a warning names it."""
    return word if len(word) <= LONGEST_NAMED else f"{word[:LONGEST_NAMED]}…"


def _nearest(word: str, variant: Variant) -> list[str]:
    singular = next((form for form in (word, *_singulars(word)) if form in RELATED), word)
    return [noun for noun in RELATED.get(singular, ()) if noun in variant.nouns or noun in variant.shapes][:NEAREST]


def _counted(things: str, variant: Variant) -> str:
    """Return the noun or shape of a plural, or "".

    That of objects, which may be anything, is `object`.
    """
    # Its plural may be a word of its own: nano has the stars of the night.
    forms = (form for form in _singulars(things) if form in variant.nouns or form in variant.shapes)
    known = next(forms, None) or _known_form(things, variant) or ""
    return known if known in (*variant.nouns, *variant.shapes, _ANY_THING) else ""


def _without_amounts(prompt: str, variant: Variant) -> str:
    """Remove numbers that are not single words, such as "a pair of".

    Those that the model knows as a word become that word.
    """

    def amount(match: re.Match[str]) -> str:
        number = _number(match[1])
        if number in variant.words:
            return match[0] if number in match[1].lower() else f"{number} "
        return "" if _counted(match[2].lower(), variant) else match[0]

    return _AMOUNT.sub(amount, prompt)


def _number(text: str) -> str:
    """Return the word that counts: "pair" of "a pair of"."""
    word = re.sub(r"^an? | of$", "", text.lower())
    return _WORD_OF.get(word, word)


def _counts(prompt: str, variant: Variant) -> Iterator[str]:
    """Yield a warning for a number of things without a known word."""
    for match in _COUNTED.finditer(prompt):
        number, things = _number(match[1]), match[2].lower()
        known = "" if number in variant.words else _counted(things, variant)
        if known == _ANY_THING:
            yield f"{variant.name} paints things that are named, each by its noun: it knows no {number} {things}"
        elif known:
            yield f"{variant.name} paints one {known}: it knows no {number}"


def _big_beside_another(text: str, variant: Variant) -> Iterator[str]:
    """Yield a warning for a big thing beside another.

    A small model practised big things alone, and makes a smear of both. "the big dog" is one that is there already.
    """
    if not variant.nouns:
        return
    things = re.findall(rf"\b(?:{_alternatives((*variant.nouns, *variant.shapes))})\b", text, re.IGNORECASE)
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
    colours, nouns = _alternatives(variant.colours), _alternatives(variant.nouns)
    before = re.compile(rf"\b(?P<colour>{colours}) (?P<noun>{nouns})\b", re.IGNORECASE)
    behind = re.compile(
        rf"\b(?:make|turn|paint|color|change) (?:the color of )?the (?P<noun>{nouns}) (?:to )?(?P<colour>{colours})\b",
        re.IGNORECASE,
    )
    for match in (*before.finditer(text), *behind.finditer(text)):
        noun, colour = match["noun"].lower(), match["colour"].lower()
        if colour not in variant.nouns[noun]:
            yield f"{variant.name} paints every {noun} in its own colours; {colour} is ignored"
