"""What was measured, as the tables of engine/SPEED.md."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tests.bench import scenarios
from tests.bench.scenarios import FIRST, KV_FOUR, NONE, PLAIN_FOUR, TARGETS, Scenario
from tests.bench.turns import Laps

AGAINST = ("floor", "eager", "compiled")
SIDES = ("ours", "eager", "compiled")


@dataclass(frozen=True, slots=True)
class Line:
    """A scenario: medians in milliseconds by side, the floor, and the ratios wanted by what ours is held against."""

    name: str
    floor: float
    ms: Mapping[str, float]
    wanted: Mapping[str, float]

    @property
    def ratios(self) -> dict[str, float]:
        """Of ours to each of the others."""
        others = {"floor": self.floor, **self.ms}
        return {name: self.ms["ours"] / others[name] for name in AGAINST if name in others}

    def markdown(self) -> str:
        """A line of the table."""
        ms = {**self.ms, "floor": self.floor}
        held = [(self.ratios[name], target) for name, target in self.wanted.items()]
        return _row(
            self.name,
            *(_number(ms.get(name), 0) for name in ("ours", *AGAINST)),
            *(_number(self.ratios.get(name), 2) for name in AGAINST),
            *_verdict(held),
        )


def timing_line(model: str, scenario: Scenario, laps: Mapping[str, Laps], floor: float) -> Line:
    """floor: in milliseconds."""
    target = TARGETS.get(model, {}).get(scenario.name, NONE)
    wanted = {"floor": target.floor, "eager": target.eager, "compiled": target.compiled}
    asked = {name: value for name, value in wanted.items() if value is not None and name in ("floor", *laps)}
    return Line(scenario.name, floor, {name: lap.median for name, lap in laps.items()}, asked)


@dataclass(frozen=True, slots=True)
class Single:
    """One number of ours against one of theirs, whatever they count."""

    name: str
    ours: float
    theirs: float
    target: float | None

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs

    def markdown(self, digits: int = 2) -> str:
        """A line of the second table."""
        held = [] if self.target is None else [(self.ratio, self.target)]
        return _row(self.name, *(_number(each, digits) for each in (self.ours, self.theirs, self.ratio)),
                    *_verdict(held))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Report:
    """Everything. first: milliseconds of the first pictures; eager_png: with Pillow's PNG; weights: gigabytes.

    laps: every sample, by scenario and side. drift: errors in levels of 255.
    """

    machine: str
    model: str
    dtype: str
    teraflops: float
    gigabytes: float
    first: list[float]
    eager_png: float
    weights: Mapping[str, float]
    drift: Mapping[str, float]
    lines: list[Line]
    laps: Mapping[str, Mapping[str, Laps]]
    seconds: float

    def singles(self) -> Iterator[Single]:
        """The rows with one ratio instead of three."""
        at = {line.name: line.ms for line in self.lines}
        ours, is_4b = at[FIRST.name]["ours"], self.model == "4B"
        yield Single(
            f"{FIRST.name}, ms: eager with Pillow's PNG", ours, self.eager_png, scenarios.WITH_PNG if is_4b else None
        )
        yield Single(
            f"{KV_FOUR.name}, ms: the plain pipeline", at[KV_FOUR.name]["ours"], at[PLAIN_FOUR.name]["eager"],
            scenarios.KV_TO_PLAIN if self.model == "9B" else None,
        )  # fmt: skip
        yield Single("slowest of the first three, ms: the warm median", max(self.first), ours, scenarios.SLOWEST_FIRST)
        whole = {side: self.weights[side] + self.working(FIRST.name, side) for side in ("ours", "eager")}
        target = scenarios.MEMORY_TO_EAGER if is_4b else None
        yield Single(f"{FIRST.name}, GB: eager", whole["ours"], whole["eager"], target)
        yield Single(
            f"{FIRST.name}, GB: weights and {scenarios.WORKING_GB:g} GB to work in", whole["ours"],
            self.weights["ours"] + scenarios.WORKING_GB, 1.0 if is_4b else None,
        )  # fmt: skip
        yield Single("error against fp32, levels of 255: diffusers", self.drift["ours"], self.drift["theirs"],
                     scenarios.DRIFT)  # fmt: skip

    def working(self, scenario: str, side: str) -> float:
        """Gigabytes taken beside the weights, at the most."""
        return max(self.laps[scenario][side].working) / 1e9

    def markdown(self) -> str:
        """The tables, and what they were measured on."""
        return "\n".join(
            (
                f"{self.machine}, klein {self.model} with random weights, {self.dtype}. Measured limits: "
                f"{self.teraflops:.1f} TFLOP/s, {self.gigabytes:.0f} GB/s. Took {self.seconds:.0f} s.",
                "",
                *_head("", "ours, ms", *AGAINST, *(f": {name}" for name in AGAINST), "target", ""),
                *(line.markdown() for line in self.lines),
                "",
                *_head("ours : theirs", "ours", "theirs", "ratio", "target", ""),
                *(single.markdown() for single in self.singles()),
                "",
                *_head("memory beside the weights, GB", *SIDES),
                *(_row(name, *(_number(self.working(name, side), 2) if side in laps else "—" for side in SIDES))
                  for name, laps in self.laps.items()),
            )
        )  # fmt: skip


def _number(value: float | None, digits: int) -> str:
    return "—" if value is None else f"{value:.{digits}f}"


def _verdict(held: list[tuple[float, float]]) -> tuple[str, str]:
    """(ratio, target) pairs -> what is wanted, in the order of the columns, and whether all of it is so."""
    if not held:
        return "—", "—"
    met = all(ratio <= target for ratio, target in held)
    return "≤ " + ", ".join(f"{target:.2f}" for _, target in held), "met" if met else "missed"


def _head(*cells: str) -> tuple[str, str]:
    return _row(*cells), f"|{'---|' * len(cells)}"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
