"""A record of the library, and the images that one call made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ALPHABET = "23456789abcdefghjkmnpqrstvwxyz"  # no 0/o, 1/i/l, u: a handle is read aloud and typed
HANDLE_LENGTH = 6


MEASURED = frozenset({"ms", "cache", "changed", "alpha", "read_as", "painted", "sheet"})
"""Parts of a recipe that no file holds: they are of one run, or of the very pixels that the library keeps.

A JPEG or a smaller copy has others, so that "kept" would be untrue of it."""


OPENED = "opened"
"""Part of the recipe in the library's file of an image that was opened, not made here."""


def of_opened(recipe: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the recipe that the library's file of an opened image holds.

    Any file can claim to be made here; a recovery has to know which ones were.
    """
    return {**recipe, OPENED: True} if recipe else None


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
    def area(self) -> int:
        """Return the number of its pixels."""
        return self.width * self.height

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


def place_on_sheet(record: Record) -> tuple[int, int] | None:
    """Return the image's place in its call, and the call's count.

    None for an image whose recipe does not hold it.
    """
    match record.recipe:
        case {"sheet": [str(first), int(count)], "seed": str(seed)} if first.isdecimal() and seed.isdecimal():
            return int(seed) - int(first), count
    return None


def by_place(sheet: Sequence[Record]) -> dict[int, Record]:
    """Map the images of a sheet by their places.

    Deleted ones leave theirs empty.
    """
    return {place[0] if (place := place_on_sheet(each)) else index: each for index, each in enumerate(sheet)}


def _call(record: Record) -> tuple[object, ...]:
    """Return what the images of one call have in common."""
    made = record.client, record.tool, record.prompt, record.parents, record.width, record.height
    # The seeds of the next call with the same words may follow on these.
    return *made, record.recipe.get("model"), tuple(record.recipe.get("sheet", ()))


SHEET_SECONDS = 900.0
"""Images of one call lie at most this far apart: four of the slowest model on the slowest machine."""


def sheet_of(record: Record, others: Sequence[Record]) -> list[Record]:
    """Return those of `others` that the same call made, in order."""
    own = str(record.recipe.get("seed", ""))
    if not own.isdecimal():
        return [record]
    seeds = {
        int(other.recipe["seed"]): other
        for other in others
        if _call(other) == _call(record) and str(other.recipe.get("seed", "")).isdecimal()
    }
    if place_on_sheet(record) is not None:
        return [each for _, each in sorted({int(own): record, **seeds}.items())]
    # Made before recipes held the sheet, or read back from its file: neighbours in seed.
    first = last = int(own)
    while first - 1 in seeds:
        first -= 1
    while last + 1 in seeds:
        last += 1
    return [seeds.get(seed, record) for seed in range(first, last + 1)]
