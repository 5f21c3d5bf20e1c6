"""GPU benchmark against diffusers and the machine's limits, at full size.

    python -m tests.bench.gpu [--variant 4B | 9B] [--seconds 420] [--json PATH] [--only SECTION,…]
    python -m tests.bench.gpu --smoke

Random weights of the true shape, made on the device; no network. Every section has a time limit of its own and survives
the failure of another; what is measured is printed, and written to the file, as it comes. The most valuable sections
run first. `--smoke` runs every line on toys, in fp32, on the CPU. Not a test: it gates nothing.
"""

import os

# Before torch: spinning threads made this run unable to end beside a busy process.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.families.klein.pipeline import Klein
from engine.families.klein.runner import CompileOptions
from engine.memory.device import Device
from tests.bench import ceilings, drift, full_size_folder
from tests.bench.ceilings import Ceilings
from tests.bench.floors import Counts
from tests.bench.full_size_models import GIANTS, Giant, Nets, compiled, diffusers, finite, grown, in_fp8, ours
from tests.bench.report import Line, markdown, timing_line
from tests.bench.scenarios import EDIT, FIRST, HALF, SCENARIOS, Scenario, asks
from tests.bench.sides import engine_side, pipeline_side
from tests.bench.turns import PACE, Laps, Pace, Stopwatch, in_turns


@dataclass(frozen=True, slots=True)
class Settings:
    """Configuration of a run.

    backend: of the compilers. seconds: for the whole run. limits: memory limits in GB.
    """

    giant: Giant
    device: Device
    backend: str
    seconds: float
    json: Path | None = None
    only: tuple[str, ...] = ()
    scenarios: tuple[Scenario, ...] = SCENARIOS[:6]
    pace: Pace = PACE
    matrix: int = ceilings.MATRIX
    copy: int = ceilings.COPY
    limits: tuple[float, ...] = (0, 13, 8, 6)

    @classmethod
    def full(cls, variant: str, seconds: float) -> "Settings":
        """Return the settings for the best device, in its own number format."""
        return cls(GIANTS[variant], Device.choose(), "inductor", seconds)

    @classmethod
    def smoke(cls) -> "Settings":
        """Return the settings that run every line on toy models.

        The numbers mean nothing.
        """
        return cls(
            GIANTS["toy"], Device.choose("cpu", "float32"), "eager", seconds=600.0, scenarios=(FIRST, HALF, EDIT),
            pace=Pace(warm=1, rounds=1), matrix=128, copy=1 << 20, limits=(0,),
        )  # fmt: skip


