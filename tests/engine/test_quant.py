"""Tests of loading and writing quantised weights.

Each published layout loads layer by layer, as close to the original as its format allows.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine.checkpoints import quant
from engine.checkpoints.quant import QuantLinear, fp8, nvfp4
from engine.checkpoints.quant.fp8 import Fp8Linear
from engine.checkpoints.quant.nvfp4 import Nvfp4Linear
from engine.checkpoints.tensors import Tensors
from engine.contract import BadWeights
from engine.families.klein import components
from engine.families.klein.components import QuantPolicy
from engine.families.klein.transformer import Transformer
from engine.memory.device import Device, multiplies_fp4
from tests.engine import published
from tests.engine.peak import Peak

CPU = Device(torch.device("cpu"), torch.float32)
ALLOWED = {"fp8": 0.04, "nvfp4": 0.15}
"""Relative error of a layer's outputs and weights. Observed here: fp8 0.026, nvfp4 0.10."""


def load(path: Path, wanted: str | None = None, placement: Device = CPU) -> Transformer:
    part = components.transformer(path, QuantPolicy(wanted), placement.device)
    list(part.load(placement))
    return part.module


def weight(module: nn.Module, layer: str) -> Tensor:
    """Compute a layer's effective weight from its outputs for unit vectors.

    This measures the weight the way it is used.
    """
    linear = module.get_submodule(layer)
    return linear(torch.eye(linear.in_features)).T  # type: ignore[arg-type]


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs.float()).norm() / theirs.float().norm())


def layers(tensors: dict[str, Tensor]) -> list[str]:
    return [name.removesuffix(".weight") for name in tensors if published.BLOCK_LINEAR.fullmatch(name)]


