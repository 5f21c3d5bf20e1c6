"""Peak rates of this machine, measured.

They are those of matrix products and of memory; a data sheet is not used.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.memory.device import Device

MATRIX = 8192
COPY = 4 << 30
"""Bytes; far more than any cache."""
ROUNDS = 20


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Peak rates per second.

    flops: of matrix products in the model's number format. bandwidth: bytes read plus written.
    """

    flops: float
    bandwidth: float

    def seconds(self, flop: float, bytes_: float) -> float:
        """Return the minimum time for this work.

        Arithmetic and memory run at their peak rates, in parallel.
        """
        return max(flop / self.flops, bytes_ / self.bandwidth)


def measure(placement: Device, *, matrix: int = MATRIX, copy: int = COPY, rounds: int = ROUNDS) -> Ceilings:
    """Measure the medians of sustained runs.

    A burst of one millisecond is not a rate that seconds of generation can reach.
    """
    where = {"device": placement.device, "dtype": placement.dtype}
    a, b = torch.randn(matrix, matrix, **where), torch.randn(matrix, matrix, **where)
    product = torch.empty_like(a)
    source = torch.randn(copy // placement.dtype.itemsize, **where)
    target = torch.empty_like(source)
    return Ceilings(
        flops=2 * matrix**3 / _seconds(lambda: torch.mm(a, b, out=product), placement, rounds),
        bandwidth=2 * source.nbytes / _seconds(lambda: target.copy_(source), placement, rounds),
    )


def _seconds(do: Callable[[], object], placement: Device, rounds: int) -> float:
    times = []
    for _ in range(3 + rounds):
        placement.sync()
        start = time.perf_counter()
        # Several at a time, so that the latency of launch and synchronisation does not count.
        for _ in range(4):
            do()
        placement.sync()
        times.append((time.perf_counter() - start) / 4)
    return statistics.median(times[3:])
