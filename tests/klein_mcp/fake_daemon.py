"""A real daemon process around an executor that needs no model: `python -m tests.klein_mcp.fake_daemon`.

The prompt says what the executor does: `steps=8 pause=0.05 load=2 crash=3 fail texture`; with crash=3 the process dies
after step 3, with load=2 it loads for two seconds, with texture the image is a photograph's noise, not random bytes.
The file LOST in the data folder makes the process that finds it lose its device; the prompt `lose` makes any.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from engine.contract import (
    DeviceLost,
    EngineStatus,
    Event,
    Exact,
    InvalidJob,
    Job,
    KeepSource,
    Loading,
    Result,
    Rgb8,
    Stage,
    Step,
)
from klein_mcp.jobs.executor import nobody_watches
from klein_mcp.settings import Settings

COMMAND = (sys.executable, "-m", "tests.klein_mcp.fake_daemon")

LOST = "device-lost"


class ScriptedExecutor:
    slots = 1

    def __init__(self, home: Path) -> None:
        self.loaded = False
        self._lost, self._loses = False, home / LOST

    def run(self, job: Job, watched: Callable[[], bool] = nobody_watches) -> Iterator[Event]:
        options = dict(word.split("=", 1) for word in job.prompt.split() if "=" in word)
        steps, pause = int(options.get("steps", 4)), float(options.get("pause", 0))
        if "fail" in job.prompt.split():
            raise InvalidJob("You asked me to fail.", hint="Ask for something else.")
        if not self.loaded:
            for part in range(3):
                yield Loading("fake", part / 2)
                time.sleep(float(options.get("load", 0)) / 3)
            self.loaded = True
        yield Stage("prompt")
        if job.references:
            yield Stage("references")
        yield Stage("denoise")
        for step in range(1, steps + 1):
            time.sleep(pause)
            if self._loses.exists():
                self._loses.unlink()
                self._lost = True
            if self._lost or "lose" in job.prompt.split():
                raise DeviceLost("The GPU no longer answers.")
            seen = np.zeros((8, 8, 3), np.uint8)
            yield Step(step, steps, seen if watched() else None, seen if job.partials else None)
            if step == int(options.get("crash", 0)):
                os.kill(os.getpid(), signal.SIGKILL)
        yield Stage("decode")
        width, height = (job.size.width, job.size.height) if isinstance(job.size, Exact) else (64, 64)
        if isinstance(job.size, KeepSource):
            height, width = job.references[0].shape[:2]
        image = texture(width, height) if "texture" in job.prompt.split() else noise(width, height, job.seed)
        yield Result(image, job.seed, "fake", "0" * 16, steps, 1.0, ms={"denoise": 1000 * pause * steps})

    def status(self) -> EngineStatus:
        return EngineStatus("cpu", "float32", 1, 10**9, "fake" if self.loaded else None)

    def prefetch(self, image: Rgb8) -> bool:
        return False

    def release(self) -> None:
        self.loaded = False


def noise(width: int, height: int, seed: int) -> Rgb8:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@lru_cache
def texture(width: int, height: int) -> Rgb8:
    """Gradients with the noise of a camera: a PNG of 2.0 MB at 1024², as a photograph of grass or cloth."""
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([x * 255 / width, y * 255 / height, (x + y) * 127 / (width + height)], axis=-1)
    grain = np.random.default_rng(0).normal(0, 8, (height, width, 3))
    return np.clip(base + grain, 0, 255).astype(np.uint8)


def make(settings: Settings) -> ScriptedExecutor:
    if settings.device == "broken":
        raise InvalidJob("There is no such device.", hint="Set KLEIN_DEVICE.")
    return ScriptedExecutor(settings.home)


if __name__ == "__main__":
    from klein_mcp.daemon.__main__ import main

    code = main(make)
    sys.stderr.flush()
    os._exit(code)
