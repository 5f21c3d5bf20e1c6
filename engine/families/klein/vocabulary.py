"""Look up words among those a small model knows.

A word is known by itself, by its stem or by a synonym.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator

from engine.families.klein.synonyms import ALTERNATIVES, BOTH, ENGLISH, FILLERS, FOREIGN, NO_STEMS, RELATED, SYNONYMS
from engine.families.klein.variants import Variant

WORD = re.compile(r"(?<!\d)[^\W\d_]+(?:['’-][^\W\d_]+)*")
"""Not the letters behind a number, as in "4k"."""
ARTICLES = ("a", "an", "the")
SIZES = ("small", "little", "tiny", "big", "large", "huge")


def unknown_words(text: str, variant: Variant) -> list[str]:
    """Return the words the variant does not know, in order, without repeats.

    The list is empty if the variant lists no words.
    """
    if not variant.words:
        return []
    words = (word.lower() for word in WORD.findall(text))
    emoji = (symbol for symbol in text if unicodedata.category(symbol) == "So")
    return list(dict.fromkeys(word for word in (*words, *emoji) if not is_known(word, variant)))


def is_known(word: str, variant: Variant) -> bool:
    """Return whether the model knows a word, or all parts of one."""
    return all(part in variant.words for part in re.split("['’-]", word))


def known_form(word: str, variant: Variant, *, as_thing: bool = True) -> str | None:
    """Return the word as the model knows it, else None.

    as_thing: what a word means that names a thing and a colour.
    """
    lower = word.lower()
    if is_known(lower, variant):
        return word if word[0].isupper() and not word.isupper() else lower
    for form in (lower, *(stem for stem in singulars(lower) if stem not in NO_STEMS)):
        verbal = form != lower and lower.endswith(("ing", "ed"))
        for candidate in (form, *ALTERNATIVES.get(form, ()), SYNONYMS.get(form, "")):
            if verbal and names_thing(candidate, variant):
                continue  # a fishing boat is no fish
            if form in BOTH and as_thing == (candidate in variant.colours):
                continue
            if candidate in variant.words:
                return candidate.capitalize() if word[0].isupper() and not word.isupper() else candidate
    return None


def names_thing(word: str, variant: Variant) -> bool:
    """Return whether a word is one of the model's nouns or shapes."""
    return word in variant.nouns or word in variant.shapes


def singulars(word: str) -> Iterator[str]:
    """Yield the stems that a plural or a verb's form may have."""
    for ending, stem in (("ies", "y"), ("ves", "f"), ("es", ""), ("s", ""), ("ing", ""), ("ing", "e"), ("ed", "")):
        if word.endswith(ending) and len(word) > len(ending) + 2:
            yield word.removesuffix(ending) + stem


def plural(word: str, variant: Variant) -> str:
    """Return the plural if the model knows it, else ""."""
    forms = (f"{word}s", f"{word}es", f"{word[:-1]}ies")
    return next((form for form in forms if form in variant.words), "")


def alternatives(words: Iterable[str]) -> str:
    """Return a pattern that matches each of the words."""
    return "|".join(map(re.escape, sorted(words)))


def is_foreign(text: str, variant: Variant) -> bool:
    """Return whether a prompt is written in another language than English.

    Most of its words are unknown, and it has another script or words such as "und".
    """
    words = [word.lower() for word in WORD.findall(text)]
    meant = {*FILLERS, *RELATED}
    unknown = [word for word in words if word not in meant and known_form(word, variant) is None]
    if len(unknown) * 2 <= len(words):
        return False
    letters = [letter for letter in text if letter.isalpha()]
    latin = sum(unicodedata.name(letter, "").startswith("LATIN") for letter in letters)
    return latin * 2 < len(letters) or (not ENGLISH.intersection(words) and not FOREIGN.isdisjoint(words))
