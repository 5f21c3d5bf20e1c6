"""Wordings and combinations that are held out from training."""

import json
import re
import zlib
from functools import lru_cache
from pathlib import Path

from engine.nano.training.scenes import Scene
from engine.nano.words import COLOURS, NOUNS, SHAPES, plural

# "stars" also describes the night.
_MASKED = {*NOUNS, *SHAPES, *COLOURS, *map(plural, (*NOUNS, *SHAPES))} - {"stars"}
_NAMES_IN_PROMPT = re.compile(rf"\b(?:{'|'.join(sorted(_MASKED, key=len, reverse=True))})\b")

HELD_OUT_ONE_IN = 12
OLD_LIST = Path(__file__).with_name("held_out_48.jsonl")
"""The questions of the first nano (48 nouns at 128 × 128): held out for good, so that both can be compared on them."""


def _one_in(text: str) -> bool:
    return zlib.crc32(text.encode()) % HELD_OUT_ONE_IN == 0


@lru_cache(maxsize=200_000)
def _sentence_held_out(sentence: str) -> bool:
    return _one_in(sentence)


def wording_held_out(prompt: str) -> bool:
    """Return whether this wording is held out from training.

    Each of its words occurs in other wordings.
    """
    sentence = _NAMES_IN_PROMPT.sub("*", prompt.lower().rstrip(".")).replace("an *", "a *")
    return _sentence_held_out(sentence)


def combination_held_out(target: Scene, references: tuple[Scene, ...]) -> bool:
    """Return whether this combination of wanted and given scenes is held out."""
    known = (target, references) in _old_combinations()
    return known or _one_in(repr([scene.pack() for scene in (target, *references)]))


@lru_cache(maxsize=1)
def _old_combinations() -> frozenset[tuple[Scene, tuple[Scene, ...]]]:
    lines = [json.loads(line) for line in OLD_LIST.read_text().splitlines()]
    return frozenset((Scene.unpack(line[4]), tuple(map(Scene.unpack, line[5:]))) for line in lines)
