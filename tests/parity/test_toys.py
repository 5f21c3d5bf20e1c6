"""The toys are worth comparing: their pictures are neither saturated nor blind to any input."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.contract import Job, Rgb8
from engine.engine import Engine
from tests.parity.conftest import CASES, noise_picture, paint

COMPOSE = CASES["compose, three references"]


@pytest.mark.parametrize("name", CASES)
def test_pictures_do_not_saturate(name: str, official: Callable[[str], Rgb8]) -> None:
    picture = official(name)
    # Observed: at most 0.020 at the ends, spread at least 41.
    assert np.isin(picture, (0, 255)).mean() < 0.05
    assert picture.std() > 20


@pytest.mark.parametrize("kind", ["distilled", "kv"])
def test_every_input_shows_in_the_picture(kind: str, toy: Callable[[str], Path], engine: Engine) -> None:
    job = COMPOSE.job(toy(kind))
    first, second, third = job.references
    before = paint(engine, job).image.astype(int)
    changed = {
        "prompt": replace(job, prompt=job.prompt + " and rain"),
        "seed": replace(job, seed=job.seed + 1),
        "steps": replace(job, steps=5),
        "one reference": replace(job, references=(first, second, noise_picture(130, 75, 99))),
        "order of references": replace(job, references=(second, first, third)),
        "number of references": replace(job, references=(first, second)),
    }
    for what, other in changed.items():
        difference = np.abs(paint(engine, other).image.astype(int) - before).mean()
        # Observed: at least 1.01 (order of references, kv); a tolerance of 1 on 0.1 % of values cannot hide it.
        assert difference > 0.7, f"{what} hardly shows: {difference:.3f}"


def test_guidance_shows_in_the_picture(toy: Callable[[str], Path], engine: Engine) -> None:
    job = CASES["base, guidance 4 and 6 steps"].job(toy("base"))
    painted: list[np.ndarray] = [paint(engine, _with(job, g)).image.astype(int) for g in (1.0, 4.0)]
    assert np.abs(painted[0] - painted[1]).mean() > 5  # observed 14.3


def _with(job: Job, guidance: float) -> Job:
    return replace(job, guidance=guidance)
