"""Two vocabularies of the embedded model.

PLAIN has the words of the first nano, LARGER those of its larger world: 208 nouns, numbers, more scenes.
"""

from dataclasses import replace

import pytest

from engine.families.klein.variants import VARIANTS
from engine.nano import words

_PLAIN_SCENES = {
    "grass",
    "meadow",
    "field",
    "desert",
    "sand",
    "ocean",
    "sea",
    "night",
    "stars",
    "snow",
    "sunset",
    "sky",
}
_LATER = {
    "two",
    "three",
    "four",
    "inside",
    "forest",
    "woods",
    "trees",
    "beach",
    "shore",
    "room",
    "floor",
    "space",
    "city",
}
LARGER = replace(
    VARIANTS["nano"],
    words=words.known(),
    nouns={**dict.fromkeys(words.NOUNS, ()), "house": ("white", "orange"), "snowman": ("white", "gray")},
    shapes=frozenset(words.SHAPES),
    colours=frozenset(words.COLOURS),
)
_NOUNS = tuple(words.NOUNS)[:48]
PLAIN = replace(
    LARGER,
    words=(words.known(48) - _LATER - {words.plural(noun) for noun in _NOUNS}) | _PLAIN_SCENES | {*_NOUNS},
    nouns={noun: LARGER.nouns[noun] for noun in _NOUNS},
)
BOTH_WORLDS = pytest.mark.parametrize("variant", [PLAIN, LARGER], ids=["plain", "larger"])
