"""Times jobs that arrive while one part of a model is compiled with an empty disk cache.

    python -m tests.bench.jobs_meanwhile VARIANT PART [--seconds 12] [--backend NAME] [--wait]

Each job is followed by the same job with compiling paused well before it: what else the machine does then slows both.
Prints one line of JSON. PART: blocks, decoder or encoder. --wait: ask the parent for a turn twice, before the model is
made and before the timing.
"""

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from engine.families.klein import runner as runner_module
from engine.families.klein.compiler import CompileOptions, Compiler
from engine.families.klein.pipeline import Klein
from tests.bench import attention
from tests.bench.children import say, wait_for_go
from tests.bench.full_size_models import GIANTS, Giant, device_of, grown, ours
from tests.bench.scenarios import HALF, asks
from tests.bench.sides import engine_side
from tests.bench.turns import Laps, Stopwatch

PARTS = ("blocks", "decoder", "encoder")
GAP = 0.4
"""Seconds of compiling between two jobs, and of standing still before a job alone."""


def only(part: str) -> type[Compiler]:
    """Return a compiler of this part alone, so that each can be measured without the others before it."""

    class OnlyCompiler(Compiler):
        def parts(self) -> Iterator[tuple[str, Any]]:
            return ((name, work) for name, work in super().parts() if name == part)

    return OnlyCompiler


def make_model(giant: Giant, part: str, backend: str, cache: Path) -> Klein:
    """Create the model, untuned, and make its first images."""
    device = device_of(giant)
    attention.settle()
    runner_module.Compiler = only(part)
    options = CompileOptions(True, cache, backend, everywhere=not device.is_cuda)
    klein = ours(grown(giant, device), giant, device, options=options)
    asked = asks(HALF, giant)
    for _ in range(3):
        engine_side(klein, "eager").paint(next(asked))
    return klein


def measure(klein: Klein, giant: Giant, seconds: float) -> dict[str, Any]:
    """Tune and run jobs in turns, until all is compiled or the time is over."""
    watch, side, asked = Stopwatch(device_of(giant)), engine_side(klein, "eager"), asks(HALF, giant)
    during, alone, pieces = Laps(), Laps(), []
    more, deadline, tuner = True, time.perf_counter() + seconds, klein.runner
    while more and time.perf_counter() < deadline:
        next_job = time.perf_counter() + GAP
        while more and time.perf_counter() < next_job:
            begun = time.perf_counter()
            more = tuner.tune()
            pieces.append(1000 * (time.perf_counter() - begun))
        if not more and during.wall:
            break
        watch.time(side, next(asked), during)
        with tuner.job():
            time.sleep(GAP / 2)
            watch.time(side, next(asked), alone)
    return {
        "during, ms": [round(ms, 1) for ms in during.wall],
        "alone, ms": [round(ms, 1) for ms in alone.wall],
        "median during": round(statistics.median(during.wall), 1),
        "median alone": round(statistics.median(alone.wall), 1),
        "ratio": round(statistics.median(during.wall) / statistics.median(alone.wall), 3),
        "longest piece, ms": round(max(pieces), 1),
        "finished": not more,
        "summary": tuner.summary(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.bench.jobs_meanwhile")
    parser.add_argument("variant", choices=tuple(GIANTS))
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--wait", action="store_true")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    if asked.wait:
        wait_for_go()
    with tempfile.TemporaryDirectory(prefix="klein-bench-") as cache, torch.no_grad():
        klein = make_model(GIANTS[asked.variant], asked.part, asked.backend, Path(cache))
        seconds = min(asked.seconds, wait_for_go() - time.time()) if asked.wait else asked.seconds
        say(f"jobs during {asked.part}", measure(klein, GIANTS[asked.variant], seconds))
    # The compiling thread may be in the middle of its work, which would delay an ordinary end.
    os._exit(0)
