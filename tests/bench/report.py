"""Format the measurements as the tables of engine/SPEED.md."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.bench.scenarios import NONE, TARGETS, Scenario
from tests.bench.turns import Laps

AGAINST = ("floor", "eager", "compiled")


@dataclass(frozen=True, slots=True)
class Line:
    """Results of a scenario.

    Medians in milliseconds by side, the minimum time, and the target ratios by side.
    """

    name: str
    floor: float
    ms: Mapping[str, float]
    wanted: Mapping[str, float]

    @property
    def ratios(self) -> dict[str, float]:
        """Return the ratios of ours to each of the others."""
        others = {"floor": self.floor, **self.ms}
        return {name: self.ms["ours"] / others[name] for name in AGAINST if name in others}

    def markdown(self) -> str:
        """Return the line as a Markdown table row."""
        ms = {**self.ms, "floor": self.floor}
        held = [(self.ratios[name], target) for name, target in self.wanted.items() if name in self.ratios]
        return _row(
            self.name,
            *(_number(ms.get(name), 0) for name in ("ours", *AGAINST)),
            *(_number(self.ratios.get(name), 2) for name in AGAINST),
            *_verdict(held),
        )


def timing_line(model: str, scenario: Scenario, laps: Mapping[str, Laps], floor: float) -> Line:
    """Create the line of a scenario.

    floor: minimum time in milliseconds.
    """
    target = TARGETS.get(model, {}).get(scenario.name, NONE)
    wanted = {"floor": target.floor, "eager": target.eager, "compiled": target.compiled}
    asked = {name: value for name, value in wanted.items() if value is not None}
    return Line(scenario.name, floor, {name: lap.median for name, lap in laps.items()}, asked)


def with_compiled(lines: Sequence[Line], compiled: Mapping[str, Any]) -> list[Line]:
    """Add the times of compiled diffusers to the lines.

    Times of a separate run are scaled by our time in both runs.
    """
    found = []
    for line in lines:
        ratio = compiled.get(line.name, {}).get("ratio") if isinstance(compiled.get(line.name), Mapping) else None
        ms = {**line.ms, "compiled": line.ms["ours"] / ratio} if ratio else line.ms
        found.append(Line(line.name, line.floor, ms, line.wanted))
    return found


def markdown(found: Mapping[str, Any], lines: Sequence[Line]) -> str:
    """Return the tables and the machine they were measured on."""
    sections = found["sections"]
    compiled = sections.get("diffusers compiled", {})
    limits = sections.get("ceilings", {})
    head = f"{found['machine']}, klein {found['model']} with random weights. Took {found['seconds']:.0f} s."
    if "TFLOP/s" in limits:
        head += f" Measured limits: {limits['TFLOP/s']:.1f} TFLOP/s, {limits['GB/s']:.0f} GB/s."
    return "\n".join(
        (
            head,
            "",
            *_head("", "ours, ms", *AGAINST, *(f": {name}" for name in AGAINST), "target", ""),
            *(line.markdown() for line in with_compiled(lines, compiled)),
            "",
            *_limits(sections.get("memory within limits", {})),
        )
    )


def _limits(found: Mapping[str, Any]) -> Iterator[str]:
    """Return the memory used under each limit, one row each."""
    columns = ("card, GB", "allocated at the peak, GB", "reserved at the peak, GB", "load, s", "left after release, MB")
    rows = {name: row for name, row in found.items() if isinstance(row, Mapping)}
    if rows:
        yield from _head("limit", *columns, "image, s", "hash")
        for name, row in rows.items():
            cells = [str(row.get(column, "—")) for column in columns]
            yield _row(name, *cells, str(row.get("images, s", ["—"])[-1]), str(row.get("hash", row.get("error", "—"))))


def _number(value: float | None, digits: int) -> str:
    return "—" if value is None else f"{value:.{digits}f}"


def _verdict(held: list[tuple[float, float]]) -> tuple[str, str]:
    """Return the targets in column order and whether all are met.

    pairs: (ratio, target).
    """
    if not held:
        return "—", "—"
    met = all(ratio <= target for ratio, target in held)
    return "≤ " + ", ".join(f"{target:.2f}" for _, target in held), "met" if met else "missed"


def _head(*cells: str) -> tuple[str, str]:
    return _row(*cells), f"|{'---|' * len(cells)}"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
