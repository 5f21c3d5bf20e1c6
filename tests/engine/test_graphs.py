"""CUDA graphs of steps and texts: the same bits, counted memory, and no harm where they fail."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.contract import Exact
from engine.families.klein import runner as runner_module
from engine.families.klein.pipeline import Klein
from engine.families.klein.runner import MAX_GRAPHS, Runner
from engine.memory.offload import CpuEmbedding
from tests.engine.graphs import FakeGraph, as_on_a_gpu
from tests.engine.runners import CPU, JOB, InstantCompiler, generate, make, tune


def compiled(compiler: type[InstantCompiler], monkeypatch: pytest.MonkeyPatch) -> Klein:
    """Return a model that was tuned and not used yet."""
    as_on_a_gpu(monkeypatch)
    compiler.gate.set()
    klein = make()
    tune(klein)
    return klein


def captured(compiler: type[InstantCompiler], monkeypatch: pytest.MonkeyPatch) -> Klein:
    """Return a model that was used and captured: the text encoder and one step."""
    klein = compiled(compiler, monkeypatch)
    generate(klein)
    tune(klein)
    return klein


def test_captured_steps_give_the_same_bits(compiler: type[InstantCompiler], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runner, "_captures", property(lambda self: True))
    monkeypatch.setattr(runner_module, "DeviceGraph", FakeGraph)
    monkeypatch.setattr(runner_module, "graph_pool", object)
    compiler.gate.set()
    klein = make()
    references = tuple(np.random.default_rng(i).integers(0, 256, (64, 80, 3), dtype=np.uint8) for i in range(2))
    jobs = [JOB, replace(JOB, references=references[:1]), replace(JOB, references=references, size=Exact(96, 80))]
    tune(klein)
    plain = [generate(klein, job).image for job in jobs]
    assert FakeGraph.made == 0, "nothing is captured before a shape was used and idle time came"
    tune(klein)
    assert FakeGraph.made == len(jobs)
    for job, image in zip(jobs, plain, strict=True):
        assert np.array_equal(generate(klein, job).image, image)
    for side in range(64, 64 + 16 * (MAX_GRAPHS + 1), 16):
        generate(klein, replace(JOB, size=Exact(side, 64)))
        tune(klein)
    assert len(klein.runner._step_graphs) == MAX_GRAPHS


def test_captured_text_encoder_reads_no_table(compiler: type[InstantCompiler], monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of a loaded model is in host memory, which no CUDA graph can read: all stayed eager."""
    replaying = [0]

    class Graph(FakeGraph):
        def __call__(self, inputs: Any) -> Tensor:
            given = list(inputs)
            replaying[0] += 1
            monkeypatch.setattr(CpuEmbedding, "forward", None)
            try:
                return super().__call__(given)
            finally:
                monkeypatch.setattr(CpuEmbedding, "forward", look_up)

    look_up = CpuEmbedding.forward
    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(runner_module, "DeviceGraph", Graph)
    compiler.gate.set()
    klein = make()
    table = klein.text_encoder.model.embed_tokens
    klein.text_encoder.model.embed_tokens = CpuEmbedding(table, CPU.device, CPU.dtype)  # type: ignore[assignment] - no nn.Embedding
    before = generate(klein).image
    tune(klein)
    assert klein.runner.mode == "compiled", klein.runner.summary()
    klein.cache.clear()
    assert np.array_equal(generate(klein).image, before)
    assert replaying[0]


class FullGraph(FakeGraph):
    """Runs out of memory while it is captured."""

    def __init__(self, *_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_capture_that_runs_out_of_memory_keeps_the_compiled_mode(
    compiler: type[InstantCompiler], monkeypatch: pytest.MonkeyPatch
) -> None:
    klein = compiled(compiler, monkeypatch)
    image = generate(klein).image
    monkeypatch.setattr(runner_module, "DeviceGraph", FullGraph)
    tune(klein)
    monkeypatch.setattr(runner_module, "DeviceGraph", FakeGraph)
    made = FakeGraph.made
    after = generate(klein)
    tune(klein)
    assert after.mode == klein.runner.mode == "compiled"
    assert np.array_equal(after.image, image)
    assert FakeGraph.made == made, "nothing is captured any more"


def test_second_attempt_to_compile_captures_nothing(
    compiler: type[InstantCompiler], monkeypatch: pytest.MonkeyPatch
) -> None:
    as_on_a_gpu(monkeypatch)
    compiler.error = torch.OutOfMemoryError("CUDA out of memory.")
    compiler.gate.set()
    klein = make()
    with pytest.raises(torch.OutOfMemoryError):
        tune(klein)
    compiler.error, made = None, FakeGraph.made
    tune(klein)
    assert generate(klein).mode == "compiled"
    tune(klein)
    assert FakeGraph.made == made


def test_pool_of_graphs_is_counted_until_they_are_freed(
    compiler: type[InstantCompiler], monkeypatch: pytest.MonkeyPatch
) -> None:
    klein = captured(compiler, monkeypatch)
    assert klein.runner.pool_bytes == FakeGraph.made * FakeGraph.pool_bytes == 2 * FakeGraph.pool_bytes
    klein.runner.stop_capturing()
    generate(klein)
    tune(klein)
    assert (klein.runner.pool_bytes, FakeGraph.made) == (0, 2)


def test_graphs_are_captured_again_after_they_were_freed(
    compiler: type[InstantCompiler], monkeypatch: pytest.MonkeyPatch
) -> None:
    klein = captured(compiler, monkeypatch)
    made = FakeGraph.made
    klein.runner.free_graphs()
    generate(klein)
    tune(klein)
    assert FakeGraph.made == 2 * made == 4, "the text encoder's and a step's"


def test_graph_of_a_shape_in_use_is_not_pushed_out(
    compiler: type[InstantCompiler], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only shapes without a graph had counted as used: a new one took the favourite's, and captures went round."""
    klein = compiled(compiler, monkeypatch)

    def paint(side: int) -> None:
        generate(klein, replace(JOB, size=Exact(side, 64)))
        tune(klein)

    for side in range(64, 64 + 16 * MAX_GRAPHS, 16):
        paint(side)
    for side in range(256, 256 + 16 * MAX_GRAPHS, 16):
        paint(64)
        made = FakeGraph.made
        paint(side)
        assert FakeGraph.made == made + 1, "of the new shape alone"
        paint(64)
        assert FakeGraph.made == made + 1, "the favourite's is still there"
