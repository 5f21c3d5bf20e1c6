"""GPU benchmark against diffusers and the machine's limits, at full size.

    python -m tests.bench.gpu [--variant 4B | 9B] [--seconds 420] [--json PATH] [--only STEP,…]
    python -m tests.bench.gpu --smoke

Random weights of the true shape, made on the device; no network. All work is done in child processes, each with a time
limit, so that no failure or hang of one stops the others. What is measured is printed, and written to the file, as it
comes. `--smoke` runs every line on toys, in fp32, on the CPU. Not a test: it gates nothing.

Steps, with the seconds expected on an H200 with 16 cores (M: measured, else estimated), and what is kept for them:

    compile    0 – 70   at most 110; ten processes of few blocks fill the compilers' disk cache at once (our decoder
                        alone: 41 M); beside them the timed process makes the models (1 M), compares images (3 M),
                        counts the floors, and writes 16 GB to the RAM disk (25)
    timed     85 – 245  alone on the card: ceilings 1 M, tuning from the disk cache 30, compiled diffusers from it and
                        five scenarios in turns 76 M, fp8 of both sides 50, decoding in bands 2
    jobs     245 – 290  48 kept; three windows of 11 s: jobs during the compiling of blocks, decoder and encoder
    memory   290 – 415  125 kept; without a limit 50, with tuning; four limits, 16 s each M
    rest     415 –      parts, techniques, eager, drift: if 30 s are left

`timed` leaves out its last sections before it takes the seconds of `jobs` and `memory`.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.bench.children import Child, Children
from tests.bench.report import Line, markdown

FILL = ("ours decoder", "ours encoder", "ours blocks", "ours fp8 blocks", "diffusers blocks",
        "diffusers blocks with references", "diffusers fp8 blocks", "diffusers decoder", "diffusers decoder, small",
        "diffusers encoder")  # fmt: skip
"""Parts to compile, as tests.bench.fill_cache names them, the longest first."""
PREPARE = ("models", "same images", "warm", "counts", "folder")
TIMED = ("ceilings", "tuning from disk", "tuned", "fp8", "bands")
REST = ("parts", "techniques", "eager", "drift")
PARTS = ("blocks", "decoder", "encoder")
STEPS = ("compile", "timed", "jobs", "memory", "rest")
END = 4.0
"""Seconds kept for the tables at the end."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Configuration of a run.

    backend: of the compilers. seconds: for the whole run. fill: for filling the disk cache at most. jobs, memory: kept
    for these steps. window: for the jobs during one part. limits: (GB, quantisation); 0 GB is no limit.
    """

    variant: str = "4B"
    backend: str = "inductor"
    seconds: float = 420.0
    json: Path | None = None
    only: tuple[str, ...] = ()
    fill: float = 110.0
    jobs: float = 48.0
    memory: float = 125.0
    window: float = 11.0
    parts: tuple[str, ...] = PARTS
    filled: tuple[str, ...] = FILL
    limits: tuple[tuple[float, str], ...] = ((0, ""), (8, ""), (6, ""), (13, ""), (8, "fp8"))

    @classmethod
    def smoke(cls) -> "Settings":
        """Return the settings that run every line on toy models.

        The numbers mean nothing.
        """
        return cls("toy", "eager", seconds=900, fill=300, jobs=100, memory=100, window=1, limits=((0, ""), (0, "fp8")))


@dataclass
class Run:
    """A run of the benchmark: its children and what they measured."""

    settings: Settings
    begun: float = field(default_factory=time.monotonic)
    lines: list[Line] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.found: dict[str, Any] = {"model": self.settings.variant, "sections": {}}
        self.folder = Path(tempfile.mkdtemp(prefix="klein-bench-", dir=_ram_disk()))
        cache = self.folder / "compiled"
        self.cache, self.model = cache, self.folder / "model"
        self.environment = {
            # As the product runs it.
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            "OMP_WAIT_POLICY": "PASSIVE",
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "TRITON_CACHE_DIR": str(cache / "triton"),
            "HF_HUB_OFFLINE": "1",
        }
        self.children = Children(self._take)
        self.timed: Child | None = None
        self.jobs: dict[str, Child] = {}
        self.limited: list[Child] = []

    @property
    def left(self) -> float:
        """Return the seconds until the tables are due."""
        return self.settings.seconds - END - (time.monotonic() - self.begun)

    def run(self) -> dict[str, Any]:
        """Run all steps, and return all measurements."""
        steps: dict[str, Callable[[], None]] = {
            "compile": self.compile, "timed": self.time, "jobs": self.time_jobs, "memory": self.measure_memory,
            "rest": self.measure_rest,
        }  # fmt: skip
        try:
            self._start_waiting()
            for name, step in steps.items():
                start = time.monotonic()
                if self._wanted(name):
                    try:
                        step()
                    except Exception as exc:
                        self._take(name, {"error": f"{type(exc).__name__}: {exc}"})
                    self._take(f"step {name}", {"took": round(time.monotonic() - start, 1)})
        finally:
            self.children.kill()
            self.found["standard error"] = {child.name: child.errors for child in self.children.all if child.failed}
            self.found["seconds"] = time.monotonic() - self.begun
            self._write()
            shutil.rmtree(self.folder, ignore_errors=True)
        return self.found

    # Steps.

    def _start_waiting(self) -> None:
        """Start what will wait for its turn, while the cache is filled: importing takes seconds."""
        if self._wanted("timed") or self._wanted("memory"):
            self.timed = self._start_timed((*PREPARE, *(TIMED if self._wanted("timed") else ())))

    def _start_timed(self, sections: tuple[str, ...], *extra: object) -> Child:
        where = ("--cache", self.cache, "--model", self.model, "--backend", self.settings.backend)
        arguments = (self.settings.variant, *where, "--sections", ",".join(sections), *(extra or ("--wait",)))
        return self._start("timed", "tests.bench.timed", *arguments)

    def compile(self) -> None:
        """Fill the disk cache from several processes at once."""
        backend = ("--backend", self.settings.backend)
        filling = [
            self._start(
                f"compile {name}", "tests.bench.fill_cache", self.settings.variant, self.cache, name, *backend,
                nice=True, TORCHINDUCTOR_COMPILE_THREADS="6",
            )
            for name in self.settings.filled
        ]  # fmt: skip
        self._start_later()
        self.children.finish(filling, min(self.settings.fill, self.left - 60))

    def _start_later(self) -> None:
        """Start what waits longest, after what the cache is filled by."""
        settings = self.settings
        if self.jobs or self.limited:
            return
        if self._wanted("jobs"):
            for part in settings.parts:
                arguments = (settings.variant, part, "--seconds", settings.window, "--backend", settings.backend)
                self.jobs[part] = self._start(
                    f"jobs during {part}", "tests.bench.jobs_meanwhile", *arguments, "--wait", nice=True
                )
        if self._wanted("memory"):
            for gigabytes, quant in settings.limits:
                arguments = (self.model, gigabytes, *(("--quant", quant) if quant else ()), "--wait")
                toy = ("--toy",) if settings.variant == "toy" else ()
                name = f"memory {gigabytes:g} GB {quant}".strip()
                self.limited.append(self._start(name, "tests.bench.full_size_folder", *arguments, *toy))

    def time(self) -> None:
        """Let the timed process have the card alone, and start the rest of its sections again if it dies."""
        assert self.timed is not None
        self._start_later()
        reserve = (self.settings.jobs if self.jobs else 0) + (self.settings.memory if self.limited else 0)
        self.timed.go(self.left - reserve)
        self.children.finish([self.timed], self.left - reserve + 5)
        missing = tuple(name for name in TIMED if name not in self.found["sections"])
        if missing and self.left - reserve > 40:
            folder = () if (self.model / "model_index.json").is_file() else ("folder",)
            before = ("models", "counts", *folder, "ceilings", "tuning from disk")
            again = tuple(dict.fromkeys((*before, *missing)))
            self.timed = self._start_timed(again, "--seconds", self.left - reserve)
            self.children.finish([self.timed], self.left - reserve + 5)

    def time_jobs(self) -> None:
        """Time jobs during compiling, one part after another, with nothing else on the card."""
        self._start_later()
        self._end_timed()
        jobs, keep = self.jobs, self.settings.memory if self.limited else 0
        # The first time a child is ready it has imported, the second time it has made its model.
        self.children.listen(lambda: all(child.ready or child.ended for child in jobs.values()), min(25, self.left))
        for child in jobs.values():
            child.go(self.left)
        self.children.listen(lambda: all(child.ready or child.ended for child in jobs.values()), min(25, self.left))
        for number, child in enumerate(jobs.values()):
            window = min(self.settings.window, (self.left - keep) / (len(jobs) - number) - 3)
            if window < 3 and self.settings.variant != "toy":
                self._take(child.name, {"skipped": f"{self.left:.0f} s were left"})
                break
            child.go(window)
            self.children.finish([child], window + 8)
        self.children.kill(jobs.values())

    def measure_memory(self) -> None:
        """Load the folder under each limit, one process after another."""
        self._start_later()
        if not (self.model / "model_index.json").is_file():
            self.children.listen(lambda: "folder" in self.found["sections"], min(60, self.left))
        self._end_timed()
        self.children.kill(self.jobs.values())
        for child in self.limited:
            if self.left < 8:
                self._take(child.name, {"skipped": f"{self.left:.0f} s were left"})
                continue
            child.go(self.left)
            self.children.finish([child], min(60, self.left))

    def measure_rest(self) -> None:
        """Measure what was measured before, if time is left."""
        if self.left < 30:
            self._take("rest", {"skipped": f"{self.left:.0f} s were left"})
            return
        child = self._start_timed(("models", "tuning again", *REST), "--seconds", self.left)
        self.children.finish([child], self.left)

    # Helpers.

    def _end_timed(self) -> None:
        if self.timed is not None:
            self.children.kill([self.timed])

    def _wanted(self, step: str) -> bool:
        return not self.settings.only or step in self.settings.only

    def _start(self, name: str, module: str, *arguments: object, nice: bool = False, **environment: str) -> Child:
        return self.children.start(name, module, *arguments, nice=nice, **{**self.environment, **environment})

    def _take(self, section: str, result: dict[str, Any]) -> None:
        self.found["sections"][section] = result
        if section.startswith("line "):
            line = Line(**{name: result[name] for name in ("name", "floor", "ms", "wanted")})
            # A process that died is started again: what it timed last counts.
            self.lines = [*(other for other in self.lines if other.name != line.name), line]
            print(line.markdown())
        print(f"[{time.monotonic() - self.begun:6.1f}] {section}: {json.dumps(result)}", flush=True)
        self._write()

    def _write(self) -> None:
        if self.settings.json:
            self.settings.json.write_text(json.dumps(self.found, indent=1))


def _ram_disk() -> str | None:
    """Return a RAM disk with room for the model's folder, None for the folder of temporary files."""
    ram = "/dev/shm"
    return ram if os.path.isdir(ram) and shutil.disk_usage(ram).free > 24e9 else None


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variant", choices=("4B", "9B"), default="4B")
    parser.add_argument("--seconds", type=float, default=420.0, help="for all of it; the last sections are left out")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file, as it comes")
    parser.add_argument("--only", default="", help=f"steps, separated by commas: {', '.join(STEPS)}")
    parser.add_argument("--smoke", action="store_true", help="toys on the CPU")
    return parser.parse_args()


def _stop(*_: object) -> None:
    sys.exit(1)


def main(settings: Settings) -> Run:
    """Run the steps that the settings ask for, and print the tables."""
    run = Run(settings)
    try:
        run.run()
    finally:
        print(markdown(run.found, run.lines), flush=True)
    return run


if __name__ == "__main__":
    asked = arguments()
    signal.signal(signal.SIGTERM, _stop)
    wanted = Settings.smoke() if asked.smoke else Settings(asked.variant, seconds=asked.seconds)
    only = tuple(name.strip() for name in asked.only.split(",") if name.strip())
    main(replace(wanted, json=asked.json, only=only))
