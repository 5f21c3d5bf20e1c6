"""Alternating timings of two implementations.

On a shared machine only their ratio is meaningful.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

Do = Callable[[int], object]
"""Runs the implementation once. The number varies the input (a seed, a prompt) where that matters."""


@dataclass(frozen=True, slots=True)
class Row:
    """Median milliseconds of ours and theirs.

    target: the highest allowed ratio.
    """

    name: str
    ours: float
    theirs: float
    target: float | None = None

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs

    def markdown(self) -> str:
        """Return the row as a Markdown table row."""
        wanted = "—" if self.target is None else f"≤ {self.target:g} {'met' if self.ratio <= self.target else 'missed'}"
        return f"| {self.name} | {self.ours:.0f} | {self.theirs:.0f} | {self.ratio:.2f} | {wanted} |"


HEAD = "| | ours, ms | theirs, ms | ratio | target |\n|---|---|---|---|---|"


def compare(name: str, ours: Do, theirs: Do, *, target: float | None = None, rounds: int = 6) -> Row:
    """Time both sides in the order A, B, B, A after warm-ups.

    Other load then slows both sides equally.
    """
    ours(-1)
    theirs(-1)
    times: dict[Do, list[float]] = {ours: [], theirs: []}
    for i in range(rounds):
        for side in (ours, theirs, theirs, ours):
            start = time.perf_counter()
            side(2 * i + len(times[side]) % 2)
            times[side].append(1000 * (time.perf_counter() - start))
    return Row(name, statistics.median(times[ours]), statistics.median(times[theirs]), target)
