"""Ours against diffusers' own pipeline and against the machine's limit, on a GPU, at the true shape.

    python -m tests.bench.gpu [--variant 4B | 9B] [--no-compile] [--json PATH] [--minutes 8]
    python -m tests.bench.gpu --smoke

Random weights of the true shape, made on the device; no network. Prints the tables of engine/SPEED.md, in under 8
minutes on an H100 or H200. `--smoke` runs every line of it on toys, in fp32, on the CPU. Not a test: it gates nothing.
"""

import argparse
import json
import sys
import time
import warnings
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.memory.device import Device
from tests.bench import ceilings, drift
from tests.bench.floors import Counts
from tests.bench.full_size_models import GIANTS, Giant, Nets, compiled, diffusers, finite, grown, ours, weight_bytes
from tests.bench.paint import engine_side, pillow_png, pipeline_side
from tests.bench.report import Report, timing_line
from tests.bench.scenarios import EDIT, FIRST, SCENARIOS, Scenario, asks
from tests.bench.turns import PACE, Laps, Pace, Side, Stopwatch, in_turns


@dataclass(frozen=True, slots=True)
class Settings:
    """How a run is made. backend: of torch.compile, None for no compiled side. minutes: for all of it."""

    giant: Giant
    placement: Device
    backend: str | None
    minutes: float
    scenarios: tuple[Scenario, ...] = SCENARIOS
    pace: Pace = PACE
    matrix: int = ceilings.MATRIX
    copy: int = ceilings.COPY
    drifted: int = 3

    @classmethod
    def full(cls, variant: str, minutes: float, *, compiling: bool) -> "Settings":
        """On the best device there is, in its own number format."""
        return cls(GIANTS[variant], Device.choose(), "inductor" if compiling else None, minutes)

    @classmethod
    def smoke(cls, *, compiling: bool) -> "Settings":
        """Every line, nothing learnt. The compiled side is only traced, and for one scenario: seconds each."""
        return cls(
            GIANTS["toy"], Device.choose("cpu", "float32"), "eager" if compiling else None, minutes=0.0,
            scenarios=tuple(replace(each, compiled=each is EDIT) for each in SCENARIOS),
            pace=Pace(warm=1, rounds=1), matrix=128, copy=1 << 20, drifted=1,
        )  # fmt: skip


def main(settings: Settings) -> Report:
    """All chapters; the report is whole only at the end."""
    begun = time.perf_counter()
    giant, placement = settings.giant, settings.placement
    bench = Bench(settings, grown(giant, placement))
    weights = bench.weights()
    _say(f"{giant.name}: {weights['ours']:.2f} GB of weights made")
    # First of all, because only a process that has painted nothing can tell how slow the first pictures are.
    first = bench.first_three()
    _say("first pictures: " + ", ".join(f"{ms:.0f} ms" for ms in first))
    bench.same_pictures()
    strayed = drift.measure(giant, placement.device, settings.drifted)
    placement.empty_cache()
    _say(f"the sides paint the same; error against fp32: {strayed.ratio:.2f} of diffusers'")
    limits = ceilings.measure(placement, matrix=settings.matrix, copy=settings.copy)
    placement.empty_cache()
    _say(f"limits: {limits.flops / 1e12:.1f} TFLOP/s, {limits.bandwidth / 1e9:.0f} GB/s")
    eager_png, counts, laps, lines = bench.png_ms(), Counts(giant, placement.dtype), {}, []
    for i, scenario in enumerate(settings.scenarios):
        left = 60 * settings.minutes - (time.perf_counter() - begun)
        laps[scenario.name] = bench.timed(scenario, left / (len(settings.scenarios) - i))
        floor = 1000 * counts.seconds(scenario, giant.variant.steps, limits)
        lines.append(timing_line(giant.name, scenario, laps[scenario.name], floor))
        _say(lines[-1].markdown())
    return Report(
        machine=_machine(placement),
        model=giant.name,
        dtype=str(placement.dtype).removeprefix("torch."),
        teraflops=limits.flops / 1e12,
        gigabytes=limits.bandwidth / 1e9,
        first=first,
        eager_png=laps[FIRST.name]["eager"].median + eager_png,
        weights=weights,
        drift=asdict(strayed),
        lines=lines,
        laps=laps,
        seconds=time.perf_counter() - begun,
    )


