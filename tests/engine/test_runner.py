"""Runner: eager at once, compiled after idle time, never in a job's way, and eager again where compiling fails."""

import copy
import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from engine.contract import Exact
from engine.families.klein import compile_thread
from engine.families.klein import compiler as compiler_module
from engine.families.klein.compile_thread import NEVER, CompileThread
from engine.families.klein.compiler import CompiledDiffers, CompileOptions, obstacle
from engine.families.klein.loader import Networks
from engine.families.klein.pipeline import Klein
from engine.families.klein.sample_inputs import SampleInputs, attention_inputs
from engine.families.klein.traces import ATTEMPTS
from engine.memory.device import Device
from engine.memory.offload import OffloadedModule, OffloadRing, stream
from engine.nn import ops
from tests import operations
from tests.bench.full_size_models import grown, ours
from tests.engine.graphs import FakeGraph, as_on_a_gpu
from tests.engine.runners import CPU, EVERYWHERE, JOB, TOY, InstantCompiler, generate, make, tune


def test_without_a_reason_to_compile_it_stays_eager() -> None:
    klein = make(CompileOptions(enabled=True))
    assert not klein.runner.tune()
    assert klein.runner.summary() == "eager: compiling does not pay on cpu"
    assert generate(klein).mode == "eager"
    assert make(CompileOptions()).runner.summary() == "eager: compiling is off"


@pytest.mark.parametrize(
    ("missing", "reason"), [("triton", "Triton is not installed"), ("compiler", "there is no C compiler")]
)
def test_what_the_compiler_lacks_is_named(missing: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Device, "is_nvidia", property(lambda self: True))
    device = Device(torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr(compiler_module.importlib.util, "find_spec", lambda name: None if missing == "triton" else name)
    monkeypatch.setattr(compiler_module.shutil, "which", lambda name: None if missing == "compiler" else name)
    assert obstacle(device, CompileOptions(enabled=True)) == reason


def test_fp32_is_not_compiled_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Device, "is_nvidia", property(lambda self: True))
    assert "does not pay in float32" in obstacle(CPU, CompileOptions(enabled=True))


def test_a_job_does_not_wait_for_the_compiler(compiler: type[InstantCompiler]) -> None:
    klein = make()
    for _ in range(5):
        assert klein.runner.tune()  # the compiler hangs, and every call returns
    assert generate(klein).mode == "eager"
    compiler.gate.set()
    tune(klein)
    assert generate(klein).mode == "compiled"


