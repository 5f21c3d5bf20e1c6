"""Scenarios that both sides are asked for, and the ratios aimed at."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from engine.contract import Rgb8

if TYPE_CHECKING:  # the tables need no models
    from tests.bench.full_size_models import Giant


@dataclass(frozen=True, slots=True)
class Scenario:
    """A kind of request that both sides are timed on.

    known: the references were used before. compiled: also time compiled diffusers.
    """

    name: str
    references: int = 0
    known: bool = False
    new_prompt: bool = True
    kv: bool = False
    small: bool = False
    compiled: bool = True

    def side(self, giant: "Giant") -> int:
        """Return the side of the image in pixels."""
        return giant.small if self.small else giant.large


SCENARIOS = (
    Scenario("text-to-image, new prompt"),
    Scenario("edit, one new reference", references=1),
    Scenario("text-to-image, new prompt, half the side", small=True),
    Scenario("edit again, known reference, new prompt", references=1, known=True),
    Scenario("compose, four new references", references=4),
    Scenario("new seed only", new_prompt=False, compiled=False),
    Scenario("KV: edit again, known reference, new prompt", references=1, known=True, kv=True, compiled=False),
    Scenario("KV: compose, four known references, new prompt", references=4, known=True, kv=True, compiled=False),
)
"""In the order of their value: where time is short, the last ones are left out."""
FIRST, EDIT, HALF, AGAIN, FOUR = SCENARIOS[:5]


@dataclass(frozen=True, slots=True)
class Target:
    """Highest allowed ratios of our time.

    They are relative to the minimum time, to eager diffusers and to compiled diffusers.
    """

    floor: float | None = None
    eager: float | None = None
    compiled: float | None = None


NONE = Target()
TARGETS: dict[str, dict[str, Target]] = {
    "4B": {
        "text-to-image, new prompt": Target(1.35, 0.62, 0.88),
        "text-to-image, new prompt, half the side": Target(1.40, 0.55, 0.85),
        "edit, one new reference": Target(1.30, 0.66, 0.88),
        "edit again, known reference, new prompt": Target(1.28, 0.62, 0.85),
        "compose, four new references": Target(1.30, 0.80, 0.92),
    },
}
"""In bf16 on an H200. Origin: the parts measured one by one on such a card, 26 November 2026, see engine/SPEED.md."""

FP8_TO_BF16, STATIC_TO_BF16, FP8_TO_EAGER = 0.80, 0.75, 0.50
"""Text-to-image in fp8, of ours in bf16 (scales computed, scales of the file) and of diffusers eager."""
FIRST_TO_WARM = 1.3
"""The first image after the model is ready, of the warm median: no tuning or planning hidden in a user's images."""
DRIFT = 1.1
"""Error against fp32, of diffusers' own error in the same number format."""
LIMIT = 1.03
"""Memory of the whole card, of the limit."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Request for one image, with references as decoded pixels."""

    prompt: str
    seed: int
    references: tuple[Rgb8, ...]
    side: int


def asks(scenario: Scenario, giant: "Giant") -> Iterator[Ask]:
    """Yield requests that differ only in what the scenario calls new.

    The first request introduces the known references.
    """
    side, count = scenario.side(giant), scenario.references
    known = _images(giant, count, of=0)
    number = 0
    while True:
        references = known if scenario.known else _images(giant, count, of=1 + number)
        prompt = f"{scenario.name}, {number if scenario.new_prompt else 'always'}"
        yield Ask(prompt, number, references, side)
        number += 1


def _images(giant: "Giant", count: int, of: int) -> tuple[Rgb8, ...]:
    shape = (giant.reference, giant.reference, 3)
    return tuple(np.random.default_rng((of, i)).integers(0, 256, shape, dtype=np.uint8) for i in range(count))
