"""Tests that offloaded layers compute the same as resident ones.

The ring holds two layers: one is copied to the device while the other computes.
"""

import gc
import shutil
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.checkpoints.quant import fp8
from engine.checkpoints.quant.fp8 import Fp8Linear
from engine.contract import EngineConfig, Job, OutOfMemory, Result
from engine.engine import Engine
from engine.families.klein import footprint, loader, lora
from engine.families.klein.compile_thread import MAX_PAUSE, PauseGate
from engine.families.klein.loader import LoadOptions
from engine.families.klein.lora import Lora
from engine.families.klein.lora.deltas import LowRank
from engine.families.klein.pipeline import Klein
from engine.memory.arena import HostArena
from engine.memory.device import CopyStream, Device
from engine.memory.offload import CpuEmbedding, OffloadedModule, OffloadRing, ring_bytes, stream
from engine.memory.plan import ActivationMemory, MemoryInfo
from engine.registry import NANO, ModelRegistry
from tests.embedded import SIDE
from tests.engine.loras import bfl_fused, write

CPU = torch.device("cpu")
PLACEMENT = Device(CPU, torch.float32)
MB = 10**6


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(64, 64, bias=i % 2 == 0) for i in range(5)))


def streamed(module: nn.Module) -> OffloadRing:
    ring = OffloadRing(CPU)
    stream(module, tuple(name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)), ring)
    return ring


def test_streaming_changes_no_bit() -> None:
    x, module = torch.randn(3, 64), net()
    want = module(x)
    streamed(module)
    for _ in range(3):
        assert torch.equal(module(x), want)


class SlowLinear(nn.Linear):
    """Computes late, so that another thread may fetch its own layer meanwhile."""

    def forward(self, input: Tensor) -> Tensor:
        time.sleep(0.001)
        return super().forward(input)


def test_two_threads_share_a_ring_without_mixing_weights() -> None:
    """The compiling thread runs its examples beside jobs."""
    torch.manual_seed(0)
    module = nn.Sequential(*(SlowLinear(64, 64) for _ in range(4)))
    x = torch.randn(3, 64)
    want = module(x)
    streamed(module)
    with torch.no_grad(), ThreadPoolExecutor(2) as pool:
        found = [result.result() for result in [pool.submit(module, x) for _ in range(12)]]
    assert all(torch.equal(each, want) for each in found)


def test_a_thread_with_a_streamed_layer_is_not_paused() -> None:
    """Others would wait for the ring as long as it is paused."""
    gate, passed = PauseGate(), threading.Event()

    def compute() -> None:
        with OffloadRing(CPU).turn():
            gate.trace(None, "call", None)
        passed.set()

    gate.pause()
    threading.Thread(target=compute, daemon=True).start()
    assert passed.wait(MAX_PAUSE / 2)


