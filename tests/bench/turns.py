"""Several ways of doing the same thing, timed in turns: A, B, C, C, B, A. What slows the machine down slows all."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from engine.memory.device import Device
from tests.bench.scenarios import Ask


@dataclass(frozen=True, slots=True)
class Side:
    """paint: from what is asked to pixels on the host. finish: what else belongs to the answer, such as PNG bytes."""

    paint: Callable[[Ask], Any]
    finish: Callable[[Any], object] = lambda picture: picture


@dataclass(frozen=True, slots=True)
class Laps:
    """One number of each a picture, in milliseconds: wall, to the end of the answer; device, to the pixels.

    The device's clock is the GPU's own events; without a GPU it is the wall's.
    working: bytes taken beside what was there before, at the most; 0 where there is no GPU to ask.
    """

    wall: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)
    working: list[int] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.wall)


class Stopwatch:
    """Times one picture by two clocks, so that a host that cannot keep up shows."""

    def __init__(self, placement: Device) -> None:
        self.placement = placement
        self.gpu = placement.device.type == "cuda"

    def time(self, side: Side, ask: Ask, laps: Laps) -> None:
        """Paint, and note what it took."""
        before = self._memory()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self.gpu else []
        start = time.perf_counter()
        if events:
            events[0].record()
        picture = side.paint(ask)
        if events:
            events[1].record()
        painted = time.perf_counter()
        side.finish(picture)
        laps.wall.append(1000 * (time.perf_counter() - start))
        self.placement.sync()
        laps.device.append(events[0].elapsed_time(events[1]) if events else 1000 * (painted - start))
        laps.working.append(torch.cuda.max_memory_allocated(self.placement.device) - before if self.gpu else 0)

    def _memory(self) -> int:
        """Bytes held now; what is held at the most is watched from here on."""
        self.placement.sync()
        if not self.gpu:
            return 0
        torch.cuda.reset_peak_memory_stats(self.placement.device)
        return torch.cuda.memory_allocated(self.placement.device)


@dataclass(frozen=True, slots=True)
class Pace:
    """How often: warm-ups before the clock starts, then at most `rounds` double turns, as `seconds` allow."""

    warm: int = 3
    rounds: int = 8


PACE = Pace()
"""16 pictures a side."""


def in_turns(
    sides: Mapping[str, Side], asks: Iterator[Ask], watch: Stopwatch, pace: Pace, seconds: float
) -> dict[str, Laps]:
    """Laps of each side; every side is asked the same, and in every turn something new."""
    begun = time.perf_counter()
    turn = 0.0
    for _ in range(pace.warm):
        ask, start = next(asks), time.perf_counter()
        for side in sides.values():
            watch.time(side, ask, Laps())
        turn = time.perf_counter() - start
    left = seconds - (time.perf_counter() - begun)
    rounds = max(1, min(pace.rounds, int(left / (2 * turn))))
    laps = {name: Laps() for name in sides}
    for _ in range(rounds):
        for order in (tuple(sides), tuple(reversed(tuple(sides)))):
            ask = next(asks)
            for name in order:
                watch.time(sides[name], ask, laps[name])
    return laps