class Bench:
    """The sides, and the things that are done to them."""

    def __init__(self, settings: Settings, nets: Nets) -> None:
        self.settings = settings
        self.giant, self.nets = settings.giant, nets
        self.watch = Stopwatch(settings.placement)
        build = (nets, settings.giant, settings.placement)
        self.klein, self.kv_klein = ours(*build), ours(*build, kv=True)
        self.pipe = diffusers(*build)
        # The KV pipeline changes its transformer's attention for good, and compiling changes blocks: each has modules
        # of its own, on the same memory.
        self.kv_pipe = diffusers(*build, kv=True, beside=self.pipe)
        self.compiled = compiled(*build, settings.backend, beside=self.pipe) if settings.backend else None

    def sides(self, scenario: Scenario) -> dict[str, Side]:
        """Who takes part in a scenario."""
        sides = {
            "ours": engine_side(self.kv_klein if scenario.kv else self.klein),
            "eager": pipeline_side(self.kv_pipe if scenario.kv else self.pipe, self.giant),
        }
        if scenario.compiled and self.compiled is not None:
            sides["compiled"] = pipeline_side(self.compiled, self.giant)
        return sides

    def first_three(self) -> list[float]:
        """Milliseconds of ours, right after loading."""
        laps, side = Laps(), self.sides(FIRST)["ours"]
        for ask in islice(asks(FIRST, self.giant), 3):
            self.watch.time(side, ask, laps)
        return laps.wall

    def same_pictures(self) -> None:
        """Before timing two things, make sure that they are one, and that what they compute is numbers.

        In bf16 the two round differently: their difference is held against the one between two unlike questions,
        which pictures of two unlike models would reach.
        """
        for scenario in (EDIT, replace(EDIT, kv=True, compiled=False)):
            ask, other = islice(asks(scenario, self.giant), 2)
            sides = self.sides(scenario)
            with finite(self.kv_klein if scenario.kv else self.klein):
                mine, another = (_levels(sides["ours"].paint(each)) for each in (ask, other))
            for name, side in sides.items():
                apart, unlike = (np.abs(_levels(side.paint(ask)) - each).mean() for each in (mine, another))
                assert apart < unlike / 2, f"{name} paints another picture: {apart:.1f} levels of {unlike:.1f}"

    def timed(self, scenario: Scenario, seconds: float) -> dict[str, Laps]:
        """The scenario by all its sides, in turns."""
        return in_turns(self.sides(scenario), asks(scenario, self.giant), self.watch, self.settings.pace, seconds)

    def weights(self) -> dict[str, float]:
        """Gigabytes each side would hold if it were alone; here they share."""
        theirs = (self.pipe.transformer, self.pipe.text_encoder, self.pipe.vae)
        return {"ours": weight_bytes(*self.nets) / 1e9, "eager": weight_bytes(*theirs) / 1e9}

    def png_ms(self) -> float:
        """What Pillow takes to write diffusers' picture."""
        ask, laps = next(asks(FIRST, self.giant)), Laps()
        picture = self.sides(FIRST)["eager"].paint(ask)
        for _ in range(3):
            self.watch.time(Side(lambda _: picture, pillow_png), ask, laps)
        return laps.median


def _levels(picture: Any) -> np.ndarray:
    return np.asarray(picture).astype(np.float64)


def _machine(placement: Device) -> str:
    gpu = placement.device.type == "cuda"
    return f"{torch.cuda.get_device_name(placement.device) if gpu else 'CPU'}, torch {torch.__version__}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu")
    parser.add_argument("--variant", choices=("4B", "9B"), default="4B")
    parser.add_argument("--no-compile", action="store_true", help="leave diffusers compiled out")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    parser.add_argument("--minutes", type=float, default=7.0, help="for all of it; fewer rounds where it is short")
    parser.add_argument("--smoke", action="store_true", help="toys on the CPU, seconds")
    return parser.parse_args()


if __name__ == "__main__":
    asked = arguments()
    warnings.filterwarnings("ignore")
    compiling = not asked.no_compile
    report = main(
        Settings.smoke(compiling=compiling)
        if asked.smoke
        else Settings.full(asked.variant, asked.minutes, compiling=compiling)
    )
    if asked.json:
        asked.json.write_text(json.dumps(asdict(report), indent=1))
    print(report.markdown())
