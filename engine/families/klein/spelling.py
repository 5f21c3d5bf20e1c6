"""Read misspelt words as the known words they are nearest to.

A word of English is never corrected, so that no fox becomes a box.
"""

import difflib
import re

from engine.families.klein.synonyms import (
    COLOUR_NAMES,
    FILLERS,
    FOREIGN,
    GROUNDS,
    LOOK_ALIKES,
    NUMBERS,
    OFTEN_MISSPELT,
    RELATED,
    SYNONYMS,
)
from engine.families.klein.variants import Variant
from engine.families.klein.vocabulary import WORD, known_form, singulars

SHORTEST = 4
"""Letters of the shortest word that is corrected."""
LONG = 7
"""Letters from which a word may have two mistakes, if the known word is longer still."""
LONGEST = 24
"""Letters of the longest word that is compared, since comparing takes time."""
ALIKE = 0.8
"""Similarity from which a known word is offered, as difflib measures it."""


def corrected(text: str, variant: Variant) -> str:
    """Return the text with its misspelt words corrected."""
    targets = _targets(variant)

    def correct(match: re.Match[str]) -> str:
        word = match[0].lower()
        if _is_english(word, variant):
            return match[0]
        known = correction(word, variant, targets)
        if not known and word.endswith("s") and (singular := correction(word[:-1], variant, targets)):
            known = f"{singular}s"
        return (known.capitalize() if match[0].istitle() else known) or match[0]

    return WORD.sub(correct, text)


def correction(word: str, variant: Variant, targets: frozenset[str]) -> str:
    """Return the known word that is misspelt here, or ""."""
    if not SHORTEST <= len(word) <= LONGEST or _is_english(word, variant):
        return ""
    twice = len(word) >= LONG and not word.endswith(("ing", "ed"))
    mistakes = {target: _mistakes(word, target) for target in targets if target[0] == word[0]}
    if len(word) == SHORTEST:
        # "bleu" and "aple", not "cape" for "cake"
        mistakes = {each: n for each, n in mistakes.items() if len(each) > len(word) or sorted(each) == sorted(word)}
    fewest = min(mistakes.values(), default=LONGEST)
    nearest = [target for target, count in mistakes.items() if count == fewest]
    is_near = fewest == 1 or (fewest == 2 and twice and len(nearest[0]) > LONG and nearest[0] not in SYNONYMS)
    return nearest[0] if is_near and len(nearest) == 1 else ""


def suggestion(word: str, variant: Variant) -> str:
    """Return the known thing or colour a word resembles, or ""."""
    if len(word) > LONGEST or _is_english(word, variant):
        return ""
    named = (*variant.nouns, *variant.shapes, *variant.colours, "background")
    return next(iter(difflib.get_close_matches(word, named, 1, ALIKE)), "")


def _targets(variant: Variant) -> frozenset[str]:
    """Return the words that a misspelt one may stand for."""
    known = {*variant.nouns, *variant.shapes, *variant.colours, *OFTEN_MISSPELT}
    synonyms = {word for word in SYNONYMS if len(word) > LONG}
    return frozenset(word for word in known | synonyms if len(word) >= SHORTEST and known_form(word, variant))


def _is_english(word: str, variant: Variant) -> bool:
    """Return whether a word is listed as one of English."""
    listed = LOOK_ALIKES | RELATED.keys() | FILLERS | NUMBERS | GROUNDS | COLOUR_NAMES | FOREIGN | SYNONYMS.keys()
    return not listed.isdisjoint((word, *singulars(word))) or known_form(word, variant) is not None


def _mistakes(word: str, target: str) -> int:
    """Count letters that are wrong, missing, added or swapped.

    A word that goes on behind the known one is another form of it: it counts as too many.
    """
    stem = target.removesuffix("e")
    if abs(len(word) - len(target)) > 2 or (len(word) > len(target) and word.startswith(stem)):
        return len(word)
    before, row = [], [*range(len(target) + 1)]
    for i, letter in enumerate(word):
        above, before, row = before, row, [i + 1]
        for j, wanted in enumerate(target):
            fewest = min(before[j] + (letter != wanted), before[j + 1] + 1, row[j] + 1)
            if i and j and letter == target[j - 1] and word[i - 1] == wanted:
                fewest = min(fewest, above[j - 1] + 1)
            row.append(fewest)
    return row[-1]
