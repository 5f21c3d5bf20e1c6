"""Error of bf16 against fp32, for our engine and diffusers.

Both use the same random weights, with few layers of full width.
"""

from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from engine.contract import Rgb8
from engine.memory.device import Device
from tests.bench.full_size_models import Giant, Nets, cast, diffusers, finite, grown, ours
from tests.bench.scenarios import EDIT, asks
from tests.bench.sides import engine_side, pipeline_side

SAME = 2
"""Levels of 255 by which two correct implementations may differ in fp32: 1 by rounding (observed), 1 spare."""
LOW = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Drift:
    """Root mean square errors against diffusers in fp32, in levels of 255.

    same: the largest difference in fp32.
    """

    ours: float
    theirs: float
    same: int

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs


@torch.inference_mode()
def measure(giant: Giant, device: torch.device, pictures: int = 3) -> Drift:
    """Measure the errors over a few images.

    Raises AssertionError if the two sides do not compute the same in fp32.
    """
    cut = giant.cut()
    exact, low = Device(device, torch.float32), Device(device, LOW)
    # TF32 would make the oracle as inexact as what it judges.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        nets = grown(cut, exact)
        wanted, same = _agreed(nets, cut, exact, pictures)
        _, same_kv = _agreed(nets, cut, exact, 1, kv=True)
    nets = cast(nets, cut, low)
    sides = (engine_side(ours(nets, cut, low, remember=0)), pipeline_side(diffusers(nets, cut, low), cut))
    errors = [
        [_error(side.paint(ask), right) for ask, right in zip(asks(EDIT, cut), wanted, strict=False)] for side in sides
    ]
    return Drift(*(float(np.sqrt(np.mean(np.square(error)))) for error in errors), same=max(same, same_kv))


def _agreed(nets: Nets, cut: Giant, exact: Device, count: int, *, kv: bool = False) -> tuple[list[Rgb8], int]:
    """Return diffusers' images and the largest difference from ours, in levels."""
    klein = ours(nets, cut, exact, kv=kv, remember=0)
    mine, oracle = engine_side(klein), pipeline_side(diffusers(nets, cut, exact, kv=kv), cut)
    wanted = [oracle.paint(ask) for ask in islice(asks(EDIT, cut), count)]
    with finite(klein):
        found = [mine.paint(ask) for ask in islice(asks(EDIT, cut), count)]
    same = max(int(np.abs(_levels(a) - _levels(b)).max()) for a, b in zip(wanted, found, strict=True))
    assert same <= SAME, f"in fp32 the images differ by {same} levels: the two sides do not compute the same"
    return wanted, same


def _levels(picture: Rgb8) -> np.ndarray:
    return np.asarray(picture).astype(np.float64)


def _error(picture: Rgb8, right: Rgb8) -> float:
    return float(np.sqrt(np.mean((_levels(picture) - _levels(right)) ** 2)))
