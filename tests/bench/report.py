"""Format the measurements as the tables of engine/SPEED.md."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.bench.scenarios import (
    FIRST,
    FIRST_TO_WARM,
    FP8_TO_BF16,
    FP8_TO_EAGER,
    NONE,
    STATIC_TO_BF16,
    TARGETS,
    Scenario,
)

if TYPE_CHECKING:  # the tables need no torch
    from tests.bench.turns import Laps

AGAINST = ("floor", "eager", "compiled")
JOB_TO_ALONE = 1.10
"""A job during tuning, of the same job alone."""


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
        """Return the line as a row of the table of targets."""
        ms, ratios = {**self.ms, "floor": self.floor}, self.ratios
        times = ", ".join(_number(ms.get(name), 0) for name in ("ours", *AGAINST))
        found = ", ".join(_number(ratios.get(name), 2) for name in AGAINST)
        targets = (_number(self.wanted.get(name), 2) for name in AGAINST)
        return _row(self.name, *targets, f"{times}: {found}{self._verdict()}")

    def _verdict(self) -> str:
        held = [(self.ratios[name], target) for name, target in self.wanted.items() if name in self.ratios]
        met = all(ratio <= target for ratio, target in held)
        return "" if not held else ": met" if met else ": missed"


def timing_line(model: str, scenario: Scenario, laps: "Mapping[str, Laps]", floor: float) -> Line:
    """Create the line of a scenario.

    floor: minimum time in milliseconds.
    """
    target = TARGETS.get(model, {}).get(scenario.name, NONE)
    wanted = {"floor": target.floor, "eager": target.eager, "compiled": target.compiled}
    asked = {name: value for name, value in wanted.items() if value is not None}
    return Line(scenario.name, floor, {name: lap.median for name, lap in laps.items()}, asked)


def markdown(found: Mapping[str, Any], lines: Sequence[Line]) -> str:
    """Return the tables and the machine they were measured on."""
    sections = found["sections"]
    models, limits = sections.get("models", {}), sections.get("ceilings", {})
    head = f"{models.get('machine', 'No GPU answered')}, klein {found['model']} with random weights. "
    head += f"Took {found.get('seconds', 0):.0f} s."
    if "TFLOP/s" in limits:
        head += f" Measured limits: {limits['TFLOP/s']:.0f} TFLOP/s, {limits['GB/s']:,.0f} GB/s."
    tables = (
        [
            *_head(
                f"klein {found['model']}",
                *(f": {name}" for name in AGAINST),
                "measured (ours, floor, eager, compiled, ms)",
            ),
            *(line.markdown() for line in lines),
        ],
        list(_single_values(sections, lines)),
        list(_jobs(sections)),
        list(_limits(sections)),
        list(_bands(sections.get("bands", {}))),
    )
    return "\n\n".join([head, *("\n".join(table) for table in tables if len(table) > 2)])


def _single_values(sections: Mapping[str, Any], lines: Sequence[Line]) -> Iterator[str]:
    """Yield the rows of what is measured against one number."""
    yield from _head("", "measured", "target")
    fp8 = sections.get("fp8", {})
    ms = {name: value for name, value in fp8.get("ms", {}).items() if value}
    for name, goal in (("ours, rows", FP8_TO_BF16), ("ours, static", STATIC_TO_BF16)):
        if {name, "ours, bf16", "eager, bf16"} <= ms.keys():
            of_bf16, of_eager = ms[name] / ms["ours, bf16"], ms[name] / ms["eager, bf16"]
            met = of_bf16 <= goal and of_eager <= FP8_TO_EAGER
            yield _row(f"fp8, {name}: of ours in bf16; of diffusers eager in bf16",
                       f"{ms[name]:.0f} ms: {of_bf16:.2f}; {of_eager:.2f}",
                       f"{goal:.2f}; {FP8_TO_EAGER:.2f}: {'met' if met else 'missed'}")  # fmt: skip
    for name in ("eager, fp8", "compiled, fp8"):
        if {name, "ours, rows"} <= ms.keys():
            ratio = ms["ours, rows"] / ms[name]
            yield _row(f"fp8 of both, scales by row: ours : diffusers {name.partition(',')[0]} with our fp8 layer",
                       f"{ms['ours, rows']:.0f} : {ms[name]:.0f} ms: {ratio:.2f}", "")  # fmt: skip
    for section, name in (
        ("tuning from disk", "tuning, kernels on disk"),
        ("tuning again", "tuning, traces on disk too"),
    ):
        if "s" in (row := sections.get(section, {})):
            parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in row["parts, s"].items() if seconds >= 0.05)
            yield _row(name, f"{row['s']:.1f} s ({parts})", f"7 s: {_met(row['s'], 7)}")
    warm = sections.get("tuning from disk", {})
    if "s" in warm:
        first = warm["images after ready, ms"][0]
        warm_median = next((line.ms["ours"] for line in lines if line.name == FIRST.name), None)
        if warm_median:
            ratio = first / warm_median
            yield _row("first image after tuning, of the warm median", f"{first:.0f} ms: {ratio:.2f}",
                       f"{FIRST_TO_WARM}: {_met(ratio, FIRST_TO_WARM)}")  # fmt: skip
    cold = {name: row["s"] for name, row in sections.items() if name.startswith("compile ours") and "s" in row}
    if cold:
        listed = ", ".join(f"{name.removeprefix('compile ours ')} {seconds:.0f}" for name, seconds in cold.items())
        yield _row("compiling with an empty disk cache, all at once, each in its own process", f"{listed} s", "")


def _jobs(sections: Mapping[str, Any]) -> Iterator[str]:
    """Yield the rows of jobs that arrive during tuning."""
    yield from _head("job during the compiling of", "jobs", "median, ms", "longest, ms", "alone, ms",
                     "longest alone, ms", "ratio", "longest wait before it, ms", "target")  # fmt: skip
    for name, row in sections.items():
        if name.startswith("jobs during ") and row.get("during, ms"):
            during, alone = row["during, ms"], row["alone, ms"]
            cells = (len(during), row["median during"], max(during), row["median alone"], max(alone))
            yield _row(name.removeprefix("jobs during "), *map(str, cells), f"{row['ratio']:.2f}",
                       f"{row['longest piece, ms']:.0f}",
                       f"{JOB_TO_ALONE:.2f}: {_met(row['ratio'], JOB_TO_ALONE)}")  # fmt: skip


def _limits(sections: Mapping[str, Any]) -> Iterator[str]:
    """Yield the memory used under each limit."""
    columns = ("card, GB", "of the limit", "allocated at the peak, GB", "reserved at the peak, GB", "load, s",
               "image, s", "left after release, MB")  # fmt: skip
    yield from _head("limit", *columns, "plan", "same image as resident")
    rows = {name.removeprefix("memory "): row for name, row in sections.items() if name.startswith("memory ")}
    whole = rows.get("all", {}).get("hash")
    for name, row in rows.items():
        if "hash" not in row:
            yield _row(name, *("—" for _ in columns), str(row.get("error", row)), "—")
            continue
        same = "—" if "fp8" in name or not whole else "yes" if row["hash"] == whole else "no"
        yield _row(name, *(str(row.get(column, "—")) for column in columns), str(row.get("plan", "—")), same)


def _bands(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the rows of decoding in bands."""
    yield from _head("decode", "ms", "allocated beside, GB", "same bits as the whole")
    for name, row in found.items():
        if isinstance(row, Mapping):
            yield _row(name, str(row["ms"]), str(row["GB"]), str(row.get("same bits", "—")))


def _met(value: float, target: float) -> str:
    return "met" if value <= target else "missed"


def _number(value: float | None, digits: int) -> str:
    return "—" if value is None else f"{value:.{digits}f}"


def _head(*cells: str) -> tuple[str, str]:
    return _row(*cells), f"|{'---|' * len(cells)}"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
