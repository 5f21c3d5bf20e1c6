"""A real daemon process around a painter that needs no model: `python -m tests.klein_mcp.fake_daemon`.

The prompt says what the painter does: `steps=8 pause=0.05 load=2 crash=3 fail`; with crash=3 the process dies after
step 3, with load=2 it loads for two seconds.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator

import numpy as np

from engine.contract import EngineStatus, Event, InvalidJob, Job, Loading, Result, Stage, Step
from klein_mcp.settings import Settings

COMMAND = (sys.executable, "-m", "tests.klein_mcp.fake_daemon")


class FakePainter:
    def __init__(self) -> None:
        self.loaded = False
        self.released = 0

    def run(self, job: Job) -> Iterator[Event]:
        orders = dict(word.split("=", 1) for word in job.prompt.split() if "=" in word)
        steps, pause = int(orders.get("steps", 4)), float(orders.get("pause", 0))
        if "fail" in job.prompt.split():
            raise InvalidJob("You asked me to fail.", hint="Ask for something else.")
        if not self.loaded:
            for part in range(3):
                yield Loading("fake", part / 2)
                time.sleep(float(orders.get("load", 0)) / 3)
            self.loaded = True
        yield Stage("prompt")
        if job.references:
            yield Stage("references")
        yield Stage("denoise")
        for step in range(1, steps + 1):
            time.sleep(pause)
            yield Step(step, steps)
            if step == int(orders.get("crash", 0)):
                os.kill(os.getpid(), signal.SIGKILL)
        yield Stage("decode")
        width, height = job.width or 64, job.height or 64
        pixels = np.random.default_rng(job.seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        yield Result(pixels, job.seed, "fake", "0" * 16, steps, 1.0, ms={"denoise": 1000 * pause * steps})

    def status(self) -> EngineStatus:
        loaded = "fake" if self.loaded else None
        return EngineStatus("cpu", "float32", 1, 0, loaded, placement=f"released {self.released}×")

    def prefetch(self) -> bool:
        return False

    def release(self) -> None:
        self.loaded = False
        self.released += 1


def make(settings: Settings) -> FakePainter:
    if settings.device == "broken":
        raise InvalidJob("There is no such device.", hint="Set KLEIN_DEVICE.")
    return FakePainter()


if __name__ == "__main__":
    from klein_mcp.daemon.__main__ import main

    code = main(make)
    sys.stderr.flush()
    os._exit(code)
