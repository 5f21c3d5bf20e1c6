"""KeyMap: where each tensor of a file belongs in a module."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ParamSlice:
    """Our parameter's name and the row range that a tensor fills.

    swap: its two halves change places while it is read.
    """

    name: str
    part: int = 0
    parts: int = 1
    swap: bool = False


KeyMap = dict[str, ParamSlice]
"""Name in the file -> its place."""


def identity_map(names: Iterable[str]) -> KeyMap:
    """Map every name to itself: BFL's own layout."""
    return {name: ParamSlice(name) for name in names}
