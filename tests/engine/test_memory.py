"""Tests the memory plan, a pure function.

Its figures are those of the real models, counted on the meta device.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.auto import AutoChoice
from engine.contract import BadWeights, Fix, OutOfMemory
from engine.families.klein.checkpoint import FileState
from engine.families.klein.footprint import activation_memory, smaller_models
from engine.families.klein.text_encoder import TextEncoder
from engine.families.klein.transformer import Transformer, TransformerShape
from engine.families.klein.variants import VARIANTS
from engine.memory import device as device_module
from engine.memory.device import Device
from engine.memory.plan import (
    CONTEXT,
    RESERVE,
    ActivationMemory,
    MemoryInfo,
    PlacementPlan,
    WeightSizes,
    plan,
    working,
)
from engine.nn.autoencoder import Autoencoder, AutoencoderShape
from engine.registry import InstalledModel
from tests.engine.peak import Peak

GB = 10**9
SHAPES = {
    "4b": (TransformerShape(3072, 128, 7680, 5, 20, 9216), (2560, 9728)),
    "9b": (TransformerShape(4096, 128, 12288, 8, 24, 12288), (4096, 12288)),
}
QWEN3 = {"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
         "vocab_size": 151936}  # fmt: skip
SMALL = AutoencoderShape(decoder=(96, 192, 384, 384))


@lru_cache
def nets(size: str) -> tuple[Transformer, TextEncoder, Autoencoder]:
    """Build the models in their real shapes, without weights."""
    shape, (hidden, intermediate) = SHAPES[size]
    with torch.device("meta"):
        encoder = TextEncoder({**QWEN3, "hidden_size": hidden, "intermediate_size": intermediate}, (9, 18, 27))
        return Transformer(shape), encoder, Autoencoder(AutoencoderShape())


def needs(size: str, kind: str = "bf16") -> WeightSizes:
    """Return the sizes of a real model's weights.

    The blocks are in format `kind`, everything else in bf16.
    """
    transformer, encoder, autoencoder = nets(size)
    cost = {"bf16": 2.0, "fp8": 1.0, "nvfp4": 0.5625}[kind]
    blocks = [layer for name, layer in transformer.named_modules() if isinstance(layer, nn.Linear) and "blocks" in name]
    inside = [layer for name, layer in encoder.named_modules() if isinstance(layer, nn.Linear)]
    every = sum(p.numel() for net in (transformer, encoder, autoencoder) for p in net.parameters())
    counts = [layer.weight.numel() for layer in blocks], [layer.weight.numel() for layer in inside]
    table = encoder.model.embed_tokens.weight.numel()
    return WeightSizes(
        f"klein-{size}",
        blocks=tuple(round(cost * count) for count in counts[0]),
        encoder=tuple(2 * count for count in counts[1]),
        embedding=2 * table,
        rest=2 * (every - sum(counts[0]) - sum(counts[1]) - table),
    )


def work(size: str = "4b", side: int = 1024) -> ActivationMemory:
    transformer, _, autoencoder = nets(size)
    return activation_memory(VARIANTS[f"klein-{size}"], transformer, autoencoder, torch.bfloat16, pixels=side**2)


def card(gigabytes: float, free: float | None = None, host: float = 64) -> MemoryInfo:
    """Describe an NVIDIA card of `gigabytes`, of which CUDA itself takes 0.7."""
    there = gigabytes - 0.7 if free is None else free
    return MemoryInfo("GPU", round(there * GB), round(gigabytes * GB), round(host * GB))


def test_real_models_have_the_published_sizes() -> None:
    four, nine = needs("4b"), needs("9b")
    assert sum(four.blocks) + 390e6 == pytest.approx(7.751e9, rel=0.01)
    assert sum(nine.blocks) + 717e6 == pytest.approx(18.157e9, rel=0.01)
    assert len(four.blocks) == 80
    assert len(nine.blocks) == 112
    assert sum(four.encoder) == pytest.approx(5.45e9, rel=0.01)
    assert sum(nine.encoder) == pytest.approx(10.42e9, rel=0.01)
    assert four.embedding == pytest.approx(0.778e9, rel=0.01)


# (model, format, card GB) -> (resident block layers, whether the encoder is resident), and the most it may need.
PLANS = [
    ("4b", "bf16", 80, (80, True), 16.1),
    ("4b", "bf16", 20, (80, True), 16.1),
    ("4b", "bf16", 16, (80, False), 12.5),
    ("4b", "bf16", 13, (80, False), 12.5),
    ("4b", "bf16", 12, (80, False), 12.5),
    ("4b", "bf16", 8, (50, False), 7.4),
    ("4b", "fp8", 13, (80, False), 12.5),
    ("4b", "fp8", 8, (80, False), 7.4),
    ("4b", "nvfp4", 6, (80, False), 5.4),
    ("9b", "bf16", 32, (112, False), 31.3),
    ("9b", "bf16", 48, (112, True), 33.0),
    ("9b", "bf16", 24, (112, False), 24.0),
    ("9b", "fp8", 24, (112, True), 23.5),
    ("9b", "fp8", 16, (112, False), 13.5),
]


@pytest.mark.parametrize(("size", "kind", "gigabytes", "stays", "most"), PLANS)
def test_each_card_gets_its_plan(size: str, kind: str, gigabytes: float, stays: tuple[int, bool], most: float) -> None:
    wanted = needs(size, kind)
    found = plan(wanted, card(gigabytes), work(size))
    assert (found.blocks, found.encoder == len(wanted.encoder)) == stays
    assert found.embedding_on_cpu
    assert found.peak <= min(most * GB, card(gigabytes).free)


def test_full_residency_takes_the_weights_plus_two_gigabytes_at_most() -> None:
    four = needs("4b")
    found = plan(four, card(80), work())
    assert found.peak - RESERVE <= four.all - four.embedding + 2.2 * GB


@pytest.mark.parametrize("gigabytes", [24, 16, 13, 12, 10, 8, 6, 5])
def test_no_plan_exceeds_the_available_memory(gigabytes: int) -> None:
    for kind in ("bf16", "fp8", "nvfp4"):
        for side in (512, 1024, 2048):
            try:
                found = plan(needs("4b", kind), card(gigabytes), work(side=side))
            except OutOfMemory:
                continue
            assert found.peak <= card(gigabytes).free
            host = card(gigabytes).host
            assert host is not None
            assert found.offloaded_bytes <= host


def test_more_memory_never_offloads_more() -> None:
    four = needs("4b")
    staying = [plan(four, card(gigabytes), work()).blocks for gigabytes in (6, 7, 8, 9, 10, 11, 12)]
    assert staying == sorted(staying)
    assert staying[0] < staying[-1] == 80


def test_error_names_memory_that_other_programs_hold() -> None:
    with pytest.raises(OutOfMemory) as error:
        plan(needs("9b"), card(24, free=1.5), work("9b"))
    assert str(error.value) == (
        "klein-9b needs 3.6 GB of the GPU for 1024×1024; 1.5 GB of 24.0 GB are free. Other programs hold 22.5 GB. "
        "End the other program, or choose another device. Set device."
    )


def test_refusal_names_the_nearest_setting_that_fits() -> None:
    tight = MemoryInfo("memory", 12 * GB, 16 * GB)
    with pytest.raises(OutOfMemory, match=r"needs 16\.\d GB of the memory.*Set quant to nvfp4: it would fit, with \d+"):
        plan(
            needs("4b"), tight, work(), [(Fix("set", "quant", choices=(k,)), needs("4b", k)) for k in ("fp8", "nvfp4")]
        )
    with pytest.raises(OutOfMemory, match=r"for 2048×2048.*1024×1024 would fit\."):
        plan(needs("4b"), card(8, free=6.0), work(side=2048))
    with pytest.raises(OutOfMemory, match=r"nano\) fits anywhere"):
        plan(needs("9b"), MemoryInfo("memory", 1 * GB, 2 * GB), work("9b"))


def test_memory_limit_is_not_blamed_on_other_programs() -> None:
    with pytest.raises(OutOfMemory) as error:
        plan(needs("9b"), replace(card(24), limit=2 * GB), work("9b"))
    assert str(error.value) == (
        "klein-9b needs 3.6 GB of the GPU for 1024×1024; the memory limit is 2.0 GB. "
        "Set memory: with 4.4 GB it would fit."
    )
    with pytest.raises(OutOfMemory, match=r"the memory limit is 2\.0 GB\. Set memory: with 32\.\d GB it would fit"):
        plan(needs("9b"), MemoryInfo("memory", 60 * GB, 64 * GB, None, 2 * GB), work("9b"))
    assert plan(needs("4b"), replace(card(80), limit=10 * GB), work()).peak <= 10 * GB
    assert plan(needs("4b"), replace(card(8), limit=40 * GB), work()) == plan(needs("4b"), card(8), work())


def test_refusal_names_a_smaller_model_if_nothing_else_fits() -> None:
    nine = VARIANTS["klein-9b"]
    others = smaller_models(nine)
    assert [name for name, _ in others] == ["klein-4b"]
    with pytest.raises(OutOfMemory, match=r"klein-4b would fit: it needs about 15\.\d GB\.$"):
        plan(needs("9b"), MemoryInfo("memory", 20 * GB, 24 * GB), work("9b"), models=others)
    assert not smaller_models(VARIANTS["klein-4b"])
    base = smaller_models(VARIANTS["klein-base-9b"])
    assert [(name, other.all) for name, other in base] == [("klein-base-4b", 13.5 * GB)]


def test_offloaded_weights_need_host_memory() -> None:
    with pytest.raises(OutOfMemory, match=r"Host memory is short: 2\.0 GB"):
        plan(needs("4b"), card(8, host=2), work())


def test_nothing_is_offloaded_if_device_and_host_share_memory() -> None:
    four = needs("4b")
    found = plan(four, MemoryInfo("memory", 32 * GB, 32 * GB), work())
    assert found == PlacementPlan(80, len(four.encoder), False, four.all + work().bytes + RESERVE, 0)
    assert "all on the device" in found.summary(four)
    assert "5 of 80" in replace(found, blocks=5).summary(four)


def test_integrated_gpu_holds_all_or_nothing() -> None:
    four, image = needs("4b"), work()
    spark = MemoryInfo("GPU", 17 * GB, 128 * GB, integrated=True)
    found = plan(four, spark, image)
    assert (found.blocks, found.offloaded_bytes, found.peak) == (
        80,
        0,
        four.all + image.bytes + image.workspace + RESERVE,
    )
    with pytest.raises(OutOfMemory, match=r"klein-4b needs 16\.\d GB of the GPU"):
        plan(four, replace(spark, free=13 * GB), image)


def test_auto_takes_the_best_fit_and_never_a_base_model() -> None:
    def chosen(installed: Iterable[str], fits: Callable[[str], bool]) -> str:
        models = [InstalledModel(name, Path(name), "") for name in installed]
        return AutoChoice(lambda: models, lambda name: "" if fits(name) else "too large").name(loaded="")

    assert chosen(VARIANTS, lambda name: True) == "klein-9b-kv"
    assert chosen(VARIANTS, lambda name: "9b" not in name) == "klein-4b"
    assert chosen(VARIANTS, lambda name: False) == "nano"
    assert chosen(["nano", "klein-base-4b"], lambda name: True) == "nano"


def test_auto_says_why_it_passed_over_a_model() -> None:
    models = [InstalledModel(name, Path(name), "") for name in VARIANTS]
    auto = AutoChoice(lambda: models, lambda name: "" if name == "klein-4b" else "too large")
    assert auto.name(loaded="") == "klein-4b"
    assert auto.obstacles == {"klein-9b-kv": "too large", "klein-9b": "too large"}
    auto.failed("klein-4b", BadWeights("It is damaged."), FileState.of((Path("klein-4b"),)))
    assert auto.name(loaded="") == "nano"
    assert auto.obstacles["klein-4b"] == "does not load: It is damaged."
    auto.has_loaded("klein-4b")
    assert auto.name(loaded="") == "klein-4b"


def test_auto_keeps_its_choice_while_that_model_is_loaded() -> None:
    models, obstacles = [InstalledModel("klein-4b", Path("klein-4b"), "")], {"klein-4b": ""}
    auto = AutoChoice(lambda: models, obstacles.__getitem__)
    assert auto.name(loaded="") == "klein-4b"
    obstacles["klein-4b"] = "fills the memory itself"
    assert auto.name(loaded="klein-4b") == "klein-4b"
    assert auto.name(loaded="") == "nano"


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace attention by one that allocates only its output, as a fused kernel does."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: torch.empty_like(q))


def empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize(("canvas", "references"), [(1024, 0), (4096, 0), (4096, 4096), (16384, 0)])
def test_transformer_holds_no_more_than_planned(size: str, canvas: int, references: int, on_meta: None) -> None:
    shape = replace(SHAPES[size][0], double_blocks=1, single_blocks=1)
    with torch.device("meta"):
        net = Transformer(shape).to(torch.bfloat16)
    tokens = 512 + canvas + references
    rope = tuple(torch.empty(tokens, 64, device="meta") for _ in range(2))
    with torch.inference_mode():
        mods = net.modulations(empty(1))
        seen = empty(1, references, shape.hidden) if references else None
        x, text = empty(1, canvas, 128), empty(1, 512, shape.hidden)
        with Peak() as peak:
            net(x, text, mods, rope, seen, None)
    # The slice of linear1 that the last block reads is counted as a new allocation.
    held = peak.bytes - net.single_blocks[0].linear1.weight.nbytes  # type: ignore[union-attr]
    planned = working(hidden=shape.hidden, tokens=tokens, pixels=0, decoder=0, itemsize=2)
    assert 0.5 * planned < held <= planned


@pytest.mark.parametrize("shape", [AutoencoderShape(), SMALL], ids=["full", "small"])
@pytest.mark.parametrize("side", [512, 1024, 2048])
def test_autoencoder_holds_no_more_than_planned(shape: AutoencoderShape, side: int, on_meta: None) -> None:
    with torch.device("meta"):
        net = Autoencoder(shape).to(torch.bfloat16)
    planned = working(hidden=0, tokens=0, pixels=side**2, decoder=shape.decoder[1], itemsize=2)
    with torch.inference_mode():
        with Peak() as decoding:
            net.decode(empty(1, 128, side // 16, side // 16))
        with Peak() as encoding:
            net.encode(empty(1, 3, side, side))
    assert 0.8 * planned < decoding.bytes <= planned
    assert encoding.bytes <= planned * 512 // (2 * shape.decoder[1])


@pytest.mark.parametrize("shape", [AutoencoderShape(), SMALL], ids=["full", "small"])
@pytest.mark.parametrize("side", [512, 1024, 2048])
def test_plan_of_an_edit_counts_the_encoder_of_references(shape: AutoencoderShape, side: int, on_meta: None) -> None:
    """Bands are of decoding alone."""
    with torch.device("meta"):
        net = Autoencoder(shape).to(torch.bfloat16)
    with torch.inference_mode(), Peak() as encoding:
        net.encode(empty(1, 3, side, side))
    nets = (VARIANTS["klein-4b"], small_transformer(), net, torch.bfloat16)
    edit = activation_memory(*nets, pixels=side**2, references=[side**2])
    assert encoding.bytes <= edit.least <= edit.bytes
    # One is encoded after the other.
    several = activation_memory(*nets, pixels=side**2, references=[side**2] * 4)
    assert (
        several.least
        == edit.least
        <= 1.1 * max(encoding.bytes, activation_memory(*nets, pixels=side**2, references=[]).least)
    )


@lru_cache
def small_transformer() -> Transformer:
    """Return one beside which the autoencoder decides what an image takes."""
    with torch.device("meta"):
        return Transformer(TransformerShape(64, 32, 64, 1, 1, 64))


# (format, limit in GB that gives the placement today) -> (resident block layers, GB allocated at the peak of a 1024²
# image). Allocated: measured on an H200, 26 November 2026, the first plan's limits being none, 13, 8, 6, none and 8 GB.
# That plan left out the convolutions' workspace (0.54 GB) and the driver's context (0.82 GB), so it kept more layers:
# the same placements need higher limits now. Its row of 6 GB names no layers; they follow from the 6.0 GB it planned.
MEASURED = [
    ("bf16", None, 80, 16.0),
    ("bf16", 13, 80, 10.6),
    ("bf16", 9.32, 60, 8.4),
    ("bf16", 7.37, 44, 6.4),
    ("fp8", None, 80, 12.4),
    ("fp8", 7.92, 80, 7.0),
]


@pytest.mark.parametrize(("kind", "limit", "blocks", "allocated"), MEASURED)
def test_plan_matches_memory_measured_on_an_h200(kind: str, limit: float | None, blocks: int, allocated: float) -> None:
    memory = replace(card(141), limit=limit and round(limit * GB))
    found = plan(needs("4b", kind), memory, work())
    assert found.blocks == blocks
    # Observed: -0.05 to 0.11 GB; what was measured is rounded to 0.1.
    assert (allocated - 0.05) * GB <= found.peak <= allocated * GB + RESERVE


@pytest.mark.parametrize(
    ("kind", "limit", "blocks", "peak"),
    [("bf16", 13, 80, 10.7), ("bf16", 8, 49, 7.2), ("bf16", 6, 27, 5.2), ("fp8", 14, 80, 12.4), ("fp8", 13, 80, 7.0),
     ("fp8", 8, 80, 7.0), ("fp8", 6, 48, 5.1), ("nvfp4", 6, 80, 4.7)],
)  # fmt: skip
def test_limits_of_common_cards_give_these_plans(kind: str, limit: int, blocks: int, peak: float) -> None:
    """Compare with the first plan: 60 layers within 8 GB in bf16, and 44 within 6, were too many."""
    found = plan(needs("4b", kind), replace(card(141), limit=limit * GB), work())
    assert (found.blocks, round(found.peak / GB, 1)) == (blocks, peak)


@pytest.mark.parametrize("gigabytes", [13, 8, 6])
def test_memory_limit_includes_the_driver_context(gigabytes: int) -> None:
    found = plan(needs("4b"), replace(card(141), limit=gigabytes * GB), work())
    assert found.peak + CONTEXT <= gigabytes * GB


@pytest.mark.parametrize(("asked", "number"), [(None, 0), ("cuda", 0), ("cuda:1", 1)])
def test_limit_applies_to_the_chosen_gpu(monkeypatch: pytest.MonkeyPatch, asked: str | None, number: int) -> None:
    """torch's own function runs up to the driver: on a GPU without a number it had raised, and no model loaded."""
    chosen: list[torch.device] = []
    limits: list[tuple[float, int]] = []
    for name, answer in {"is_available": True, "device_count": 2, "is_bf16_supported": True}.items():
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer, **_: answer)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(device_module, "_fault", lambda name: "")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60, 80))
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_setMemoryFraction", lambda *given: limits.append(given), raising=False)
    device = Device.choose(asked)
    device.cap(20)
    device.cap(None)
    assert chosen == [device.device] == [torch.device("cuda", number)]
    assert limits == [(0.25, number), (1.0, number)]