class Bench:
    """Sections of the benchmark, the sides they time, and their measurements."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.giant, self.device = settings.giant, settings.device
        self.gpu = self.device.device.type == "cuda"
        self.begun = time.perf_counter()
        self.found: dict[str, Any] = {"machine": _machine(self.device), "model": self.giant.name, "sections": {}}
        self.lines: list[Line] = []
        self.watch = Stopwatch(self.device)
        self.limits = Ceilings(1.0, 1.0)
        self.counts = Counts(self.giant, self.device.dtype)
        self.compiles = Path(tempfile.mkdtemp(prefix="klein-bench-"))
        self.nets: Nets
        self.klein: Klein
        self.pipe: Any = None
        self.pipe_compiled: Any = None

    @property
    def left(self) -> float:
        """Return the seconds until the run should end."""
        return self.settings.seconds - (time.perf_counter() - self.begun)

    def run(self) -> dict[str, Any]:
        """Run all sections, the most valuable first, and return all measurements."""
        for name, section, least in (
            ("models", self.make_models, 0),
            ("ceilings", self.measure_ceilings, 5),
            ("first images untuned", self.first_images, 5),
            ("same images", self.compare_images, 10),
            ("eager", self.time_eager, 20),
            ("tuning cold", self.tune, 60),
            ("tuned", self.time_tuned, 15),
            ("tuning warm", self.tune_again, 30),
            ("diffusers compiled", self.time_compiled, 45),
            ("fp8", self.time_fp8, 30),
            ("memory by part", self.measure_parts, 5),
            ("techniques", self.measure_techniques, 15),
            ("memory within limits", self.measure_limits, 60),
            ("drift", self.measure_drift, 15),
        ):
            if self.settings.only and name not in (*self.settings.only, "models"):
                continue
            self._section(name, section, least)
        self.found["seconds"] = time.perf_counter() - self.begun
        self._write()
        shutil.rmtree(self.compiles, ignore_errors=True)
        return self.found

    def _section(self, name: str, section: Callable[[], Any], least: float) -> None:
        start = time.perf_counter()
        if self.left < least:
            self._note(name, {"skipped": f"{self.left:.0f} s were left, it needs {least:.0f}"})
            return
        try:
            with torch.no_grad():
                result = section()
        except Exception as exc:
            traceback.print_exc()
            result = {"error": f"{type(exc).__name__}: {' '.join(str(exc).split())[:400]}"}
        if self.gpu:
            torch.cuda.empty_cache()
        self._note(name, {"took": round(time.perf_counter() - start, 1), **(result or {})})

    def _note(self, name: str, result: dict[str, Any]) -> None:
        self.found["sections"][name] = result
        print(f"[{time.perf_counter() - self.begun:6.1f}] {name}: {json.dumps(result, default=str)}", flush=True)
        self._write()

    def _write(self) -> None:
        if self.settings.json:
            lines = [asdict(line) for line in self.lines]
            self.settings.json.write_text(json.dumps({**self.found, "lines": lines}, indent=1, default=str))

    # Sections.

    def make_models(self) -> dict[str, Any]:
        before = self._card()
        self.nets = grown(self.giant, self.device)
        options = CompileOptions(True, self.compiles, self.settings.backend, everywhere=not self.gpu)
        self.klein = ours(self.nets, self.giant, self.device, options=options)
        self.pipe = diffusers(self.nets, self.giant, self.device)
        return {"card before, GB": before, "card after, GB": self._card(), "allocated, GB": self._allocated()}

    def measure_ceilings(self) -> dict[str, Any]:
        self.limits = ceilings.measure(self.device, matrix=self.settings.matrix, copy=self.settings.copy)
        return {"TFLOP/s": self.limits.flops / 1e12, "GB/s": self.limits.bandwidth / 1e9}

    def first_images(self) -> dict[str, Any]:
        laps, side = Laps(), engine_side(self.klein)
        for ask in islice(asks(FIRST, self.giant), 3):
            self.watch.time(side, ask, laps)
        return {"ms": laps.wall, "peak, GB": self._peak(), "card, GB": self._card()}

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

    def time_eager(self) -> dict[str, Any]:
        sides = {"ours eager": engine_side(self.klein, "eager"), "eager": pipeline_side(self.pipe, self.giant)}
        found = {}
        for scenario in self._scenarios(3):
            laps = in_turns(sides, asks(scenario, self.giant), self.watch, self._pace(2), min(15, self.left))
            found[scenario.name] = {name: round(lap.median, 1) for name, lap in laps.items()}
        return {**found, "stages, ms": self._stages("eager")}

    def tune(self) -> dict[str, Any]:
        """Tune until nothing is left to tune.

        One job arrives meanwhile and is timed.
        """
        runner, jobs, start = self.klein.runner, Laps(), time.perf_counter()
        waiting, asked = engine_side(self.klein), asks(HALF, self.giant)
        before = Laps()
        for _ in range(3):
            self.watch.time(waiting, next(asked), before)
        longest, calls = 0.0, 0
        while True:
            begun = time.perf_counter()
            more = runner.tune()
            longest = max(longest, time.perf_counter() - begun)
            calls += 1
            if not more:
                break
            if calls % 40 == 0:
                self.watch.time(waiting, next(asked), jobs)
        return {
            "s": time.perf_counter() - start,
            "parts, s": {name: round(seconds, 2) for name, seconds in runner.seconds.items()},
            "longest piece, s": longest,
            "job alone, ms": before.median,
            "jobs meanwhile, ms": [round(ms, 1) for ms in jobs.wall],
            "summary": runner.summary(),
            "mode": runner.mode,
        }

    def time_tuned(self) -> dict[str, Any]:
        found: dict[str, Any] = {"summary": self.klein.runner.summary()}
        ready = Laps()
        self.watch.time(engine_side(self.klein), next(asks(FIRST, self.giant)), ready)
        found["first image after ready, ms"] = ready.wall[0]
        for scenario in self._scenarios():
            # An image of each shape, and idle time: its step is captured.
            engine_side(self.klein).paint(next(asks(scenario, self.giant)))
            while self.klein.runner.tune():
                pass
        sides = {"ours": engine_side(self.klein), "eager": pipeline_side(self.pipe, self.giant)}
        for scenario in self._scenarios():
            if self.left < 5:
                break
            laps = in_turns(sides, asks(scenario, self.giant), self.watch, self._pace(3), min(12, self.left))
            floor = 1000 * self.counts.seconds(scenario, self.giant.variant.steps, self.limits)
            self.lines.append(timing_line(self.giant.name, scenario, laps, floor))
            print(self.lines[-1].markdown(), flush=True)
        found["stages, ms"] = self._stages(None)
        found["same bits: graph, compiled"] = self._graph_is_exact()
        found["compiled : eager, levels apart"] = self._modes_apart()
        return found

    def tune_again(self) -> dict[str, Any]:
        """Tune in a second process, which finds the disk cache of this one."""
        command = [sys.executable, "-m", "tests.bench.warm_tuning", self.giant.name, str(self.compiles)]
        return self._in_process([*command, "--backend", self.settings.backend], 90)

    def time_compiled(self) -> dict[str, Any]:
        """Time diffusers compiled as its documentation advises.

        Each shape is compiled separately, the first shapes first.
        """
        if self.pipe_compiled is None:
            build = (self.nets, self.giant, self.device, self.settings.backend)
            self.pipe_compiled = compiled(*build, beside=self.pipe)
        side, own, found = pipeline_side(self.pipe_compiled, self.giant), engine_side(self.klein), {}
        for scenario in (each for each in self._scenarios() if each.compiled):
            if self.left < 40:
                break
            start = time.perf_counter()
            side.paint(next(asks(scenario, self.giant)))
            seconds = time.perf_counter() - start
            sides = {"compiled": side, "ours": own}
            laps = in_turns(sides, asks(scenario, self.giant), self.watch, self._pace(2), min(10, self.left))
            found[scenario.name] = {
                "compiled in, s": round(seconds, 1),
                **{name: round(lap.median, 1) for name, lap in laps.items()},
                "ratio": round(laps["ours"].median / laps["compiled"].median, 3),
            }
        return found

    def time_fp8(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        options = replace(self.klein.runner.options)
        for name, static in (("rows", False), ("static", True)):
            if self.left < 25:
                break
            klein = ours(in_fp8(self.nets, static=static), self.giant, self.device, options=options)
            side = engine_side(klein)
            apart = np.abs(_levels(side.paint(ask := next(asks(FIRST, self.giant)))) - _levels(
                engine_side(self.klein, "eager").paint(ask))).mean()  # fmt: skip
            start = time.perf_counter()
            while klein.runner.tune():
                pass
            tuned = time.perf_counter() - start
            sides = {"fp8": side, "fp8 eager": engine_side(klein, "eager"), "bf16": engine_side(self.klein),
                     "eager": pipeline_side(self.pipe, self.giant)}  # fmt: skip
            laps = in_turns(sides, asks(FIRST, self.giant), self.watch, self._pace(2), 8)
            found[name] = {
                **{side: round(lap.median, 1) for side, lap in laps.items()},
                "to bf16": round(laps["fp8"].median / laps["bf16"].median, 3),
                "to diffusers eager": round(laps["fp8"].median / laps["eager"].median, 3),
                "tuned in, s": tuned,
                "summary": klein.runner.summary(),
                "levels from bf16": float(apart),
            }
            del klein, sides, side
        return found

    def measure_parts(self) -> dict[str, Any]:
        """Measure the peak bytes that each part allocates.

        The memory plan must count them.
        """
        from engine.families.klein.runner import SampleInputs

        example_sides = (self.giant.large // 16, self.giant.small // 16)
        found = {}
        for mode in ("eager", self.klein.runner.mode):
            for side in example_sides:
                example = SampleInputs(self.klein.transformer, self.device, self.giant.variant.text_length, side, side)
                latent, image = example.latent(), example.image()
                parts: dict[str, Callable[[], Any]] = {
                    "decode": lambda latent=latent, mode=mode: self.klein.runner.decode(latent, mode),
                    "encode": lambda image=image, mode=mode: self.klein.runner.encode(image, mode),
                }
                for count in (0, 1):
                    arguments = example.step(count * side * side)
                    parts[f"step, {count} references"] = lambda arguments=arguments, mode=mode: (
                        self.klein.runner.velocity((0, 0, ()), *arguments, mode)  # type: ignore[arg-type, call-arg]
                    )
                for name, part in parts.items():
                    found[f"{name}, {mode}, {16 * side}"] = self._taken(part)
        ids = torch.zeros(1, self.giant.variant.text_length, dtype=torch.long)
        found["text"] = self._taken(lambda: self.klein.runner.text(ids, torch.ones_like(ids)))
        return {"GB": found, "card, GB": self._card(), "reserved, GB": self._reserved()}

    def measure_techniques(self) -> dict[str, Any]:
        """Time alternatives for the decoder and for batches against today's code."""
        from tests.bench import techniques

        return techniques.measure(self)

    def measure_limits(self) -> dict[str, Any]:
        """Load a full-size folder from a RAM disk under each memory limit.

        Each limit runs through Engine in a separate process.
        """
        ram = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
        folder = Path(tempfile.mkdtemp(prefix="klein-bench-", dir=ram))
        try:
            start = time.perf_counter()
            full_size_folder.write(self.pipe, folder, self.giant.variant)
            found: dict[str, Any] = {"written in, s": round(time.perf_counter() - start, 1)}
            # Free this process's memory first, so that they have the whole card.
            self._free_everything()
            for gigabytes in self.settings.limits:
                if self.left < 15:
                    break
                found[f"{gigabytes:g} GB" if gigabytes else "all"] = self._within(folder, gigabytes)
            return found
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def measure_drift(self) -> dict[str, Any]:
        strayed = drift.measure(self.giant, self.device.device, 2)
        return {**asdict(strayed), "ratio": strayed.ratio}

    # Helpers.

    def _within(self, folder: Path, gigabytes: float) -> Any:
        command = [sys.executable, "-m", "tests.bench.full_size_folder", str(folder), str(gigabytes)]
        command += ["--toy"] if self.giant.name == "toy" else []
        found = self._in_process(command, 120)
        print(f"    {gigabytes:g} GB: {json.dumps(found)}", flush=True)
        return found

    def _in_process(self, command: list[str], seconds: float) -> dict[str, Any]:
        """Return the line of JSON that a process prints last."""
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(10, min(seconds, self.left)))
        lines = done.stdout.strip().splitlines()
        if not lines:
            return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
        return json.loads(lines[-1])

    def _free_everything(self) -> None:
        import gc

        for name in ("klein", "pipe", "pipe_compiled", "nets"):
            setattr(self, name, None)
        gc.collect()
        self.device.empty_cache()

    def _scenarios(self, count: int | None = None) -> tuple[Scenario, ...]:
        return self.settings.scenarios[:count]

    def _pace(self, rounds: int) -> Pace:
        return Pace(self.settings.pace.warm and 1, min(rounds, self.settings.pace.rounds))

    def _stages(self, mode: Any) -> dict[str, dict[str, float]]:
        from engine.contract import Exact, Job, Result

        found = {}
        for scenario in self._scenarios(3):
            ask = next(islice(asks(scenario, self.giant), 90, None))
            *_, result = self.klein.run(
                Job(ask.prompt, ask.references, size=Exact(ask.side, ask.side), seed=1, mode=mode)
            )
            assert isinstance(result, Result)
            found[scenario.name] = dict(result.ms)
        return found

    def _graph_is_exact(self) -> bool | None:
        """Tell whether a captured step equals the compiled one bit for bit."""
        runner = self.klein.runner
        side, ask = engine_side(self.klein), next(asks(FIRST, self.giant))
        captured = side.paint(ask)
        if not len(runner._step_graphs):
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

    def _taken(self, part: Callable[[], Any]) -> float:
        part()  # memory that libraries allocate on their first call is not this part's
        if not self.gpu:
            return 0.0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        part()
        return round((torch.cuda.max_memory_allocated() - before) / 1e9, 3)

    def _card(self) -> float:
        """Return the used GB of the whole card, by any process."""
        return full_size_folder.card_gigabytes() if self.gpu else 0.0

    def _allocated(self) -> float:
        return round(torch.cuda.memory_allocated() / 1e9, 2) if self.gpu else 0.0

    def _reserved(self) -> float:
        return round(torch.cuda.memory_reserved() / 1e9, 2) if self.gpu else 0.0

    def _peak(self) -> float:
        return round(torch.cuda.max_memory_allocated() / 1e9, 2) if self.gpu else 0.0


def _levels(image: Any) -> np.ndarray:
    return np.asarray(image).astype(np.float64)


def _machine(device: Device) -> str:
    gpu = device.device.type == "cuda"
    return f"{torch.cuda.get_device_name(device.device) if gpu else 'CPU'}, torch {torch.__version__}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu")
    parser.add_argument("--variant", choices=("4B", "9B"), default="4B")
    parser.add_argument("--seconds", type=float, default=420.0, help="for all of it; the last sections are left out")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file, as it comes")
    parser.add_argument("--only", default="", help="sections, separated by commas")
    parser.add_argument("--smoke", action="store_true", help="toys on the CPU")
    return parser.parse_args()


def main(settings: Settings) -> tuple[Bench, dict[str, Any]]:
    """Run the sections that the settings ask for."""
    bench = Bench(settings)
    return bench, bench.run()


if __name__ == "__main__":
    asked = arguments()
    warnings.filterwarnings("ignore")
    wanted = Settings.smoke() if asked.smoke else Settings.full(asked.variant, asked.seconds)
    only = tuple(name.strip() for name in asked.only.split(",") if name.strip())
    bench, found = main(replace(wanted, json=asked.json, only=only))
    print(markdown(found, bench.lines))
