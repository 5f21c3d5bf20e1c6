"""One toy of each kind, and the pictures diffusers paints with it, made once for all parity tests."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine.contract import EngineConfig, Exact, Job, Result, Rgb8
from engine.engine import Engine
from tests import toys

PROMPT = "a lighthouse of brass, seen from below, in evening light"


def noise_picture(width: int, height: int, seed: int) -> Rgb8:
    """Something with structure at several scales, no two alike."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 5, 3), dtype=np.uint8)).resize((width, height))
    fine = rng.integers(-25, 26, (height, width, 3))
    return np.clip(np.asarray(coarse).astype(int) + fine, 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Case:
    """One job, as both sides are asked for it."""

    toy: str
    references: tuple[tuple[int, int], ...] = ()
    size: tuple[int, int] | None = (80, 64)
    steps: int = 4
    guidance: float = 1.0
    seed: int = 7

    def pictures(self) -> tuple[Rgb8, ...]:
        return tuple(noise_picture(w, h, i) for i, (w, h) in enumerate(self.references))

    def job(self, folder: Path, **changes: Any) -> Job:
        size = {} if self.size is None else {"size": Exact(*self.size)}
        guidance = {} if self.guidance == 1.0 else {"guidance": self.guidance}
        whole = {
            "prompt": PROMPT, "references": self.pictures(), "seed": self.seed, "steps": self.steps,
            "model": str(folder), **size, **guidance, **changes,
        }  # fmt: skip
        return Job(**whole)


CASES = {
    "text to image": Case("distilled"),
    "edit, one reference of odd size": Case("distilled", ((83, 101),), size=None),
    "compose, three references": Case("distilled", ((64, 80), (97, 66), (130, 75))),
    "base, guidance 4 and 6 steps": Case("base", steps=6, guidance=4.0),
    "base, guidance 4 with a reference": Case("base", ((70, 90),), steps=3, guidance=4.0),
    "kv, text to image": Case("kv"),
    "kv, two references": Case("kv", ((83, 101), (96, 64))),
    "five levels, text to image": Case("five levels", size=(96, 64)),
    "five levels, one reference of odd size": Case("five levels", ((83, 101),), size=None),
    "five levels, kv, two references": Case("five levels, kv", ((83, 101), (96, 64)), size=(64, 96)),
}


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a toy: "distilled", "base", "kv" or, of 32 pixels a token, "five levels"."""
    home, made = tmp_path_factory.mktemp("toys"), {}
    kinds = {
        "distilled": {}, "base": {"distilled": False}, "kv": {"kv": True},
        "five levels": {"levels": 5}, "five levels, kv": {"levels": 5, "kv": True},
    }  # fmt: skip

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = toys.save(home / kind, **kinds[kind])
        return made[kind]

    return get


@pytest.fixture(scope="session")
def official(toy: Callable[[str], Path]) -> Callable[[str], Rgb8]:
    """The picture diffusers paints for a case."""
    pipes: dict[str, Any] = {}
    painted: dict[str, Rgb8] = {}

    def paint(name: str) -> Rgb8:
        if name not in painted:
            painted[name] = _diffusers(pipes, toy, CASES[name])
        return painted[name]

    return paint


def _diffusers(pipes: dict[str, Any], toy: Callable[[str], Path], case: Case) -> Rgb8:
    from diffusers import DiffusionPipeline

    if case.toy not in pipes:
        pipes[case.toy] = DiffusionPipeline.from_pretrained(toy(case.toy))
        pipes[case.toy].set_progress_bar_config(disable=True)
    size = {} if case.size is None else {"width": case.size[0], "height": case.size[1]}
    guidance = {} if case.toy.endswith("kv") else {"guidance_scale": case.guidance}
    picture = pipes[case.toy](
        prompt=PROMPT,
        image=[Image.fromarray(p) for p in case.pictures()] or None,
        num_inference_steps=case.steps,
        generator=torch.Generator().manual_seed(case.seed),
        **size,
        **guidance,
    ).images[0]
    return np.asarray(picture)


@pytest.fixture(scope="session")
def engine() -> Engine:
    """Ours, in fp32 on the CPU, remembering nothing: every case is a cold run."""
    return Engine(EngineConfig(device="cpu", dtype="float32", cache_bytes=0))


def paint(engine: Any, job: Job) -> Result:
    """The last event of a job."""
    *_, painting = engine.run(job)
    return painting


def agreement(a: Rgb8, b: Rgb8) -> tuple[float, int]:
    """Share of equal values, and the largest difference."""
    difference = np.abs(a.astype(int) - b.astype(int))
    return float((difference == 0).mean()), int(difference.max())
