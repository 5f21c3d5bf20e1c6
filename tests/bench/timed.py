"""The sections of the GPU benchmark that run alone on the card, in a process of their own.

    python -m tests.bench.timed VARIANT --cache FOLDER --model FOLDER --sections NAME,… [--backend NAME] [--wait]

Prints a line of JSON a section. --cache: the compilers' disk cache. --model: where the section "folder" writes the
model. --wait: after the sections of PREPARE, ask the parent for a turn. A section that fails leaves the others alone.
If it leaves the GPU unusable, the process ends, and the parent starts the rest again.
"""

import argparse
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.contract import Exact, Job, Result
from engine.families.klein.compiler import CompileOptions
from engine.families.klein.pipeline import Klein
from tests.bench import attention, ceilings, drift, full_size_folder, parts, techniques
from tests.bench.ceilings import Ceilings
from tests.bench.children import say, wait_for_go
from tests.bench.floors import Counts
from tests.bench.fp8_models import available, in_fp8, quantise_pipeline
from tests.bench.full_size_models import (
    GIANTS,
    Giant,
    Nets,
    compile_parts,
    compiled,
    device_of,
    diffusers,
    finite,
    grown,
    ours,
)
from tests.bench.limits import time_limit
from tests.bench.report import Line, timing_line
from tests.bench.scenarios import AGAIN, EDIT, FIRST, FOUR, HALF, Ask, Scenario, asks
from tests.bench.sides import engine_side, pipeline_side
from tests.bench.turns import Laps, Pace, Side, Stopwatch, in_turns

PREPARE = ("models", "same images", "warm", "counts", "folder")
"""Sections that time nothing, and may run beside other processes."""
TURNS = {FIRST: (4, 12.0), HALF: (5, 6.0), EDIT: (2, 12.0), AGAIN: (2, 12.0), FOUR: (1, 16.0)}
"""Double turns of each scenario and the seconds they may take, in the order of their value."""
FIRST_COMPILED = 40.0
"""Seconds for the first image of compiled diffusers in a shape: a few from the disk cache, up to 40 without it."""


