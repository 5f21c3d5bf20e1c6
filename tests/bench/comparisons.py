"""Two ways of doing the same thing, timed in turns: on a shared machine only their ratio means anything."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

Do = Callable[[int], object]
"""Does the thing once; the number makes it a new thing (a seed, a prompt) where that matters."""


@dataclass(frozen=True, slots=True)
class Row:
    """Milliseconds of ours and theirs, medians; target: the ratio not to be passed."""

    name: str
    ours: float
    theirs: float
    target: float | None = None

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs

    def markdown(self) -> str:
        """A line of the table."""
        wanted = "—" if self.target is None else f"≤ {self.target:g} {'met' if self.ratio <= self.target else 'missed'}"
        return f"| {self.name} | {self.ours:.0f} | {self.theirs:.0f} | {self.ratio:.2f} | {wanted} |"


HEAD = "| | ours, ms | theirs, ms | ratio | target |\n|---|---|---|---|---|"


def compare(name: str, ours: Do, theirs: Do, *, target: float | None = None, rounds: int = 6) -> Row:
    """A, B, B, A … after one warm-up each: what slows the machine down slows both sides."""
    ours(-1)
    theirs(-1)
    times: dict[Do, list[float]] = {ours: [], theirs: []}
    for i in range(rounds):
        for side in (ours, theirs, theirs, ours):
            start = time.perf_counter()
            side(2 * i + len(times[side]) % 2)
            times[side].append(1000 * (time.perf_counter() - start))
    return Row(name, statistics.median(times[ours]), statistics.median(times[theirs]), target)
