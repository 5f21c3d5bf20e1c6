"""Compiles one part of a model into the disk cache that the timed process reads.

    python -m tests.bench.fill_cache VARIANT FOLDER NAME [--backend NAME]

Only the number of blocks differs from the true model: all blocks are one program. Several parts are compiled at once,
each in its own process. NAME: a key of PARTS.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.families.klein.compiler import CompileOptions, Compiler
from engine.memory.device import Device
from tests.bench import attention
from tests.bench.children import say
from tests.bench.fp8_models import in_fp8, quantise_pipeline
from tests.bench.full_size_models import GIANTS, Giant, compile_parts, device_of, diffusers, grown, ours
from tests.bench.scenarios import EDIT, FIRST, FOUR, HALF, Scenario, asks
from tests.bench.sides import pipeline_side


@dataclass(frozen=True, slots=True)
class Model:
    """A model of few blocks, and the compiler for it."""

    giant: Giant
    device: Device
    options: CompileOptions


def compile_ours(model: Model, *names: str, fp8: bool = False) -> None:
    """Compile these parts of our networks."""
    nets = grown(model.giant, model.device)
    for static in (False, True) if fp8 else (False,):
        own = in_fp8(nets, static=static) if fp8 else nets
        # The model also chooses the operations that are compiled.
        klein = ours(own, model.giant, model.device, options=model.options)
        compiler = Compiler(klein.variant, own.transformer, own.autoencoder, model.device, model.options)
        for name, compile_part in compiler.parts():
            if name in names:
                compile_part()


def compile_theirs(model: Model, *parts: str, scenarios: tuple[Scenario, ...], fp8: bool = False) -> None:
    """Compile these parts of diffusers' pipeline by making an image of each scenario."""
    pipe = diffusers(grown(model.giant, model.device), model.giant, model.device)
    compile_parts(quantise_pipeline(pipe) if fp8 else pipe, model.options.backend, parts)
    for scenario in scenarios:
        pipeline_side(pipe, model.giant).paint(next(asks(scenario, model.giant)))


PARTS: dict[str, Callable[[Model], None]] = {
    "ours decoder": lambda model: compile_ours(model, "decoder"),
    "ours encoder": lambda model: compile_ours(model, "encoder"),
    "ours blocks": lambda model: compile_ours(model, "blocks"),
    "ours fp8 blocks": lambda model: compile_ours(model, "blocks", fp8=True),
    "diffusers blocks": lambda model: compile_theirs(model, "blocks", scenarios=(FIRST, HALF)),
    "diffusers blocks with references": lambda model: compile_theirs(model, "blocks", scenarios=(EDIT, FOUR)),
    "diffusers fp8 blocks": lambda model: compile_theirs(model, "blocks", scenarios=(FIRST,), fp8=True),
    "diffusers decoder": lambda model: compile_theirs(model, "decoder", scenarios=(FIRST,)),
    "diffusers decoder, small": lambda model: compile_theirs(model, "decoder", scenarios=(HALF,)),
    "diffusers encoder": lambda model: compile_theirs(model, "encoder", scenarios=(EDIT,)),
}
"""The longest first."""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.bench.fill_cache")
    parser.add_argument("variant", choices=tuple(GIANTS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("name", choices=tuple(PARTS))
    parser.add_argument("--backend", default="inductor")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    giant = GIANTS[asked.variant]
    device = device_of(giant)
    options = CompileOptions(True, asked.folder, asked.backend, everywhere=not device.is_cuda)
    attention.settle()
    begun = time.perf_counter()
    with torch.no_grad():
        PARTS[asked.name](Model(giant.cut(), device, options))
        device.sync()
    say(f"compile {asked.name}", {"s": round(time.perf_counter() - begun, 1)})