def test_the_ring_holds_two_layers_and_no_more() -> None:
    module = net()
    largest = max(sum(-(-p.nbytes // 256) * 256 for p in layer.parameters()) for layer in module)
    ring = streamed(module)
    assert ring.bytes == ring_bytes(module, module) == 2 * largest
    assert ring_bytes(net()) == 0


def test_next_layer_is_copied_while_one_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy each layer before it is used, from the second pass on.

    This holds for any order of use.
    """
    module = net()
    order = [4, 0, 2, 1, 3]
    streamed(module)
    log: list[str] = []
    names = {id(layer): str(i) for i, layer in enumerate(module)}
    send, fetch = OffloadRing._send, OffloadRing.fetch

    def logged(what: str, call):
        return lambda self, layer, *rest: (log.append(f"{what} {names[id(layer)]}"), call(self, layer, *rest))[1]

    monkeypatch.setattr(OffloadRing, "_send", logged("send", send))
    monkeypatch.setattr(OffloadRing, "fetch", logged("use", fetch))
    x = torch.randn(1, 64)
    for _ in range(3):
        log.clear()
        for i in order:
            module[i](x)
    # While 4 computes, 0 is copied, and so on. At the end, 4 is copied again for the next step.
    assert log == [word for now, then in pairwise([*order, 4]) for word in (f"use {now}", f"send {then}")]


def test_a_slot_is_not_written_before_its_layer_is_done() -> None:
    """Record in order the events that a device would wait for."""

    class Recorder(CopyStream):
        def __init__(self) -> None:
            self.events: list[tuple[str, object]] = []

        def record_event(self) -> Any:
            self.events.append(("done", len(self.events)))
            return self.events[-1]  # type: ignore[return-value]

        def copy_async(self, target: Tensor, source: Tensor, after):
            self.events.append(("copy", after))
            target.copy_(source)

        def wait_event(self, event) -> None:
            pass

    module = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4)))
    ring = streamed(module)
    ring._copies = recorder = Recorder()
    for _ in range(3):
        module(torch.randn(1, 8))
    copied = [after for what, after in recorder.events if what == "copy"]
    assert copied[:2] == [None, None]
    for position, (what, after) in enumerate(recorder.events):
        if what == "copy" and after is not None:
            # `after` is the slot's last computation.
            assert recorder.events.index(after) < position  # type: ignore[arg-type]
    assert None not in copied[2:]


def test_quantised_layers_and_loras_can_be_offloaded() -> None:
    weight = torch.randn(64, 64)
    layer = Fp8Linear(64, 64)
    layer.load_tensors(fp8.encode(weight))
    rows = lora.RowRange("0", 0, 64)
    delta = lora.WeightDelta(rows, LowRank(torch.randn(64, 4), torch.randn(4, 64)))
    beside = lora.LoraLinear(layer, [delta], weight)
    module = nn.Sequential(beside)
    x = torch.randn(2, 64)
    want = module(x)
    ring = OffloadRing(CPU)
    stream(module, ("0",), ring)
    assert isinstance(module[0], OffloadedModule)
    assert torch.equal(module(x), want)


def test_cpu_embedding_returns_the_rows_of_the_prompt() -> None:
    table = nn.Embedding(50, 8)
    ids = torch.randint(0, 50, (1, 12))
    assert torch.equal(CpuEmbedding(table, CPU, torch.float32)(ids), table(ids))


def last(generator):
    while True:
        try:
            next(generator)
        except StopIteration as done:
            return done.value


@pytest.fixture
def cramped(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Fake a discrete device with little memory.

    Set `free` in the returned dict to its free bytes.
    """
    room = {"free": 0}
    monkeypatch.setattr(
        footprint,
        "memory_info",
        lambda placement, limit=None, held=0: MemoryInfo("GPU", room["free"], 24 * 10**9, 64 * 10**9),
    )
    monkeypatch.setattr(footprint, "activation_memory", lambda *shapes: ActivationMemory(128, 0))
    monkeypatch.setattr(loader, "arrange_for_cpu", lambda module: None)
    monkeypatch.setattr("engine.memory.plan.RESERVE", 0)
    return room


NANO_BYTES = 2 * sum(path.stat().st_size for path in NANO.rglob("*.safetensors"))
"""Bytes of the embedded model's weights in fp32; its files are in 16 bit."""


def paint(klein: Klein):
    *_, painting = klein.run(Job("a red ball on a blue table", seed=3))
    assert isinstance(painting, Result)
    return painting


def test_offloaded_model_generates_the_same_image(cramped: dict[str, int]) -> None:
    """Run the embedded model in less and less memory.

    Every image is identical bit for bit.
    """
    checkpoint = ModelRegistry().resolve(str(NANO))
    cramped["free"] = 10**9
    whole = last(Klein.load(checkpoint, PLACEMENT))
    assert "all on the device" in whole.placement_summary
    want = paint(whole).image
    seen = set()
    for share in (1.6, 1.1, 0.98, 0.82, 0.7, 0.57, 0.45, 0.33, 0.25, 0.2, 0.16, 0.12, 0.1):
        cramped["free"] = round(share * NANO_BYTES)
        try:
            klein = last(Klein.load(checkpoint, PLACEMENT))
        except OutOfMemory:
            continue
        plan = klein.placement_summary.rpartition(";")[0]
        if plan not in seen:
            seen.add(plan)
            assert (paint(klein).image == want).all(), plan
    # All resident, then no encoder, then two or more plans with fewer resident transformer layers.
    assert len(seen) >= 4, seen


def test_offloaded_weights_are_in_one_block_of_their_size(cramped: dict[str, int]) -> None:
    cramped["free"] = round(0.6 * NANO_BYTES)
    klein = last(Klein.load(ModelRegistry().resolve(str(NANO)), PLACEMENT))
    layers = [m for net in (klein.transformer, klein.text_encoder) for m in net.modules()
              if isinstance(m, OffloadedModule)]  # fmt: skip
    offloaded = [tensor for layer in layers for tensor in layer.offloaded.values()]
    table = klein.text_encoder.model.embed_tokens.weight
    blocks = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in (*offloaded, table)}
    assert len(layers) > 10
    assert len(blocks) == 1
    needed = sum(tensor.nbytes for tensor in (*offloaded, table))
    assert needed <= sum(blocks.values()) <= needed + 1300 * (len(layers) + 1)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in offloaded)


def test_arena_that_is_used_up_allocates_elsewhere() -> None:
    arena = HostArena(1000, CPU)
    one, two, three = (
        arena.take((100,), torch.float32),
        arena.take((3, 5), torch.bfloat16),
        arena.take((200,), torch.int8),
    )
    one.fill_(1)
    two.fill_(2)
    three.fill_(3)
    assert {t.untyped_storage().data_ptr() for t in (one, two, three)} == {one.untyped_storage().data_ptr()}
    assert two.data_ptr() - one.data_ptr() == 512
    assert [float(t.double().mean()) for t in (one, two, three)] == [1, 2, 3]
    four = arena.take((300,), torch.int8)
    assert four.untyped_storage().data_ptr() != one.untyped_storage().data_ptr()


def test_release_leaves_no_tensor_of_an_offloaded_model(cramped: dict[str, int]) -> None:
    """Count them with the garbage collector off: only what release itself frees is free."""
    cramped["free"] = round(0.6 * NANO_BYTES)
    engine = Engine(EngineConfig(device="cpu", dtype="float32"))

    def held() -> int:
        return sum(t.untyped_storage().nbytes() for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter))

    gc.collect()
    before = held()
    list(engine.run(Job("a red ball on a blue table", model="nano")))
    assert engine._klein is not None
    ring = weakref.ref(next(m for m in engine._klein.transformer.modules() if isinstance(m, OffloadedModule))._ring[0])
    gc.disable()
    try:
        assert held() > before + 0.4 * NANO_BYTES
        engine.release()
        assert ring() is None
        # Observed: 0.
        assert held() - before < MB
    finally:
        gc.enable()