@pytest.fixture(params=["fp8", "nvfp4"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def file(kind: str, bfl: dict[str, Tensor], tmp_path: Path) -> Path:
    tensors, metadata = published.quantised(bfl, kind)
    return published.write(tensors, tmp_path / f"flux-2-klein-4b-{kind}.safetensors", metadata)


def test_every_layer_equals_the_original_within_its_format(kind: str, file: Path, bfl: dict[str, Tensor]) -> None:
    module = load(file)
    assert len(layers(bfl)) == 2 * 8 + 2 * 2
    for layer in layers(bfl):
        linear = module.get_submodule(layer)
        assert isinstance(linear, QuantLinear)
        assert linear.scheme == kind
        assert error(weight(module, layer), bfl[f"{layer}.weight"]) <= ALLOWED[kind], layer
    for name, tensor in bfl.items():
        if not published.BLOCK_LINEAR.fullmatch(name):
            assert torch.equal(module.state_dict()[name], tensor.bfloat16().float()), name


def test_layers_stored_in_bf16_stay_in_bf16(kind: str, bfl: dict[str, Tensor], tmp_path: Path) -> None:
    tensors, metadata = published.quantised(bfl, kind, keep=r"double_blocks\.1\.img_attn\.proj")
    module = load(published.write(tensors, tmp_path / "some.safetensors", metadata))
    kept = module.get_submodule("double_blocks.1.img_attn.proj")
    assert isinstance(kept, nn.Linear)
    assert torch.equal(kept.weight, bfl["double_blocks.1.img_attn.proj.weight"].bfloat16().float())
    assert isinstance(module.get_submodule("double_blocks.0.img_attn.proj"), QuantLinear)


def test_format_is_found_from_tensors_without_header_metadata(kind: str, bfl: dict[str, Tensor], tmp_path: Path):
    tensors, _ = published.quantised(bfl, kind)
    module = load(published.write(tensors, tmp_path / "silent.safetensors"))
    for layer in layers(bfl):
        assert error(weight(module, layer), bfl[f"{layer}.weight"]) <= ALLOWED[kind]


def test_missing_input_scale_does_not_matter(kind: str, bfl: dict[str, Tensor], tmp_path: Path) -> None:
    tensors, metadata = published.quantised(bfl, kind)
    some = {name: tensor for name, tensor in tensors.items() if not name.endswith("input_scale")}
    module = load(published.write(some, tmp_path / "half.safetensors", metadata))
    for layer in layers(bfl):
        assert error(weight(module, layer), bfl[f"{layer}.weight"]) <= ALLOWED[kind]


@pytest.mark.parametrize("wrong", ["nibbles", "scales"])
def test_wrong_nibble_or_scale_order_would_be_detected(
    wrong: str, bfl: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wrong == "nibbles":
        unpack = nvfp4.unpack
        swapped = lambda codes, pairs: unpack(codes, pairs).unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # noqa: E731
        monkeypatch.setattr(nvfp4, "unpack", swapped)
    else:
        monkeypatch.setattr(nvfp4, "linear_order", lambda scales: scales)
    # Groups differ much in magnitude, as in trained weights. With equal groups a wrong scale would not show.
    torch.manual_seed(0)
    loud = {n: t * torch.rand(t.shape[0], 1).mul(4).exp() if published.BLOCK_LINEAR.fullmatch(n) else t
            for n, t in bfl.items()}  # fmt: skip
    tensors, metadata = published.quantised(loud, "nvfp4")
    module = load(published.write(tensors, tmp_path / "wrong.safetensors", metadata))
    worst = [error(weight(module, layer), loud[f"{layer}.weight"]) for layer in layers(bfl)]
    assert min(worst) > 2 * ALLOWED["nvfp4"]


def test_our_own_packing_is_the_published_one(bfl: dict[str, Tensor]) -> None:
    weight = bfl["single_blocks.0.linear1.weight"]
    ours, theirs = nvfp4.encode(weight), published.nvfp4(weight)
    assert torch.equal(ours["weight_scale"].view(torch.uint8), theirs["weight_scale"].view(torch.uint8))
    # A value half-way between two codes may go either way.
    assert (ours["weight"] == theirs["weight"]).float().mean() > 0.999
    assert torch.equal(nvfp4.blocked_order(nvfp4.linear_order(ours["weight_scale"].view(torch.uint8))),
                       ours["weight_scale"].view(torch.uint8))  # fmt: skip
    ours, theirs = fp8.encode(weight), published.fp8(weight)
    assert torch.equal(ours["weight"].view(torch.uint8), theirs["weight"].view(torch.uint8))
    assert torch.equal(ours["weight_scale"], theirs["weight_scale"])


@pytest.mark.parametrize("pack", [fp8, nvfp4])
def test_packing_needs_little_extra_memory(pack: Any) -> None:
    """Quantise without fp32 copies of whole layers.

    A card that just fits the model has no memory for an fp32 copy of its largest layer.
    """
    weight = torch.randn(27648, 512, dtype=torch.bfloat16)
    with Peak() as peak:
        packed = pack.encode(weight)
    # Extra memory as a multiple of the packed rows, without the result. Observed: 1.30; nvfp4 in one piece: 15.8.
    assert peak.bytes < sum(tensor.nbytes for tensor in packed.values()) + 1.5 * weight.nbytes


def test_any_file_can_be_quantised_while_it_loads(kind: str, folder: Path, bfl: dict[str, Tensor]) -> None:
    module = load(folder / "transformer", kind)
    for layer in layers(bfl):
        linear = module.get_submodule(layer)
        assert isinstance(linear, QuantLinear)
        assert linear.scheme == kind
        assert error(weight(module, layer), bfl[f"{layer}.weight"]) <= ALLOWED[kind]
    assert isinstance(module.img_in, nn.Linear)


def test_four_bit_file_can_load_as_eight_bit(bfl: dict[str, Tensor], tmp_path: Path) -> None:
    tensors, metadata = published.quantised(bfl, "nvfp4")
    module = load(published.write(tensors, tmp_path / "f.safetensors", metadata), "fp8")
    for layer in layers(bfl):
        assert isinstance(module.get_submodule(layer), Fp8Linear)
        assert error(weight(module, layer), bfl[f"{layer}.weight"]) <= ALLOWED["nvfp4"]


def test_native_layer_equals_a_dequantised_one(bfl: dict[str, Tensor]) -> None:
    """Use the same torch call as on the GPU.

    The CPU implements it too, only slowly.
    """
    torch.manual_seed(1)
    original = bfl["single_blocks.1.linear2.weight"]
    x = torch.randn(2, 32, original.shape[1], dtype=torch.bfloat16)
    for input_scale in (None, torch.tensor(4.5 / 448)):
        layer = Fp8Linear(original.shape[1], original.shape[0], native=True)
        layer.load_tensors(fp8.encode(original) | ({} if input_scale is None else {"input_scale": input_scale}))
        native = layer(x)
        layer.native = False
        assert native.dtype == torch.bfloat16
        assert native.shape == (2, 32, original.shape[0])
        assert error(native.float(), layer(x)) <= ALLOWED["fp8"]
        assert error(native.float(), x.float() @ original.T) <= 2 * ALLOWED["fp8"]


def quantise_whole(rows: Tensor) -> Tensor:
    """Quantise activations with one scale for all rows, and return what the codes mean."""
    scale = rows.abs().max() / fp8.LARGEST
    return (rows / scale).clamp(-fp8.LARGEST, fp8.LARGEST).to(fp8.CODE).float() * scale


@pytest.mark.parametrize("spread", [1.0, 30.0, 1000.0])
def test_scales_by_row_are_no_less_accurate_than_one_scale(spread: float, bfl: dict[str, Tensor]) -> None:
    """Multiply rows whose sizes differ by up to `spread`, as tokens of one image do."""
    original = bfl["single_blocks.1.linear2.weight"]
    generator = torch.Generator().manual_seed(2)
    sizes = torch.logspace(0, -math.log10(spread), 64)[:, None]
    x = torch.randn(64, original.shape[1], generator=generator) * sizes
    codes, scale = fp8.quantise_rows(x)
    errors = []
    for meant in (codes.float() * scale, quantise_whole(x)):
        off = (meant @ original.T - x @ original.T).norm(dim=1) / (x @ original.T).norm(dim=1)
        errors.append(off)
    by_row, whole = errors
    # Observed, mean and largest error of the rows: 0.026 and 0.033 either way, for every spread.
    assert float(by_row.mean()) <= 1.02 * float(whole.mean())
    assert float(by_row.max()) <= 1.3 * float(whole.max())


def test_largest_value_of_every_row_becomes_the_largest_code() -> None:
    """Nothing is clamped: 464 and more would become NaN."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4096, 48, generator=generator) * torch.logspace(-30, 30, 4096)[:, None]
    for rows in (x, x.bfloat16()):
        codes, _ = fp8.quantise_rows(rows)
        assert bool((codes.float().abs().amax(dim=1) == fp8.LARGEST).all())
    codes, _ = fp8.quantise_rows(torch.zeros(2, 48))
    assert not codes.float().any()


def test_scale_of_the_file_is_used_for_activations(bfl: dict[str, Tensor], tmp_path: Path) -> None:
    tensors, metadata = published.quantised(bfl, "fp8")
    module = load(published.write(tensors, tmp_path / "f.safetensors", metadata))
    layer = module.get_submodule(layers(bfl)[0])
    assert isinstance(layer, Fp8Linear)
    assert layer.input_scale is not None
    assert float(layer.input_scale) == pytest.approx(0.02)
    layer.native = True
    x = torch.randn(4, layer.in_features, dtype=torch.bfloat16)
    clamped = x.clone()
    # 448 · 0.02 = 8.96 is the largest number that this scale can hold.
    x[0, 0], clamped[0, 0] = 20.0, 8.96
    assert torch.equal(layer(x), layer(clamped))
    layer.input_scale = None
    assert not torch.equal(layer(x), layer(clamped))


def blackwell(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Emulate torch's product of two nvfp4 matrices.

    It requires row-major times column-major matrices, and whole blocks of scales.
    """
    assert (a.dtype, b.dtype, a.stride(1), b.stride(0)) == (torch.float4_e2m1fn_x2,) * 2 + (1, 1)
    assert all(codes % 128 == 0 for codes in (a.shape[0], b.shape[1]))
    one = torch.ones((), device="cpu")
    left, right = (
        nvfp4.decode({"weight": codes.view(torch.uint8), "weight_scale": scales, "weight_scale_2": one}, torch.float32)
        for codes, scales in ((a, scale_a), (b.t(), scale_b))
    )
    return (left @ right.T).to(out_dtype)


def test_blackwell_multiplies_four_bit_weights_natively(
    bfl: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "_scaled_mm", blackwell)
    torch.manual_seed(1)
    original = bfl["single_blocks.1.linear2.weight"]
    x = torch.randn(2, 30, original.shape[1], dtype=torch.bfloat16)
    for input_scale in (None, torch.tensor(4.5 / (448 * 6))):
        layer = Nvfp4Linear(original.shape[1], original.shape[0], native=True)
        layer.load_tensors(published.nvfp4(original) | ({} if input_scale is None else {"input_scale": input_scale}))
        if input_scale is None:
            layer.input_scale = None
        native = layer(x)
        assert (native.dtype, native.shape) == (torch.bfloat16, (2, 30, original.shape[0]))
        layer.native = False
        assert error(native.float(), layer(x)) <= ALLOWED["nvfp4"]
        assert error(native.float(), x.float() @ original.T) <= 1.5 * ALLOWED["nvfp4"]


def test_device_without_correct_four_bit_products_is_not_native(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def cannot(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("not supported")

    def wrong(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype) -> Tensor:
        return blackwell(a, b, scale_a, scale_b.flip(0), out_dtype)

    cpu = torch.device("cpu")
    for can, product, native in ((True, blackwell, True), (True, wrong, False), (True, cannot, False),
                                 (False, cannot, False)):  # fmt: skip
        nvfp4.multiplies.cache_clear()
        monkeypatch.setattr(nvfp4, "multiplies_fp4", lambda device, can=can: can)
        monkeypatch.setattr(torch, "_scaled_mm", product)
        with torch.device("meta"):
            linear = nn.Linear(128, 128, bias=False)
            assert quant.MEMORY_SCHEMES["nvfp4"].make(linear, cpu, full_precision=False).native is native
            assert quant.MEMORY_SCHEMES["nvfp4"].make(linear, cpu, full_precision=True).native is False
    nvfp4.multiplies.cache_clear()
    for capability, native in (((8, 9), False), ((9, 0), False), ((10, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert multiplies_fp4(torch.device("cuda")) is native


class NoConstants(TorchDispatchMode):
    """Refuses tensors made of Python's numbers: a CUDA graph captures no copy from host memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten.lift_fresh.default, "a constant is made"
        return func(*args, **(kwargs or {}))


LAYERS = {"fp8": (Fp8Linear, fp8), "nvfp4": (Nvfp4Linear, nvfp4)}


@pytest.mark.parametrize("native", [False, True])
def test_quantised_layer_makes_no_constants_while_it_computes(
    kind: str, native: bool, bfl: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AssertionError, match="a constant"), NoConstants():
        torch.tensor([1.0])
    monkeypatch.setattr(torch, "_scaled_mm", lambda a, b, **_: torch.zeros(a.shape[0], b.shape[1]))
    original = bfl["single_blocks.1.linear2.weight"].bfloat16()
    make, scheme = LAYERS[kind]
    layer = make(original.shape[1], original.shape[0], native=native)
    stored = scheme.encode(original)
    layer.load_tensors(dict(stored))
    x = torch.randn(3, original.shape[1], dtype=torch.bfloat16)
    with NoConstants():
        out = layer(x)
    if not native:
        assert error(out, x @ scheme.decode(stored, x.dtype).T) < 0.01


def test_model_in_fp32_rounds_no_inputs_to_codes(
    kind: str, bfl: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "_scaled_mm", lambda *_, **__: pytest.fail("multiplied in the layer's own format"))
    original = bfl["single_blocks.1.linear2.weight"]
    make, scheme = LAYERS[kind]
    for static in ({}, {"input_scale": torch.tensor(0.01)}):
        layer = make(original.shape[1], original.shape[0], native=True)
        layer.load_tensors(scheme.encode(original) | static)
        x = torch.randn(3, original.shape[1])
        native, layer.native = layer(x), False
        assert torch.equal(native, layer(x))


def rotated(tensors: dict[str, Tensor], prefix: str, declared: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Store block linears as int8 with ConvRot, in groups of 16 columns.

    prefix: of the tensors' names. declared: of the layers' names in the header.
    """
    h4 = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float32)
    h = torch.kron(h4, h4) / 4
    out, markers = {}, {}
    for name, tensor in tensors.items():
        out[prefix + name] = tensor
        if published.BLOCK_LINEAR.fullmatch(name):
            turned = torch.cat([group @ h.T for group in tensor.float().split(16, dim=1)], dim=1)
            scale = turned.abs().max() / 127
            out[prefix + name] = (turned / scale).round().to(torch.int8)
            layer = name.removesuffix(".weight")
            out[f"{prefix}{layer}.weight_scale"] = scale
            markers[declared + layer] = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16}
    return out, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": markers})}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("declared", ["", "model.diffusion_model."])
def test_header_may_name_layers_with_a_prefix(
    prefix: str, declared: str, bfl: dict[str, Tensor], tmp_path: Path
) -> None:
    """Rotated weights whose marker is not found load as noise."""
    tensors, metadata = rotated(bfl, prefix, declared)
    module = load(published.write(tensors, tmp_path / "turned.safetensors", metadata))
    for layer in layers(bfl):
        # Observed: 0.011 at most, and 1.2 at least without the marker.
        assert error(weight(module, layer), bfl[f"{layer}.weight"]) < 0.03


def test_every_shard_declares_its_own_layers(bfl: dict[str, Tensor], tmp_path: Path) -> None:
    shards = {}
    for number, start in enumerate(("double_blocks.", "single_blocks.")):
        some = {name: tensor for name, tensor in bfl.items() if name.startswith(start)}
        tensors, metadata = rotated(some, "", "")
        file = published.write(tensors, tmp_path / f"model-{number}.safetensors", metadata)
        shards |= dict.fromkeys(tensors, file.name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    found = Tensors.folder(tmp_path).quantised
    assert {name: stored.options["group"] for name, stored in found.items()} == {
        f"{layer}.weight": 16 for layer in layers(bfl)
    }


def test_comfyui_markers_are_read(kind: str, bfl: dict[str, Tensor], tmp_path: Path) -> None:
    tensors, metadata = published.quantised(bfl, kind)
    layout = json.loads(metadata["_quantization_metadata"])["layers"]
    for layer, entry in layout.items():
        text = json.dumps(entry | {"full_precision_matrix_mult": True}).encode()
        tensors[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    module = load(published.write(prefixed, tmp_path / "comfy.safetensors"))
    for layer in layers(bfl):
        assert error(weight(module, layer), bfl[f"{layer}.weight"]) <= ALLOWED[kind]
        assert not getattr(module.get_submodule(layer), "native", False)


def test_older_comfyui_markers_are_read(bfl: dict[str, Tensor], tmp_path: Path) -> None:
    tensors, _ = published.quantised(bfl, "fp8")
    older = {
        name.replace("weight_scale", "scale_weight").replace("input_scale", "scale_input"): tensor
        for name, tensor in tensors.items()
    }
    older["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    module = load(published.write(older, tmp_path / "older.safetensors"))
    for layer in layers(bfl):
        assert error(weight(module, layer), bfl[f"{layer}.weight"]) <= ALLOWED["fp8"]


def test_raw_fp8_cast_is_loaded_without_scales(bfl: dict[str, Tensor], tmp_path: Path) -> None:
    raw = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in bfl.items()}
    module = load(published.write(raw, tmp_path / "raw.safetensors"))
    for layer in layers(bfl):
        assert torch.equal(weight(module, layer), raw[f"{layer}.weight"].float())
    assert torch.equal(module.img_in.weight, raw["img_in.weight"].float())
    norm = "single_blocks.0.norm.query_norm.scale"
    assert torch.equal(module.state_dict()[norm], raw[norm].float())


def test_other_formats_are_refused_by_name(bfl: dict[str, Tensor], tmp_path: Path) -> None:
    tensors, metadata = published.quantised(bfl, "fp8")
    layout = metadata["_quantization_metadata"].replace("float8_e4m3fn", "awq_w4a16")
    file = published.write(tensors, tmp_path / "int8.safetensors", {"_quantization_metadata": layout})
    with pytest.raises(BadWeights, match=r"quantised as awq_w4a16, which is not read; read are float8_e4m3fn"):
        load(file)
    packed = {n: t for n, t in published.quantised(bfl, "nvfp4")[0].items() if "scale" not in n}
    with pytest.raises(BadWeights, match="packed in a format that is not read"):
        load(published.write(packed, tmp_path / "packed.safetensors"))


def test_scales_of_other_formats_are_refused_before_reading(kind: str, bfl: dict[str, Tensor], tmp_path: Path) -> None:
    """Refuse scale layouts of other formats.

    They are powers of two for 64 weights, a scale per column, another block size, and two scales for one layer.
    """
    name = "single_blocks.0.linear1.weight_scale"
    e8m0 = torch.zeros(9 * 128, 2, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    one_of_32 = torch.zeros(9 * 128, 4).to(torch.float8_e4m3fn)
    for scale in (e8m0, torch.ones(1, 128), one_of_32, torch.ones(2)):
        tensors, metadata = published.quantised(bfl, kind)
        file = published.write(tensors | {name: scale}, tmp_path / "odd.safetensors", metadata)
        with pytest.raises(BadWeights, match=rf"{name} is \w+ \[.*\]: a scaling that is not read"):
            components.transformer(file)


def test_unsupported_dtypes_and_shapes_are_named(bfl: dict[str, Tensor], tmp_path: Path) -> None:
    eight = {name: t.to(torch.int8) if published.BLOCK_LINEAR.fullmatch(name) else t for name, t in bfl.items()}
    with pytest.raises(BadWeights, match=r"double_blocks\.\S+ is stored as I8, which is not read"):
        load(published.write(eight, tmp_path / "int8.safetensors"))
    for name in ("img_in.weight", "txt_in.weight", "single_blocks.0.linear2.weight"):
        flat = published.write(bfl | {name: bfl[name].flatten()}, tmp_path / "flat.safetensors")
        with pytest.raises(BadWeights, match=r"is not a FLUX\.2 \[klein\] transformer: a weight of it is not a matrix"):
            load(flat)


def test_metal_gets_dequantised_weights_because_it_lacks_fp8(kind: str, file: Path) -> None:
    """Check the decision for a fake device, not its computation."""
    part = components.transformer(file, None, torch.device("mps"))
    assert not any(isinstance(layer, QuantLinear) for layer in part.module.modules())
    assert quant.memory_scheme(None, "fp8", torch.device("mps")) is None
    list(part.load(CPU))
    assert not any(parameter.is_meta for parameter in part.module.parameters())


def test_quantised_layer_uses_the_memory_of_its_codes(bfl: dict[str, Tensor]) -> None:
    weight = bfl["single_blocks.0.linear1.weight"].bfloat16()
    eight, four = Fp8Linear(128, weight.shape[0]), Nvfp4Linear(128, weight.shape[0])
    eight.load_tensors(fp8.encode(weight))
    four.load_tensors(nvfp4.encode(weight))
    sizes = [sum(b.nbytes for b in layer.buffers()) for layer in (eight, four)]
    constants = four.pairs.nbytes + four.middles.nbytes
    assert constants < 2100
    assert sizes == [weight.numel() + 4, weight.numel() // 2 + weight.numel() // 16 + 4 + constants]


def test_quantised_checkpoint_has_its_own_fingerprint(bfl: dict[str, Tensor], tmp_path: Path) -> None:
    prints = set()
    for kind in ("fp8", "nvfp4"):
        tensors, metadata = published.quantised(bfl, kind)
        prints.add(components.transformer(published.write(tensors, tmp_path / kind, metadata)).tensors.fingerprint())
    save_file(bfl, tmp_path / "bf16")
    prints.add(components.transformer(tmp_path / "bf16").tensors.fingerprint())
    assert len(prints) == 3
