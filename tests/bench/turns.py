"""Alternating timings of several implementations: A, B, C, C, B, A.

Other load then slows all of them equally.
"""

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
    """An implementation to time.

    paint: from the request to pixels on the host. finish: the rest of the answer, such as PNG bytes.
    """

    paint: Callable[[Ask], Any]
    finish: Callable[[Any], object] = lambda picture: picture


@dataclass(frozen=True, slots=True)
class Laps:
    """Times of each image in milliseconds.

    wall: to the end of the answer. device: to the pixels.
    The device's clock is the GPU's own events; without a GPU it is the wall's.
    working: peak bytes allocated in addition to those before; 0 without a GPU.
    """

    wall: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)
    working: list[int] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.wall)


class Stopwatch:
    """Times one image by wall clock and device clock.

    A host that cannot keep up becomes visible.
    """

    def __init__(self, placement: Device) -> None:
        self.placement = placement
        self.gpu = placement.device.type == "cuda"

    def time(self, side: Side, ask: Ask, laps: Laps) -> None:
        """Generate an image and record its times."""
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
        """Return the allocated bytes and reset the peak."""
        self.placement.sync()
        if not self.gpu:
            return 0
        torch.cuda.reset_peak_memory_stats(self.placement.device)
        return torch.cuda.memory_allocated(self.placement.device)


@dataclass(frozen=True, slots=True)
class Pace:
    """Number of timed runs.

    Warm-ups come first, then at most `rounds` double turns, as `seconds` allow.
    """

    warm: int = 3
    rounds: int = 8


PACE = Pace()
"""16 images a side."""


def in_turns(
    sides: Mapping[str, Side], asks: Iterator[Ask], watch: Stopwatch, pace: Pace, seconds: float
) -> dict[str, Laps]:
    """Time all sides in turns and return the laps of each.

    All sides get the same requests, a new one in every turn.
    """
    begun = time.perf_counter()
    for _ in range(pace.warm):
        ask = next(asks)
        for side in sides.values():
            watch.time(side, ask, Laps())
    laps = {name: Laps() for name in sides}
    longest = 0.0
    for number in range(pace.rounds):
        start = time.perf_counter()
        if number and start - begun + longest > seconds:
            break
        for order in (tuple(sides), tuple(reversed(tuple(sides)))):
            ask = next(asks)
            for name in order:
                watch.time(sides[name], ask, laps[name])
        longest = max(longest, time.perf_counter() - start)
    return laps
