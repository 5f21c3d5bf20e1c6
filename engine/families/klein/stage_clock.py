"""Time of a job's stages, and the pauses between their parts.

A job can be stopped at a pause.
"""

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import TypeVar

from engine.contract import Event, StageName
from engine.diffusion.parts import Parts
from engine.memory.device import Device

T = TypeVar("T")

PAUSE = 0.1
"""Seconds of a step after which a job can be stopped between two of its blocks. Fast machines finish the step first."""


class StageClock:
    """Milliseconds of wall time by stage."""

    def __init__(self, device: Device) -> None:
        self.ms: dict[str, float] = {}
        self._device = device

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._device.sync()
        self.ms[stage] = round(self.ms.get(stage, 0.0) + 1000 * (time.perf_counter() - start), 1)

    def parts(
        self, stage: StageName, parts: Parts[T], event: Callable[[StageName, float], Event], pause: float | None = None
    ) -> Generator[Event, None, T]:
        """Do the parts of a stage and yield events between them.

        event: makes one of the share that is done. pause: seconds between two events at least.
        """
        pause = PAUSE if pause is None else pause
        begun = time.monotonic()
        while True:
            with self(stage):
                try:
                    share = next(parts)
                except StopIteration as end:
                    return end.value
            if time.monotonic() - begun >= pause:
                yield event(stage, share)
                begun = time.monotonic()
