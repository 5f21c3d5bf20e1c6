"""A record of the library, and the images that one call made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ALPHABET = "23456789abcdefghjkmnpqrstvwxyz"  # no 0/o, 1/i/l, u: a handle is read aloud and typed
HANDLE_LENGTH = 6


MEASURED = frozenset({"ms", "cache", "changed", "alpha", "read_as", "painted"})
"""Parts of a recipe that no file holds: they are of one run, or of the very pixels that the library keeps.

A JPEG or a smaller copy has others, so that "kept" would be untrue of it."""


@dataclass(frozen=True, slots=True)
class Record:
    """One image of the library.

    file: SHA-256 of the file's bytes, and its name. pixels: a hash of size and values, independent of the file.
    tool: what made it; source: the path or URL it was last opened from, if any.
    recipe: seed (text), model, fingerprint, steps, guidance, region and what else generating it again needs.
    """

    handle: str
    file: str
    pixels: str
    width: int
    height: int
    bytes: int
    created: float
    client: str
    tool: str
    source: str | None
    prompt: str | None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    parents: tuple[str, ...] = ()
    deleted: float | None = None

    @property
    def transparent(self) -> bool:
        """Return whether the image has alpha."""
        return bool(self.recipe.get("alpha"))

    @property
    def provenance(self) -> Mapping[str, Any] | None:
        """Return the provenance in its file, None for a foreign image."""
        if self.tool == "open":
            return self.recipe.get("made")
        return {name: value for name, value in self.recipe.items() if name not in MEASURED}


SHEET_SECONDS = 900.0
"""Images of one call lie at most this far apart: four of the slowest model on the slowest machine."""


def sheet_of(record: Record, others: Sequence[Record]) -> list[Record]:
    """Return those of `others` that the same call made."""
    seeds = {
        int(other.recipe["seed"]): other
        for other in others
        if (other.client, other.tool, other.prompt) == (record.client, record.tool, record.prompt)
        and (other.parents, other.width, other.height) == (record.parents, record.width, record.height)
        and str(other.recipe.get("seed", "")).isdecimal()
    }
    own = str(record.recipe.get("seed", ""))
    if not own.isdecimal():
        return [record]
    first = last = int(own)
    while first - 1 in seeds:
        first -= 1
    while last + 1 in seeds:
        last += 1
    return [seeds.get(seed, record) for seed in range(first, last + 1)]