def test_lora_on_offloaded_layers_equals_lora_on_resident_ones(
    folder: Path, tmp_path: Path, cramped: dict[str, int]
) -> None:
    file = write(bfl_fused(), tmp_path / "style.safetensors")
    for quant, little in ((None, 8.0), ("fp8", 6.7)):
        velocities = []
        for free in (10**9, round(little * MB)):
            cramped["free"] = free
            klein = last(
                Klein.load(ModelRegistry().resolve(str(folder)), PLACEMENT, None, LoadOptions(quant, (Lora(file),)))
            )
            streams = any(isinstance(layer, OffloadedModule) for layer in klein.transformer.modules())
            assert streams == (free < 10**9), klein.placement_summary
            torch.manual_seed(0)
            text = klein.transformer.txt_in(torch.randn(1, 12, 96))
            rope = klein.transformer.rope(torch.zeros(28, 4, dtype=torch.long))
            mods = klein.transformer.modulations(torch.tensor([0.5]))
            with torch.inference_mode():
                velocities.append(klein.transformer(torch.randn(1, 16, 128), text, mods, rope))
        assert torch.equal(*velocities)


def test_smaller_size_is_planned_when_native_size_does_not_fit(
    folder: Path, cramped: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Load the model whenever a smaller image fits.

    The error for a large image names a size that fits, so that size must work.
    """
    checkpoint = ModelRegistry().resolve(str(folder))
    cramped["free"] = 10**9
    needed = loader.prepare(checkpoint, PLACEMENT, LoadOptions()).plan.peak
    monkeypatch.setattr(footprint, "activation_memory", lambda *shapes: ActivationMemory(1024, 10**9))
    cramped["free"] = needed + 3 * 10**8
    with pytest.raises(OutOfMemory, match=r"needs 1\.0 GB of the GPU for 1024×1024"):
        loader.prepare(checkpoint, PLACEMENT, LoadOptions())
    assert "all on the device" in last(Klein.load(checkpoint, PLACEMENT)).placement_summary


def test_memory_limit_is_respected(folder: Path) -> None:
    engine = Engine(EngineConfig(device="cpu", dtype="float32", memory_limit=1_000_000, models=(folder,)))
    with pytest.raises(OutOfMemory, match=r"needs 1\.\d GB of the memory.* the memory limit is 0\.0 GB\. Set memory"):
        list(engine.run(Job("x", model=str(folder))))


def test_auto_picks_the_best_model_with_a_resident_transformer(
    folder: Path, tmp_path: Path, cramped: dict[str, int]
) -> None:
    for name in ("klein-4b", "klein-9b", "klein-base-4b"):
        shutil.copytree(folder, tmp_path / name)
    small = ModelRegistry().resolve(str(folder))
    cramped["free"] = 10**9
    enough = loader.prepare(small, PLACEMENT, LoadOptions()).needs
    for free, chosen in ((10**9, "klein-9b"), (enough.rest + sum(enough.blocks) + 10**5, "klein-9b"), (MB, "nano")):
        cramped["free"] = free
        assert Engine(EngineConfig(device="cpu", dtype="float32", models=(tmp_path,))).auto.name(loaded="") == chosen, (
            free
        )
    shutil.rmtree(tmp_path / "klein-9b" / "vae")
    cramped["free"] = 10**9
    engine = Engine(EngineConfig(device="cpu", dtype="float32", models=(tmp_path,)))
    assert engine.auto.name(loaded="") == "klein-4b"
    obstacles = {model.name: model.obstacle for model in engine.status().models if model.obstacle}
    assert obstacles.keys() == {"klein-9b"}
    assert "has no vae folder" in obstacles["klein-9b"]


def test_image_too_large_for_memory_is_refused_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    klein = last(Klein.load(ModelRegistry().resolve(str(NANO)), PLACEMENT))
    monkeypatch.setattr(
        "engine.families.klein.pipeline.memory_info", lambda placement: MemoryInfo("GPU", 100_000, 10**9, 10**9)
    )
    started = []
    with pytest.raises(
        OutOfMemory, match=rf"{SIDE}×{SIDE} with 0 references takes 0\.0 GB besides the weights; 0\.0 GB of the"
    ):
        started.extend(klein.run(Job("x")))
    assert not started


def test_memory_limit_covers_images_and_the_cache() -> None:
    klein = last(Klein.load(ModelRegistry().resolve(str(NANO)), PLACEMENT, None, LoadOptions(limit=10**9)))
    assert klein.free(10**12) == 10**9 - klein.weight_bytes
    klein.limit = klein.weight_bytes + 100_000
    assert klein.free(10**12) == 100_000
    with pytest.raises(OutOfMemory, match=r"takes 0\.0 GB besides the weights; 0\.0 GB of the memory are allowed"):
        next(klein.run(Job("x")))
