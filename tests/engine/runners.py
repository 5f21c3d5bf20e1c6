"""Toy models with a runner, and a compiler that compiles nothing."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from engine.contract import Exact, Job, Result
from engine.families.klein import compiler as compiler_module
from engine.families.klein.compiler import CompileOptions
from engine.families.klein.pipeline import Klein
from engine.families.klein.transformer import PLAIN_BLOCKS
from engine.memory.device import Device
from tests.bench.full_size_models import GIANTS, grown, ours

TOY = replace(GIANTS["toy"], variant=replace(GIANTS["toy"].variant, native_size=256))
"""Native images are small, since a GPU's warm-up makes some: at 1024² it took 16 s of each test."""
CPU = Device.choose("cpu", "float32")
EVERYWHERE = CompileOptions(enabled=True, backend="eager", everywhere=True)
JOB = Job("a lighthouse", size=Exact(64, 80), seed=3)


def make(options: CompileOptions = EVERYWHERE) -> Klein:
    return ours(grown(TOY, CPU), TOY, CPU, options=options)


def generate(klein: Klein, job: Job = JOB) -> Result:
    *_, result = klein.run(job)
    assert isinstance(result, Result)
    return result


class InstantCompiler:
    """Stands for the compiler: the plain functions under another name, at once or when `gate` opens."""

    gate = threading.Event()
    error: Exception | None = None

    def __init__(self, variant: Any, transformer: Any, autoencoder: Any, device: Device, options: Any) -> None:
        self.blocks, self.autoencoder = PLAIN_BLOCKS, autoencoder
        self.compiled = compiler_module.Compiled(PLAIN_BLOCKS, autoencoder.decode, autoencoder.encode)

    def parts(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        yield "blocks", self._compile

    def _compile(self) -> None:
        assert self.gate.wait(60)
        if self.error is not None:
            raise self.error


def tune(klein: Klein) -> None:
    while klein.runner.tune():
        pass