def busy(compiler: type[InstantCompiler], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let compiling call functions until its gate opens, and return their number."""
    calls = [0]

    def tick() -> None:
        calls[0] += 1

    def work(self: InstantCompiler) -> None:
        while not self.gate.is_set():
            tick()

    monkeypatch.setattr(compiler, "_compile", work)
    return calls


class WatchedEvent(threading.Event):
    """Counts how often somebody begins to wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.set()
        self.waits = 0

    def wait(self, timeout: float | None = None) -> bool:
        self.waits += 1
        return super().wait(timeout)


def watched_gate(klein: Klein) -> WatchedEvent:
    """Return the event that the compiling thread waits for while it is paused."""
    event = klein.runner._thread._gate._open = WatchedEvent()
    return event


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_the_compiler_stands_still_while_a_job_runs(
    compiler: type[InstantCompiler], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = busy(compiler, monkeypatch)
    klein = make()
    gate = watched_gate(klein)
    while not calls[0]:
        assert klein.runner.tune()
    events = klein.run(JOB)
    next(events)
    until(lambda: gate.waits > 0)
    stopped = calls[0]
    for _ in events:
        assert calls[0] == stopped
    while calls[0] == stopped:
        assert klein.runner.tune()
    compiler.gate.set()
    tune(klein)
    assert klein.runner.mode == "compiled"


def test_a_pause_lasts_as_long_as_its_job_makes_progress(
    compiler: type[InstantCompiler], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(compile_thread, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(compile_thread, "MAX_PAUSE", 0.01)  # by our clock; so often it is looked at by the real one
    calls = busy(compiler, monkeypatch)
    klein = make()
    gate = watched_gate(klein)
    while not calls[0]:
        assert klein.runner.tune()
    with klein.runner.job():
        until(lambda: gate.waits > 0)
        stopped = calls[0]
        latent = torch.zeros(1, klein.transformer.shape.channels, 1, 1)
        for _ in range(4):
            now[0] += 0.009
            klein.runner.encode(klein.runner.decode(latent, "eager"), "eager")
            looked = gate.waits + 1
            until(lambda looked=looked: gate.waits > looked)
        assert calls[0] == stopped
        now[0] += 0.011
        until(lambda: calls[0] > stopped)  # without progress it goes on, in case both wait for one lock
    compiler.gate.set()
    tune(klein)


def test_an_error_of_the_compiler_leaves_eager_images_and_its_reason(compiler: type[InstantCompiler]) -> None:
    compiler.error = RuntimeError("no such instruction")
    compiler.gate.set()
    klein = make()
    before = generate(klein).image
    tune(klein)
    assert klein.runner.summary() == "eager: compiling failed (RuntimeError: no such instruction)"
    assert not klein.runner.tune()
    after = generate(klein)
    assert after.mode == "eager"
    assert np.array_equal(after.image, before)


def test_a_change_of_mode_under_a_seed_is_reported(compiler: type[InstantCompiler]) -> None:
    compiler.gate.set()
    klein = make()
    assert not generate(klein).warnings
    assert not generate(klein).warnings
    tune(klein)
    (warning,) = generate(klein).warnings
    assert "by compiled kernels, the same seed before by eager ones" in warning
    assert not generate(klein).warnings, "reported once"
    assert not generate(klein, replace(JOB, seed=4)).warnings


def test_job_gets_the_mode_it_asks_for_if_possible(compiler: type[InstantCompiler]) -> None:
    compiler.gate.set()
    klein = make()
    asked = generate(klein, replace(JOB, mode="compiled"))
    assert asked.mode == "eager"
    assert "not by compiled kernels as asked for" in asked.warnings[0]
    tune(klein)
    assert generate(klein, replace(JOB, seed=9, mode="compiled")).mode == "compiled"
    assert generate(klein, replace(JOB, seed=8, mode="eager")).mode == "eager"


def test_cached_references_are_of_one_mode(compiler: type[InstantCompiler]) -> None:
    compiler.gate.set()
    klein = make()
    reference = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    edit = replace(JOB, references=(reference,))
    assert generate(klein, edit).cache["references"] == "miss"
    tune(klein)
    assert generate(klein, edit).cache["references"] == "miss", "made by the other kernels"
    assert generate(klein, edit).cache["references"] == "hit"


def test_tuning_that_runs_out_of_memory_is_tried_once_more(compiler: type[InstantCompiler]) -> None:
    compiler.error = torch.OutOfMemoryError("CUDA out of memory.")
    compiler.gate.set()
    klein = make()
    with pytest.raises(torch.OutOfMemoryError):
        tune(klein)
    tune(klein)
    assert klein.runner.summary().startswith("eager: compiling failed (OutOfMemoryError")


def test_tuning_that_runs_out_of_memory_leaves_nothing_on_the_device(
    compiler: type[InstantCompiler], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A circle through the error's traceback held the example's tensors until some later garbage collection."""
    held: list[weakref.ref[torch.Tensor]] = []

    def work(self: InstantCompiler) -> None:
        activations = torch.ones(1000)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(compiler, "_compile", work)
    klein = make()
    gc.disable()
    try:
        with suppress(torch.OutOfMemoryError):
            tune(klein)
        assert [tensor() for tensor in held] == [None]
    finally:
        gc.enable()


def test_compiling_thread_uses_the_gpu_of_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[tuple[str, torch.device]] = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: chosen.append((threading.current_thread().name, device))
    )
    second = torch.device("cuda", 1)
    list(CompileThread(second).run(lambda: None))
    assert chosen == [("klein-compile", second)]


def test_a_closed_runner_keeps_nothing(compiler: type[InstantCompiler]) -> None:
    compiler.gate.set()
    klein = make()
    tune(klein)
    klein.runner.close()
    assert klein.runner.mode == "eager"
    assert not klein.runner.tune()


def test_a_model_released_while_it_compiles_is_freed(
    compiler: type[InstantCompiler], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [0]

    def tick() -> None:
        calls[0] += 1

    def work(self: InstantCompiler) -> None:
        networks = self.compiled  # as a compiler's frames hold them
        while networks and not self.gate.is_set():
            tick()

    monkeypatch.setattr(compiler, "_compile", work)
    klein = make()
    held = [weakref.ref(net) for net in (klein.transformer, klein.autoencoder, klein.text_encoder)]
    while not calls[0]:
        assert klein.runner.tune()
    thread = klein.runner._thread._thread
    assert thread is not None
    klein.runner.close()
    del klein
    gc.collect()
    assert not any(net() for net in held)
    until(lambda: not thread.is_alive())


def test_a_model_released_while_its_compiler_hangs_gives_its_memory_back(
    compiler: type[InstantCompiler], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call of C, such as waiting for Triton's processes, ends by itself alone and holds all networks until then."""
    monkeypatch.setattr(compile_thread, "STOP", 0.1)
    copies: list[torch.nn.Module] = []

    def copy_autoencoder(self: InstantCompiler, *given: Any) -> None:
        InstantCompiler.__init__(self, *given)
        self.autoencoder = copy.deepcopy(self.autoencoder)
        copies.append(self.autoencoder)

    monkeypatch.setattr(compiler, "__init__", copy_autoencoder)
    klein = streaming(monkeypatch)
    streamed = next(module for module in klein.transformer.modules() if isinstance(module, OffloadedModule))
    (ring,) = streamed._ring
    generate(klein)
    while not copies or klein.runner._thread._thread is None:
        assert klein.runner.tune()
    for _ in range(3):
        assert klein.runner.tune()
    networks = (klein.transformer, klein.autoencoder, klein.text_encoder, *copies)
    assert ring.bytes
    klein.runner.close()
    assert not any(tensor.nbytes for net in networks for tensor in (*net.parameters(), *net.buffers()))
    assert not any(module.offloaded for module in klein.transformer.modules() if isinstance(module, OffloadedModule))
    assert ring.bytes == 0
    compiler.gate.set()


def test_saved_traces_that_fail_are_dropped_and_made_anew(
    compiler: type[InstantCompiler], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler.gate.set()
    klein, made = make(replace(EVERYWHERE, backend="inductor", folder=tmp_path)), [0]
    folder = klein.runner._traces_folder()
    assert folder is not None

    def work(self: InstantCompiler) -> None:
        made[0] += 1
        if torch._dynamo.config.caching_precompile:
            raise CompiledDiffers("the compiled blocks differ")

    monkeypatch.setattr(compiler, "_compile", work)
    tune(klein)
    assert klein.runner.mode == "compiled", klein.runner.summary()
    assert made == [2]
    assert not folder.exists()


def test_release_while_it_compiles_does_not_count_against_traces(
    compiler: type[InstantCompiler], tmp_path: Path
) -> None:
    klein = make(replace(EVERYWHERE, backend="inductor", folder=tmp_path))
    while not (attempts := list(tmp_path.rglob(ATTEMPTS))):
        assert klein.runner.tune()
    compiler.gate.set()
    klein.runner.close()
    assert not attempts[0].exists()


def test_compiling_defers_full_garbage_collections_to_its_end(compiler: type[InstantCompiler]) -> None:
    before, collected = gc.get_threshold(), []

    def note(phase: str, facts: dict[str, int]) -> None:
        if phase == "stop" and facts["generation"] == 2:
            collected.append(gc.get_threshold())

    klein = make()
    assert klein.runner.tune()  # the compilers are loaded
    while gc.get_threshold()[2] != NEVER:
        assert klein.runner.tune()
    gc.callbacks.append(note)
    compiler.gate.set()
    tune(klein)
    gc.callbacks.remove(note)
    assert {*collected} == {before}


def test_a_model_released_while_it_compiles_restores_garbage_collection(compiler: type[InstantCompiler]) -> None:
    before, klein = gc.get_threshold(), make()
    while gc.get_threshold()[2] != NEVER:
        assert klein.runner.tune()
    compiler.gate.set()
    klein.runner.close()
    assert gc.get_threshold() == before


def test_released_streaming_model_keeps_no_ring(
    compiler: type[InstantCompiler], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler.gate.set()
    klein = streaming(monkeypatch)
    generate(klein)
    tune(klein)
    generate(klein)
    streamed = next(module for module in klein.transformer.modules() if isinstance(module, OffloadedModule))
    (ring,) = streamed._ring
    held = [weakref.ref(each) for each in (ring, ring._slots[0].memory, ring._slots[1].memory, klein.transformer)]
    klein.runner.close()
    del klein, ring, streamed
    gc.collect()
    assert [each() for each in held] == [None] * 4


def test_two_pass_norm_is_the_plain_one() -> None:
    x, weight, bias = torch.randn(2, 16, 9, 11), torch.randn(16), torch.randn(16)
    plain = ops.PLAIN["norm_silu"](x, weight, bias, 4, 1e-6)
    # Observed: 7e-7, fp32.
    assert (ops.two_pass_norm_silu(x, weight, bias, 4, 1e-6) - plain).abs().max() < 1e-5
    with operations.chosen(norm_silu=ops.two_pass_norm_silu):
        assert ops.norm_silu(x, weight, bias, 4, 1e-6) is not plain
    with pytest.raises(KeyError):
        ops.choose(nothing=torch.relu)


def streaming(monkeypatch: pytest.MonkeyPatch) -> Klein:
    """A toy half of whose layers stream, on a device that could capture graphs."""
    as_on_a_gpu(monkeypatch)
    nets = grown(TOY, CPU)
    layers = [name for name, layer in nets.transformer.named_modules()
              if isinstance(layer, torch.nn.Linear) and "blocks" in name]  # fmt: skip
    stream(nets.transformer, tuple(layers[len(layers) // 2 :]), OffloadRing(CPU.device))
    return ours(nets, TOY, CPU, options=EVERYWHERE)


def test_streamed_layers_are_never_captured(compiler: type[InstantCompiler], monkeypatch: pytest.MonkeyPatch) -> None:
    compiler.gate.set()
    klein = streaming(monkeypatch)
    before = generate(klein).image
    tune(klein)
    after = generate(klein, replace(JOB, mode="compiled"))
    tune(klein)
    assert (after.mode, FakeGraph.made) == ("compiled", 1), "the one graph is the text encoder's"
    assert klein.runner.summary().endswith("0 shapes captured")
    assert np.array_equal(after.image, before)


@pytest.mark.bench
def test_blocks_of_streamed_layers_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace for real, with torch's own operations as the backend: half a minute."""
    klein, plain = streaming(monkeypatch), make(CompileOptions())
    tune(klein)
    assert klein.runner.mode == "compiled", klein.runner.summary()
    reference = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    for job in (JOB, replace(JOB, references=(reference,), size=Exact(112, 80))):
        result = generate(klein, job)
        assert result.mode == "compiled"
        # Observed: 1 level of 255, from convolutions in channels-last order.
        assert np.abs(result.image.astype(int) - generate(plain, job).image.astype(int)).max() <= 2


@pytest.mark.bench
def test_compiled_networks_compute_what_eager_ones_do(tmp_path: Path) -> None:
    """Inductor on a toy: minutes beside other load. One program covers every size and number of references."""
    options = replace(EVERYWHERE, backend="inductor", folder=tmp_path)
    klein = make(options)
    references = tuple(np.random.default_rng(i).integers(0, 256, (64, 80, 3), dtype=np.uint8) for i in range(2))
    jobs = [JOB, replace(JOB, references=references[:1]), replace(JOB, references=references, size=Exact(112, 80))]
    eager = [generate(klein, job).image.astype(int) for job in jobs]
    tune(klein)
    assert klein.runner.mode == "compiled", klein.runner.summary()
    for job, image in zip(jobs, eager, strict=True):
        # Observed: 1 level of 255.
        assert np.abs(generate(klein, job).image.astype(int) - image).max() <= 2


@pytest.mark.bench
def test_every_graph_is_traced_once() -> None:
    """Symbolic epsilons had the first graph of each function traced twice, from the disk cache too."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    klein = make(replace(EVERYWHERE, backend="aot_eager"))
    tune(klein)
    assert klein.runner.mode == "compiled", klein.runner.summary()
    assert counters["aot_autograd"]["total"] == counters["aot_autograd"]["ok"] > 0


@pytest.mark.bench
def test_a_second_process_finds_what_the_first_compiled(tmp_path: Path) -> None:
    script = """
import sys, torch
from pathlib import Path
from engine.families.klein.compiler import CompileOptions, load_compilers
load_compilers(CompileOptions(enabled=True, folder=Path(sys.argv[1])))
torch.compile(lambda x: torch.nn.functional.silu(x) * 3)(torch.randn(64))
from torch._dynamo.utils import counters
print(counters["inductor"]["fxgraph_cache_hit"])
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    # A test before this one may have set the folders for this process.
    env = {name: value for name, value in os.environ.items() if not name.endswith("_CACHE_DIR")}
    hits = [int(subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout) for _ in range(2)]
    assert hits == [0, 1]
    assert any(tmp_path.rglob("*"))


Layout = tuple[torch.Size, tuple[int, ...]]


@pytest.mark.parametrize("kv", [False, True], ids=["plain", "KV"])
def test_attention_is_planned_with_the_strides_that_blocks_pass(kv: bool) -> None:
    """cuDNN has a plan for each set of strides, and builds it in 41 to 50 ms, H200."""
    seen: set[tuple[Layout, ...]] = set()

    def spy(*given: torch.Tensor) -> torch.Tensor:
        seen.add(tuple((each.shape, each.stride()) for each in given))
        return ops.PLAIN["attention"](*given)

    toy = replace(TOY, variant=replace(TOY.variant, reference_size=256))
    klein = ours(grown(toy, CPU), toy, CPU, kv=kv)
    planned = {
        tuple((each.shape, each.stride()) for each in given)
        for given in attention_inputs(klein.variant, klein.transformer, CPU)
    }
    native = replace(JOB, size=Exact(256, 256), steps=1)
    reference = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    edit = replace(native, references=(reference,))
    generate(klein, edit)  # keys and values are cached now
    with operations.chosen(attention=spy):
        for job in (native, edit):
            generate(klein, job)
    assert seen <= planned
    assert len(seen) == (5 if kv else 6)


def test_sample_inputs_fit_the_networks() -> None:
    nets = grown(TOY, CPU)
    sample = SampleInputs(nets.transformer, CPU, TOY.variant.text_length, 3, 5)
    for references, kv in ((0, False), (7, False), (7, True)):
        assert nets.transformer(*sample.step(references, kv)).shape == (1, 15, TOY.transformer.channels)


def test_making_a_model_changes_no_operation_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_gpu(monkeypatch)
    klein = make()  # chooses, as loading does
    chosen = {name: ops.current(name) for name in ops.PLAIN}
    assert chosen["norm_silu"] is ops.two_pass_norm_silu
    ops.choose(**ops.PLAIN)
    networks = Networks(klein.transformer, klein.autoencoder, klein.text_encoder, "", "")
    Klein(klein.variant, networks, klein.tokenizer, klein.device)
    assert {name: ops.current(name) for name in ops.PLAIN} == ops.PLAIN
