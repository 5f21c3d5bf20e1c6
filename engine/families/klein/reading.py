"""Rewrite a prompt for a small model, in the words it knows.

Sentences that only ask for something to stay as it is are left out.
A model that knows more words than could be listed gets every prompt unchanged.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine.families.klein.counting import unknown_numbers, without_amounts
from engine.families.klein.reading_warnings import foreign, unknown, warnings_of
from engine.families.klein.spelling import corrected
from engine.families.klein.synonyms import (
    COLOUR_NAMES,
    CONSTRAINTS,
    FILLERS,
    GROUNDS,
    NEGATIONS,
    NUMBERS,
    RELATED,
    SYNONYMS,
    VERBS,
)
from engine.families.klein.variants import Variant
from engine.families.klein.vocabulary import (
    ARTICLES,
    SIZES,
    WORD,
    alternatives,
    is_foreign,
    is_known,
    known_form,
    names_thing,
    plural,
    singulars,
    unknown_words,
)

_HEX = re.compile(r"#[0-9A-Fa-f]{3,8}\b ?")
_RELATIVE = re.compile(r"\b(?:that|which|who)(?: is| are|['’]s) ", re.IGNORECASE)
"""What joins a thing to its place or posture, as in "a cat that is sitting on grass"."""
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
_ARRANGED = re.compile(r"image \d,[^,]*image \d,[^,]*image \d,? and\b|\b(?:row|corners|left to right)\b", re.IGNORECASE)
"""A list of four references, or one that says how they stand."""
_POLITE = re.compile(
    r"(\A\s*|[.!?]\s+)(?:(?:hi|hello|hey|please)\b,?\s+)*"
    r"(?:i(?: would|['’]d) (?:like|love)|i (?:want|need|wish)(?: for)?|(?:can|could|would|will) you|give me)\b"
    r"(?:,?\s+(?:please|kindly|you|to|have|see|get)\b)*,?\s+",
    re.IGNORECASE,
)
"""What a request may begin with: "I would like to see a cat", "could you please remove the cat"."""
_INSTRUCTS = re.compile(rf"\s*(?:please )?(?:color|{'|'.join(VERBS)})\b", re.IGNORECASE)
_INSTEAD = re.compile(r" instead(?: of [^.,;!?]+)?(?=[.,;!?]|\s*\Z)", re.IGNORECASE)
_SWAP = re.compile(
    r"\s*(?:(?:add|put|paint|draw|use) )?(?P<new>an? [^.,;]+?) instead of (?P<old>the [^.,;]+?)\s*[.!?]?\s*",
    re.IGNORECASE,
)
"""A thing that another shall become: "a dog instead of the cat"."""
MOST_ADJECTIVES = 6
"""Adjectives before a thing that are left out."""
_PLAIN_GROUNDS = ("white", "blue", "green", "yellow", "gray")
"""Backgrounds for a prompt that names none, the first that stands out from its things."""
_ADDS_ONE = re.compile(
    r"\s*(?:please\s+)?(?:add|put|place|draw|paint|insert)\s+(?:an?|one|another|some|two|three|four)\b[\w\s'-]*[.!]?\s*",
    re.IGNORECASE,
)
"""A prompt that asks for one more thing and nothing else."""
_SAYS_WHERE = re.compile(
    r"\b(?:left|right|top|bottom|middle|cent(?:er|re)|corner|above|below|over|under|underneath|beside|between|behind|inside"
    r"|around|near|next|front|on|in|at|to)\b",
    re.IGNORECASE,
)
"""Words of a place."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A prompt as the model gets it.

    text: the rewritten prompt. warnings: the parts of the prompt that the model cannot do.
    """

    text: str
    warnings: tuple[str, ...] = ()


def read_prompt(prompt: str, variant: Variant, *, new: bool = False, place: str = "") -> Reading:
    """Return the prompt in the variant's words, unchanged if it lists none.

    new: whether the image is painted from words alone, without a reference. place: where a change is kept.
    """
    if not variant.words:
        return Reading(prompt)
    prompt = _with_place(prompt, place)
    if is_foreign(prompt, variant):
        return Reading(prompt, (foreign(variant),))
    # A hex code is not a word; its letters must not be read as some.
    spelt = corrected(_POLITE.sub(r"\1", _HEX.sub("", prompt)), variant)
    asked = spelt if new else _as_edit(spelt, variant)
    if new or _INSTRUCTS.match(asked):
        asked = _INSTEAD.sub("", asked)
    plain = without_amounts(_PLUS.sub("and ", _RELATIVE.sub("", asked)), variant)
    sentences = [_Sentence.of(text, variant) for text in _sentences(plain)]
    kept = [sentence for sentence in sentences if sentence.is_understood] or sentences[:1]
    text = " ".join(sentence.text for sentence in kept)
    if len(sentences) > len(kept) or len(kept) == 1:
        text = text.rstrip(" .!?;")
    named = list(dict.fromkeys(word for sentence in sentences for word in sentence.unknown_words))
    warnings = (*unknown(named, variant), *unknown_numbers(spelt, variant), *warnings_of(text, variant, new=new))
    text = _without_distractions(text, variant)
    if not _ARRANGED.search(text):
        text = _THREE.sub(r"\1 on the left, \2 in the middle and \3 on the right", text)
    if new:
        text = _with_ground(text, variant)
    return Reading(prompt if _plain(text) == _plain(prompt) else text, warnings)


def _with_place(prompt: str, place: str) -> str:
    """Add the place to a prompt that only adds a thing.

    A model that sees the whole image would add it anywhere, also where the original is kept.
    """
    if not place or _SAYS_WHERE.search(prompt) or not _ADDS_ONE.fullmatch(prompt):
        return prompt
    return f"{prompt.rstrip(' .!')} {place}"


def _as_edit(prompt: str, variant: Variant) -> str:
    """Return "a dog instead of the cat" as an edit."""
    if not (match := _SWAP.fullmatch(prompt)):
        return prompt
    if ground := re.fullmatch(rf"an? ({alternatives(variant.colours)}) background", match["new"], re.IGNORECASE):
        return f"make the background {ground[1]}"
    return f"replace {match['old']} with {match['new']}"


def _with_ground(text: str, variant: Variant) -> str:
    """Add a plain background to things without one.

    Small models practised sentences with one, and paint a murky one without.
    """
    words = WORD.findall(text.lower().removeprefix("please "))
    things = [form for word in words for form in (word, *singulars(word)) if names_thing(form, variant)]
    edits = words[:1] and words[0] in VERBS and words[0] not in ("make", "paint")
    if not things or edits or "background" not in variant.words or _names_ground(text, variant):
        return text
    text = re.sub(
        r"\s+(?:on|in|at|against|with)\s+(?:an?|the)\s+(?:\w+\s+)?background\b", "", text, flags=re.IGNORECASE
    )
    text = re.sub(r"[\s,.;!]*\bplease\W*\Z", "", text, flags=re.IGNORECASE)
    taken = {*words, *(colour for thing in things for colour in variant.nouns.get(thing, ()))}
    ground = next((colour for colour in _PLAIN_GROUNDS if colour in variant.colours and colour not in taken), "")
    return f"{text.rstrip(' .,!;')} on a {ground} background" if ground else text


def _names_ground(text: str, variant: Variant) -> bool:
    """Return whether a text names a background: "in the snow", "on blue"."""
    on_colour = rf"(?:on|against|in front of) (?:plain )?(?:{alternatives(variant.colours)})\b(?! {_thing(variant)}\b)"
    plain = rf"(?:{alternatives(variant.colours)}) background"
    grounds = "|".join((plain, r"image \d", "under the stars", "among trees", *sorted(GROUNDS & variant.words)))
    return re.search(rf"\b(?:{on_colour}|(?:{grounds})\b)", text, re.IGNORECASE) is not None


def _plain(text: str) -> str:
    return " ".join(text.split()).rstrip(".")


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
        if WORD.search(text):
            left = True
            yield " ".join(text.split())
    if not left:
        yield " ".join(prompt.split())


@dataclass(frozen=True, slots=True)
class _Sentence:
    """A sentence in known words as far as possible.

    known, unknown: how many of its meaningful words are known and unknown.
    unknown_words: those to be named, with the adjectives that are left out.
    """

    text: str
    known: int
    unknown: int
    unknown_words: tuple[str, ...]

    @property
    def is_understood(self) -> bool:
        return self.known > 0 and self.known >= self.unknown

    @classmethod
    def of(cls, text: str, variant: Variant) -> "_Sentence":
        pieces, end, known, unknown = [], 0, 0, 0
        determined = False  # whether the previous word is an article or belongs to the same noun phrase
        counted = False  # whether a number stands before it
        uncounted = False  # whether a number was left out before it
        words = list(WORD.finditer(text))
        for i, match in enumerate(words):
            before = words[i - 1][0].lower() if i else ""
            behind = words[i + 1][0] if i + 1 < len(words) else ""
            as_thing = _stands_for_thing(before, behind, variant)
            lower, word = match[0].lower(), known_form(match[0], variant, as_thing=as_thing)
            pieces.append(text[end : match.start()])
            end = match.end()
            shade = lower in _SHADES and behind.lower() in variant.colours
            if (lower in FILLERS | NUMBERS or shade) and not is_known(lower, variant):
                # Of a plural that is known one is left: it was practised behind a known number alone.
                if lower in NUMBERS and not uncounted and _counts_known_plural(words[i + 1 :], variant):
                    uncounted = True
                    pieces.append("" if before in ARTICLES else "a")
                continue
            if uncounted and (one := _one(lower, variant)):
                word, uncounted = one, False
            elif word is not None and word.lower() != lower and _is_plural(lower, word.lower(), variant):
                several = plural(word.lower(), variant) if counted else ""
                word = several or (word if determined else f"a {word}")
            pieces.append(match[0] if word is None else word)
            unknown += word is None
            known += word is not None and _says_something(word)
            determined = word is not None and word.lower() in (*ARTICLES, *SIZES, *variant.colours)
            counted = lower in NUMBERS or (counted and determined)
        plain = re.sub(r"\s+([,.!?;])", r"\1", " ".join("".join([*pieces, text[end:]]).split()))
        named = tuple(unknown_words(plain, variant))
        return cls(_without_adjectives(_with_articles(plain), variant), known, unknown, named)


def _stands_for_thing(before: str, behind: str, variant: Variant) -> bool:
    """Return whether a word between these names a thing, no colour."""
    if before and before not in (*ARTICLES, *SIZES, *NUMBERS, *variant.colours):
        return False
    following = known_form(behind, variant) if behind else None
    return (following or "").lower() not in (*variant.nouns, *variant.shapes, "background")


def _counts_known_plural(words: Sequence[re.Match[str]], variant: Variant) -> bool:
    """Return whether what a number counts is a plural that is known."""
    for word in (match[0].lower() for match in words):
        if _one(word, variant):
            return True
        if word not in (*SIZES, *NUMBERS, *variant.colours) and known_form(word, variant) is not None:
            return False
    return False


def _one(word: str, variant: Variant) -> str:
    """Return the thing that a known plural has several of, or ""."""
    if not is_known(word, variant):
        return ""
    return next((form for form in singulars(word) if names_thing(form, variant)), "")


def _is_plural(word: str, known: str, variant: Variant) -> bool:
    """Return whether a plural was replaced by a singular."""
    return word.endswith("s") and not known.endswith("s") and names_thing(known, variant)


def _says_something(word: str) -> bool:
    """Return whether the word names a thing, a colour or an action.

    "the", "of" and "image" can stand in any sentence.
    """
    return word.lower().removeprefix("a ") not in _ANYWHERE


_SHADES = ("light", "deep")
"""Words that are left out before a colour alone, unlike those in FILLERS."""
_NOT = ("no", "not", "neither", "nor", "without")
"""Words that turn a meaning round, and are no adjectives."""
_ANYWHERE = {*ARTICLES, "and", "image", "picture", "photo", "side", "one", "it", "me", "its", "is",
             "of", "in", "on", "at", "to", "from", "with", "by", "for"}  # fmt: skip


def _with_articles(text: str) -> str:
    """Correct "a" and "an" to match the words that follow them."""
    text = re.sub(r"\b([Aa])n (?=[^aeiouAEIOU\s])", r"\1 ", text)
    return re.sub(r"\b([Aa]) (?=[aeioAEIO]|u(?!ni))", r"\1n ", text)


def _without_adjectives(text: str, variant: Variant) -> str:
    """Remove unknown words before a known thing.

    Between them may be its colour: "a striped red circle". The sofa of "make the sofa red" is no adjective.
    """
    thing, colours = _thing(variant), alternatives(variant.colours)
    adjective = re.compile(
        rf"\b({WORD.pattern})[ ,]+(?=(?:{thing})\b|(?:(?:{colours}) ){{1,3}}(?:background|{thing})\b)", re.IGNORECASE
    )

    def drop(match: re.Match[str]) -> str:
        lower = match[1].lower()
        return match[0] if lower in (*RELATED, *_NOT) or is_known(lower, variant) else ""

    for _ in range(MOST_ADJECTIVES):
        text = adjective.sub(drop, text)
    return _with_articles(text)


def _thing(variant: Variant) -> str:
    """Return a pattern of a thing or several of it."""
    return rf"(?:{alternatives((*variant.nouns, *variant.shapes))})(?:e?s)?"


def _without_distractions(text: str, variant: Variant) -> str:
    """Remove what a warning has named and would only distract.

    These are clauses without a known word, unknown postures, and colours of things and grounds that have their own.
    """
    clauses = text.split(",")
    understood = [
        clause
        for clause in clauses
        if any(is_known(word.lower(), variant) and _says_something(word) for word in WORD.findall(clause))
    ]
    text = ",".join(understood or clauses).strip()

    def posture(match: re.Match[str]) -> str:
        known = is_known(match[1].lower(), variant) or match[1].lower() in RELATED
        return match[0] if known else ""

    text = re.sub(r"\b(\w+ing) (?=(?:on|in|at|under|beside|near|above|below|with|next)\b)", posture, text)
    if not variant.nouns:
        return text
    colours, nouns = alternatives(variant.colours), alternatives(variant.nouns)

    def own(match: re.Match[str]) -> str:
        return match[0] if match[1].lower() in variant.nouns[match[2].lower()] else match[2]

    text = re.sub(rf"\b({colours}) ({nouns})\b", own, text, flags=re.IGNORECASE)
    text = re.sub(rf"\b(?:the |an? )?(?:{colours}) ({'|'.join(GROUNDS)})\b", r"the \1", text, flags=re.IGNORECASE)
    return _with_articles(text)
