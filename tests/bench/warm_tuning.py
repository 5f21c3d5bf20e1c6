"""Tunes a model in a process of its own, whose disk cache another process has filled.

    python -m tests.bench.warm_tuning VARIANT FOLDER [--backend NAME]

VARIANT: 4B, 9B or toy. FOLDER: the compilers' disk cache. Prints one line of JSON.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from engine.families.klein.runner import CompileOptions
from engine.memory.device import Device
from tests.bench.full_size_models import GIANTS, Giant, grown, ours
from tests.bench.scenarios import FIRST, asks
from tests.bench.sides import engine_side
from tests.bench.turns import Laps, Stopwatch


def measure(giant: Giant, device: Device, options: CompileOptions) -> dict[str, Any]:
    """Tune with nothing to do beside it, then make two images."""
    klein = ours(grown(giant, device), giant, device, options=options)
    device.sync()
    start = time.perf_counter()
    while klein.runner.tune():
        pass
    tuned, laps, watch = time.perf_counter() - start, Laps(), Stopwatch(device)
    asked = asks(FIRST, giant)
    for _ in range(2):
        watch.time(engine_side(klein), next(asked), laps)
    return {
        "s": round(tuned, 2),
        "parts, s": {name: round(seconds, 2) for name, seconds in klein.runner.seconds.items()},
        "first images after ready, ms": [round(ms, 1) for ms in laps.wall],
        "summary": klein.runner.summary(),
        "mode": klein.runner.mode,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.bench.warm_tuning")
    parser.add_argument("variant", choices=tuple(GIANTS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--backend", default="inductor")
    asked = parser.parse_args()
    toy = asked.variant == "toy"
    device = Device.choose("cpu", "float32") if toy else Device.choose()
    options = CompileOptions(True, asked.folder, asked.backend, everywhere=not device.is_cuda)
    with torch.no_grad():
        print(json.dumps(measure(GIANTS[asked.variant], device, options)), flush=True)