class Bench:
    """Sections of the benchmark, and the sides they time."""

    def __init__(self, giant: Giant, backend: str, cache: Path, model: Path,
                 heard: Callable[[str, dict[str, Any]], None] = say) -> None:  # fmt: skip
        self.giant, self.backend, self.cache, self.model, self.heard = giant, backend, cache, model, heard
        self.device = device_of(giant)
        self.gpu = self.device.is_cuda
        self.deadline = float("inf")
        """As time.time() counts."""
        self.lines: list[Line] = []
        self.watch = Stopwatch(self.device)
        self.limits = Ceilings(1.0, 1.0)
        self.counts = Counts(self.giant, self.device.dtype)
        self.nets: Nets
        self.klein: Klein
        self.pipe: Any = None
        self.pipe_compiled: Any = None

    @property
    def left(self) -> float:
        """Return the seconds until this process should end."""
        return self.deadline - time.time()

    def run(self, names: tuple[str, ...], *, wait: bool = False) -> None:
        """Run these sections."""
        for name in names:
            if wait and name not in PREPARE:
                self.deadline, wait = wait_for_go(), False
            self.section(name)

    def section(self, name: str) -> None:
        """Run a section and report what it measured, or why it failed."""
        work, least, most = self._sections[name]
        start = time.perf_counter()
        if self.left < least:
            self.heard(name, {"skipped": f"{self.left:.0f} s were left, it needs {least:.0f}"})
            return
        try:
            with torch.no_grad(), time_limit(min(most, self.left)):
                result = work() or {}
            if self.gpu:
                torch.cuda.empty_cache()
        except Exception as exc:
            traceback.print_exc()
            result = {"error": f"{type(exc).__name__}: {' '.join(str(exc).split())[:300]}"}
        self.heard(name, {"took": round(time.perf_counter() - start, 1), **result})
        if "error" in result and self.gpu:
            self._check_gpu()

    @property
    def _sections(self) -> dict[str, tuple[Callable[[], Any], float, float]]:
        """Each section with the least seconds it needs and the most it gets."""
        return {
            "models": (self.make_models, 0, 60),
            "same images": (self.compare_images, 5, 40),
            "warm": (self.warm_up, 5, 40),
            "counts": (self.count, 5, 40),
            "folder": (self.write_folder, 10, 80),
            "ceilings": (self.measure_ceilings, 2, 20),
            "tuning from disk": (self.tune, 10, 120),
            "tuning again": (self.tune, 10, 60),
            "tuned": (self.time_tuned, 20, 160),
            "fp8": (self.time_fp8, 15, 70),
            "bands": (lambda: parts.measure_bands(self), 3, 20),
            "eager": (self.time_eager, 8, 30),
            "parts": (lambda: parts.measure(self), 3, 20),
            "techniques": (lambda: techniques.measure(self), 5, 30),
            "drift": (self.measure_drift, 8, 40),
        }

    def _check_gpu(self) -> None:
        try:
            torch.cuda.synchronize()
        except Exception:
            sys.exit(3)

    # Preparation.

    def make_models(self) -> dict[str, Any]:
        before = full_size_folder.card_gigabytes() if self.gpu else 0.0
        self.nets = grown(self.giant, self.device)
        attention.settle()
        self.klein = self._engine()
        self.pipe = diffusers(self.nets, self.giant, self.device)
        self.device.sync()
        name = torch.cuda.get_device_name(self.device.device) if self.gpu else "CPU"
        return {
            "machine": f"{name}, torch {torch.__version__}",
            "card before, GB": before,
            "fp8 libraries": available(),
        }

    def compare_images(self) -> dict[str, Any]:
        """Check that both sides compute the same finite image before timing."""
        ask, other = islice(asks(EDIT, self.giant), 2)
        side = engine_side(self.klein)
        with finite(self.klein):
            own, another = (_levels(side.paint(each)) for each in (ask, other))
        theirs = _levels(pipeline_side(self.pipe, self.giant).paint(ask))
        apart, unlike = float(np.abs(own - theirs).mean()), float(np.abs(own - another).mean())
        assert apart < unlike / 2, f"the sides make other images: {apart:.1f} levels apart of {unlike:.1f}"
        return {"levels apart": apart, "two unlike images": unlike}

    def warm_up(self) -> dict[str, Any]:
        """Make an image of each shape with diffusers, whose first one is slow."""
        for scenario in TURNS:
            pipeline_side(self.pipe, self.giant).paint(next(asks(scenario, self.giant)))
        return {}

    def count(self) -> dict[str, Any]:
        """Count the work of each scenario, which is kept for the floors."""
        for scenario in TURNS:
            self.counts.phases(scenario, self.giant.variant.steps)
        return {}

    def write_folder(self) -> dict[str, Any]:
        """Write the model for the processes that load it within limits."""
        full_size_folder.write(self.pipe, self.model, self.giant.variant)
        return {"GB": round(sum(file.stat().st_size for file in self.model.rglob("*.safetensors")) / 1e9, 2)}

    # Timed.

    def measure_ceilings(self) -> dict[str, Any]:
        # Made again, because the other back ends of attention could not be tried beside other processes.
        attention.settle(1.05)
        self.klein = self._engine()
        small = {} if self.gpu else {"matrix": 128, "copy": 1 << 20}
        self.limits = ceilings.measure(self.device, **small)
        return {
            "TFLOP/s": self.limits.flops / 1e12,
            "GB/s": self.limits.bandwidth / 1e9,
            "attention, ms": dict(self.klein.runner._attention.ms),
        }

    def tune(self) -> dict[str, Any]:
        """Tune from a disk cache that other processes filled, then make the first images."""
        start = time.perf_counter()
        while self.klein.runner.tune():
            pass
        seconds, laps, runner = time.perf_counter() - start, Laps(), self.klein.runner
        for ask in islice(asks(FIRST, self.giant), 3):
            self.watch.time(engine_side(self.klein), ask, laps)
        return {
            "s": round(seconds, 2),
            "parts, s": {name: round(each, 2) for name, each in runner.seconds.items()},
            "images after ready, ms": [round(ms, 1) for ms in laps.wall],
            "disk cache": cache_use(),
            "summary": runner.summary(),
            "mode": runner.mode,
        }

    def time_tuned(self) -> dict[str, Any]:
        """Time our tuned engine, diffusers, and diffusers compiled, in turns."""
        self.pipe_compiled = compiled(self.nets, self.giant, self.device, self.backend, beside=self.pipe)
        found: dict[str, Any] = {"first compiled, s": {}, "failed": {}}
        for scenario, (rounds, seconds) in TURNS.items():
            if self.left < 4 + (seconds / 2 if self.gpu else 0):
                found["failed"][scenario.name] = f"{self.left:.0f} s were left"
                continue
            try:
                self._time(scenario, rounds, seconds, found)
            except Exception as exc:
                traceback.print_exc()
                found["failed"][scenario.name] = f"{type(exc).__name__}: {str(exc)[:200]}"
        found["disk cache"] = cache_use()
        found["stages, ms"] = {scenario.name: self._stages(scenario) for scenario in (FIRST, HALF, EDIT)}
        found["same bits: graph, compiled"] = self._graph_is_exact()
        found["compiled : eager, levels apart"] = self._modes_apart()
        return found

    def _time(self, scenario: Scenario, rounds: int, seconds: float, found: dict[str, Any]) -> None:
        sides = {
            "ours": engine_side(self.klein),
            "eager": pipeline_side(self.pipe, self.giant),
            "compiled": pipeline_side(self.pipe_compiled, self.giant),
        }
        asked = asks(scenario, self.giant)
        first = next(asked)
        # An image of each shape, and idle time: its step is captured.
        sides["ours"].paint(first)
        tune_fully(self.klein)
        start = time.perf_counter()
        try:
            with time_limit(min(FIRST_COMPILED, self.left)):
                sides["compiled"].paint(first)
        except Exception as exc:
            traceback.print_exc()
            found["failed"][f"{scenario.name}, compiled"] = f"{type(exc).__name__}: {str(exc)[:200]}"
            del sides["compiled"]
        found["first compiled, s"][scenario.name] = round(time.perf_counter() - start, 1)
        sides["ours"].paint(first)
        self._turns(scenario, sides, asked, rounds, min(seconds, self.left))

    def _turns(
        self, scenario: Scenario, sides: dict[str, Side], asked: Iterator[Ask], rounds: int, seconds: float
    ) -> None:
        laps = in_turns(sides, asked, self.watch, self._pace(rounds), seconds)
        floor = 1000 * self.counts.seconds(scenario, self.giant.variant.steps, self.limits)
        line = timing_line(self.giant.name, scenario, laps, floor)
        self.lines.append(line)
        self.heard(f"line {scenario.name}", {
            **asdict(line), "all, ms": {name: [round(ms, 1) for ms in lap.wall] for name, lap in laps.items()}
        })  # fmt: skip

    def time_fp8(self) -> dict[str, Any]:
        """Time fp8 of both sides against bf16, in turns."""
        sides = {
            "ours, bf16": engine_side(self.klein),
            "eager, bf16": pipeline_side(self.pipe, self.giant),
        }
        found: dict[str, Any] = {"tuned in, s": {}, "levels from bf16": {}, "failed": {}}
        ask = next(asks(FIRST, self.giant))
        plain = _levels(engine_side(self.klein, "eager").paint(ask))
        options = self.klein.runner.options

        def own(static: bool) -> Side:
            klein = ours(in_fp8(self.nets, static=static), self.giant, self.device, options=options)
            side = engine_side(klein)
            found["levels from bf16"]["static" if static else "rows"] = float(
                np.abs(_levels(side.paint(ask)) - plain).mean()
            )
            tune_fully(klein)
            return side

        def theirs(compile_it: bool) -> Side:
            pipe = quantise_pipeline(diffusers(self.nets, self.giant, self.device, beside=self.pipe))
            if compile_it:
                compile_parts(pipe, self.backend, ("blocks", "encoder", "decoder"))
            return pipeline_side(pipe, self.giant)

        for name, make in (
            ("ours, rows", lambda: own(False)),
            ("ours, static", lambda: own(True)),
            ("eager, fp8", lambda: theirs(False)),
            ("compiled, fp8", lambda: theirs(True)),
        ):
            start = time.perf_counter()
            try:
                with time_limit(min(30.0, self.left)):
                    side = make()
                    side.paint(ask)
                sides[name] = side
            except Exception as exc:
                traceback.print_exc()
                found["failed"][name] = f"{type(exc).__name__}: {str(exc)[:200]}"
            found["tuned in, s"][name] = round(time.perf_counter() - start, 1)
        laps = in_turns(sides, asks(FIRST, self.giant), self.watch, self._pace(3, 1), min(16, self.left))
        found["disk cache"] = cache_use()
        return {"ms": {name: round(lap.median, 1) for name, lap in laps.items()}, **found}

    def time_eager(self) -> dict[str, Any]:
        sides = {"ours eager": engine_side(self.klein, "eager"), "eager": pipeline_side(self.pipe, self.giant)}
        found: dict[str, Any] = {}
        for scenario in (FIRST, EDIT, HALF):
            laps = in_turns(sides, asks(scenario, self.giant), self.watch, self._pace(1, 1), min(8, self.left))
            found[scenario.name] = {name: round(lap.median, 1) for name, lap in laps.items()}
        return found

    def measure_drift(self) -> dict[str, Any]:
        strayed = drift.measure(self.giant, self.device.device, 2)
        return {**asdict(strayed), "ratio": strayed.ratio}

    # Helpers.

    def _engine(self) -> Klein:
        options = CompileOptions(True, self.cache, self.backend, everywhere=not self.gpu)
        return ours(self.nets, self.giant, self.device, options=options)

    def _pace(self, rounds: int, warm: int = 0) -> Pace:
        return Pace(warm, rounds if self.gpu else 1)

    def _stages(self, scenario: Scenario) -> dict[str, float]:
        ask = next(islice(asks(scenario, self.giant), 90, None))
        *_, result = self.klein.run(Job(ask.prompt, ask.references, size=Exact(ask.side, ask.side), seed=1))
        assert isinstance(result, Result)
        return dict(result.ms)

    def _graph_is_exact(self) -> bool | None:
        """Tell whether a captured step equals the compiled one bit for bit."""
        side, ask = engine_side(self.klein), next(asks(FIRST, self.giant))
        captured = side.paint(ask)
        if not len(self.klein.runner._step_graphs):
            return None
        with self._without_graphs():
            return bool((side.paint(ask) == captured).all())

    @contextmanager
    def _without_graphs(self) -> Iterator[None]:
        runner = self.klein.runner
        steps, text = runner._step_graphs, runner._text_graph
        runner._step_graphs, runner._text_graph = type(steps)(1), None
        try:
            yield
        finally:
            runner._step_graphs, runner._text_graph = steps, text

    def _modes_apart(self) -> float:
        ask = next(asks(FIRST, self.giant))
        one, other = (_levels(engine_side(self.klein, mode).paint(ask)) for mode in (None, "eager"))
        return float(np.abs(one - other).mean())


def tune_fully(klein: Klein) -> None:
    """Tune until nothing is left. Raises RuntimeError if that failed, and eager would be timed as tuned."""
    while klein.runner.tune():
        pass
    if klein.runner.eager_reason:
        raise RuntimeError(klein.runner.summary())


def cache_use() -> dict[str, int]:
    """Return how often the compilers found a program on the disk, and how often not, in this process so far."""
    from torch._dynamo.utils import counters

    return {
        name: counters[group][name]
        for group in ("inductor", "aot_autograd")
        for name in sorted(counters[group])
        if name.endswith(("cache_hit", "cache_miss", "cache_bypass"))
    }


def _levels(image: Any) -> np.ndarray:
    return np.asarray(image).astype(np.float64)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.bench.timed")
    parser.add_argument("variant", choices=tuple(GIANTS))
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--sections", required=True)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--seconds", type=float, help="for all of it, without --wait")
    parser.add_argument("--wait", action="store_true")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    bench = Bench(GIANTS[asked.variant], asked.backend, asked.cache, asked.model)
    if asked.seconds is not None:
        bench.deadline = time.time() + asked.seconds
    bench.run(tuple(asked.sections.split(",")), wait=asked.wait)
