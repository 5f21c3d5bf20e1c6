"""Tests that LoRAs of every producer change the same rows equally.

diffusers is the reference for the layouts that it reads.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.checkpoints.quant import MEMORY_SCHEMES
from engine.contract import BadWeights, InvalidJob, ModelNotFound
from engine.families.klein import components, lora
from engine.families.klein.components import QuantPolicy
from engine.families.klein.lora import Lora, LoraLinear
from engine.families.klein.lora.deltas import Kronecker
from engine.families.klein.transformer import Transformer
from engine.memory.device import Device
from tests.engine import published

CPU = Device(torch.device("cpu"), torch.float32)
RANK = 4
H = 128

# Our layer -> (rows, columns) in the toy.
LAYERS = {
    "double_blocks.0.img_attn.qkv": (3 * H, H),
    "double_blocks.1.txt_attn.qkv": (3 * H, H),
    "double_blocks.1.img_attn.proj": (H, H),
    "double_blocks.0.img_mlp.0": (6 * H, H),
    "double_blocks.0.txt_mlp.2": (H, 3 * H),
    "single_blocks.1.linear1": (9 * H, H),
    "single_blocks.0.linear2": (H, 4 * H),
}
DIFFUSERS = {
    "double_blocks.1.img_attn.proj": "transformer_blocks.1.attn.to_out.0",
    "double_blocks.0.img_mlp.0": "transformer_blocks.0.ff.linear_in",
    "double_blocks.0.txt_mlp.2": "transformer_blocks.0.ff_context.linear_out",
    "single_blocks.1.linear1": "single_transformer_blocks.1.attn.to_qkv_mlp_proj",
    "single_blocks.0.linear2": "single_transformer_blocks.0.attn.to_out",
}


def factors(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return (up, down) factors large enough to have a visible effect."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(s, generator=generator) * 0.3 for s in ((rows, RANK), (RANK, columns)))  # type: ignore[return-value]


def bfl_fused() -> dict[str, Tensor]:
    """Return LoRA tensors as ai-toolkit writes them."""
    out = {}
    for i, (layer, (rows, columns)) in enumerate(LAYERS.items()):
        up, down = factors(rows, columns, i)
        out |= {f"diffusion_model.{layer}.lora_A.weight": down, f"diffusion_model.{layer}.lora_B.weight": up}
    return out


def kohya(alpha: float = 2.0) -> dict[str, Tensor]:
    out = {}
    for i, (layer, (rows, columns)) in enumerate(LAYERS.items()):
        up, down = factors(rows, columns, i)
        name = f"lora_unet_{layer.replace('.', '_')}"
        out |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(alpha)}
    return out


def peft() -> dict[str, Tensor]:
    """Return LoRA tensors as diffusers saves them, with separate q, k and v."""
    out = {}
    for i, (layer, (rows, columns)) in enumerate(LAYERS.items()):
        up, down = factors(rows, columns, i)
        if layer.endswith("qkv"):
            block = f"transformer_blocks.{layer.split('.')[1]}.attn"
            names = ("to_q", "to_k", "to_v") if "img" in layer else ("add_q_proj", "add_k_proj", "add_v_proj")
            for name, part in zip(names, up.chunk(3), strict=True):
                out |= {
                    f"transformer.{block}.{name}.lora_A.weight": down.clone(),
                    f"transformer.{block}.{name}.lora_B.weight": part.contiguous(),
                }
        else:
            out |= {
                f"transformer.{DIFFUSERS[layer]}.lora_A.weight": down,
                f"transformer.{DIFFUSERS[layer]}.lora_B.weight": up,
            }
    return out


FORMS = {"peft": peft, "kohya": kohya, "BFL, fused": bfl_fused}


def write(tensors: dict[str, Tensor], file: Path) -> Path:
    save_file(tensors, file)
    return file


def load(path: Path, wanted: str | None = None) -> Transformer:
    part = components.transformer(path, QuantPolicy(wanted))
    list(part.load(CPU))
    return part.module


def changed(folder: Path, *loras: Lora, wanted: str | None = None) -> Transformer:
    module = load(folder / "transformer", wanted)
    lora.apply(module, [change for one in loras for change in lora.read(one, module).deltas])
    return module


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_weights_are_those_of_diffusers(form: str, scale: float, folder: Path, tmp_path: Path) -> None:
    file = write(FORMS[form](), tmp_path / "style.safetensors")
    theirs = fused(folder, file, scale, tmp_path)
    ours = changed(folder, Lora(file, scale)).state_dict()
    before = load(folder / "transformer").state_dict()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-5, atol=1e-6)
        touched = name.removesuffix(".weight") in LAYERS
        assert torch.equal(weight, before[name]) != touched, name


def fused(folder: Path, file: Path, scale: float, tmp_path: Path) -> dict[str, Tensor]:
    """Return the toy's transformer with the LoRA fused by diffusers, under BFL's names."""
    pipe = Flux2KleinPipeline.from_pretrained(folder)
    pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="style")
    pipe.set_adapters("style", scale)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.transformer.save_pretrained(tmp_path / "fused" / "transformer")
    return published.bfl_transformer(tmp_path / "fused")


def test_alpha_given_only_in_the_header_is_applied(folder: Path, tmp_path: Path) -> None:
    """Check an alpha that is in the header only.

    diffusers writes no alpha beside the weights, but stores the training settings in the header.
    """
    layers: dict[str, Any] = {name.removeprefix("transformer."): tensor for name, tensor in peft().items()}
    meta = {"r": RANK, "lora_alpha": 3 * RANK, "alpha_pattern": {"transformer_blocks.0.attn.to_q": RANK / 2},
            "rank_pattern": {}, "target_modules": sorted({name.partition(".lora_")[0] for name in layers})}  # fmt: skip
    Flux2KleinPipeline.save_lora_weights(
        tmp_path / "lora", transformer_lora_layers=layers, transformer_lora_adapter_metadata=meta
    )
    (file,) = (tmp_path / "lora").iterdir()
    theirs, ours = fused(folder, file, 1.0, tmp_path), changed(folder, Lora(file)).state_dict()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-5, atol=2e-6)
    without = changed(folder, Lora(write(peft(), tmp_path / "plain.safetensors"))).state_dict()
    assert not any(torch.allclose(without[f"{layer}.weight"], ours[f"{layer}.weight"], atol=1e-3) for layer in LAYERS)


def test_all_spellings_mean_the_same_rows(folder: Path, tmp_path: Path) -> None:
    """Check each producer's names for the same two changes.

    One changes q of an image stream, the other a full linear2.
    """
    up, down = factors(H, H, 1)
    up2, down2 = factors(H, 4 * H, 2)
    q = torch.cat([up, torch.zeros(2 * H, RANK)])
    fused, split = ("double_blocks.0.img_attn.qkv", q), ("transformer_blocks.0.attn.to_q", up)
    one, other = "single_blocks.0.linear2", "single_transformer_blocks.0.attn.to_out"
    forms = [
        ("diffusion_model.{}.lora_A.weight", "diffusion_model.{}.lora_B.weight", fused, one),
        ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight", fused, one),
        ("{}.lora_A.default.weight", "{}.lora_B.default.weight", fused, one),
        ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight", split, other),
        ("{}.lora_down.weight", "{}.lora_up.weight", split, other),
        ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", fused, one),
        ("lora_transformer_{}.lora_down.weight", "lora_transformer_{}.lora_up.weight", split, other),
        ("lycoris_{}.lora_down.weight", "lycoris_{}.lora_up.weight", split, other),
        ("diffusion_model.{}.lora_A.weight", "diffusion_model.{}.lora_B.weight",
         ("double_blocks.0.img_attn_qkv", q), one),
        ("{}.lora_A.weight", "{}.lora_B.weight", ("sformer_blocks.0.attn.to_q", up), other),
    ]  # fmt: skip
    want = None
    for i, (a, b, (first, first_up), second) in enumerate(forms):
        flat = "lora_" in a.split("{")[0] or "lycoris" in a
        names = [name.replace(".", "_") if flat else name for name in (first, second)]
        tensors = {a.format(names[0]): down, b.format(names[0]): first_up, a.format(names[1]): down2,
                   b.format(names[1]): up2}  # fmt: skip
        file = write({key: value.clone() for key, value in tensors.items()}, tmp_path / f"{i}.safetensors")
        ours = changed(folder, Lora(file)).state_dict()
        want = want or ours
        assert all(torch.equal(ours[name], want[name]) for name in want), a
    before = load(folder / "transformer").state_dict()["double_blocks.0.img_attn.qkv.weight"]
    assert want is not None
    delta = want["double_blocks.0.img_attn.qkv.weight"] - before
    torch.testing.assert_close(delta[:H], up @ down, rtol=1e-4, atol=1e-5)
    assert not delta[H:].any()


def test_halves_of_the_final_layer_are_swapped(folder: Path, tmp_path: Path) -> None:
    up, down = factors(2 * H, H, 3)
    theirs = write(
        {"transformer.norm_out.linear.lora_A.weight": down, "transformer.norm_out.linear.lora_B.weight": up},
        tmp_path / "theirs.safetensors",
    )
    scale, shift = up.chunk(2)
    name = "diffusion_model.final_layer.adaLN_modulation.1"
    ours = write(
        {f"{name}.lora_A.weight": down.clone(), f"{name}.lora_B.weight": torch.cat([shift, scale])},
        tmp_path / "ours.safetensors",
    )
    one, other = (changed(folder, Lora(file)).state_dict() for file in (theirs, ours))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_split_single_block_is_not_split_in_thirds(folder: Path, tmp_path: Path) -> None:
    up, down = factors(6 * H, H, 4)
    name = "transformer.single_transformer_blocks.1.proj_mlp"
    file = write({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, tmp_path / "mlp.safetensors")
    before, after = (m.state_dict()["single_blocks.1.linear1.weight"]
                     for m in (load(folder / "transformer"), changed(folder, Lora(file))))  # fmt: skip
    assert torch.equal(after[: 3 * H], before[: 3 * H])
    torch.testing.assert_close(after[3 * H :], before[3 * H :] + up @ down, rtol=1e-4, atol=1e-5)


def test_lokr_is_a_kronecker_product(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    w1, a, b = torch.randn(4, 4), torch.randn(32, 2), torch.randn(2, 32)
    key = "lycoris_transformer_blocks_1_attn_to_k"
    whole = {f"{key}.lokr_w1": w1, f"{key}.lokr_w2": a @ b, f"{key}.alpha": torch.tensor(99.0)}
    parts_of = {f"{key}.lokr_w1": w1, f"{key}.lokr_w2_a": a, f"{key}.lokr_w2_b": b, f"{key}.alpha": torch.tensor(1.0)}
    before = load(folder / "transformer").state_dict()["double_blocks.1.img_attn.qkv.weight"]
    for tensors, scale in ((whole, 1.0), (parts_of, 0.5)):
        file = write({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "lokr.safetensors")
        after = changed(folder, Lora(file)).state_dict()["double_blocks.1.img_attn.qkv.weight"]
        want = before.clone()
        want[H : 2 * H] += scale * torch.kron(w1, a @ b)
        torch.testing.assert_close(after, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["fp8", "nvfp4"])
def test_lora_leaves_the_codes_of_quantised_layers_unchanged(kind: str, folder: Path, tmp_path: Path) -> None:
    file = write(bfl_fused(), tmp_path / "style.safetensors")
    plain, quantised = load(folder / "transformer", kind), changed(folder, Lora(file, 0.5), wanted=kind)
    for i, (layer, (rows, columns)) in enumerate(LAYERS.items()):
        beside = quantised.get_submodule(layer)
        assert isinstance(beside, LoraLinear)
        before: Any = plain.get_submodule(layer).weight
        after: Any = beside.layer.weight
        assert torch.equal(after.view(torch.uint8), before.view(torch.uint8))
        x = torch.randn(2, 5, columns)
        up, down = factors(rows, columns, i)
        want = plain.get_submodule(layer)(x) + 0.5 * x @ (up @ down).T
        torch.testing.assert_close(beside(x), want, rtol=1e-4, atol=1e-4)


ROWS, COLUMNS = LAYERS["double_blocks.0.img_mlp.0"]
WHOLE: dict[str, dict[str, Tensor]] = {
    "diff": {"diff": torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))},
    "LoKr": {"lokr_w1": torch.randn(12, 4, generator=torch.Generator().manual_seed(2)),
             "lokr_w2": torch.randn(64, 32, generator=torch.Generator().manual_seed(3))},
    "LoHa": {f"hada_{name}": torch.randn(shape, generator=torch.Generator().manual_seed(4 + i)) for i, (name, shape)
             in enumerate({"w1_a": (ROWS, 4), "w1_b": (4, COLUMNS), "w2_a": (ROWS, 4), "w2_b": (4, COLUMNS)}.items())},
    "LoHa, too large for factors":
            {f"hada_{name}": torch.randn(shape, generator=torch.Generator().manual_seed(4 + i)) for i, (name, shape)
             in enumerate({"w1_a": (ROWS, 16), "w1_b": (16, COLUMNS), "w2_a": (ROWS, 16),
                           "w2_b": (16, COLUMNS)}.items())},
    "DoRA": {"lora_A.weight": torch.randn(4, COLUMNS, generator=torch.Generator().manual_seed(8)),
             "lora_B.weight": torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(9)),
             "dora_scale": torch.rand(ROWS, 1, generator=torch.Generator().manual_seed(9)) + 0.5},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["fp8", "nvfp4"])
@pytest.mark.parametrize("form", WHOLE)
def test_small_change_keeps_its_whole_effect_beside_a_quantised_layer(
    form: str, kind: str, folder: Path, tmp_path: Path
) -> None:
    """Compare with the change of the plain layer, at 2 % of the weight.

    Rounded into the codes, its error is larger than the change itself.
    """
    layer = "double_blocks.0.img_mlp.0"
    file = write({f"diffusion_model.{layer}.{leaf}": tensor for leaf, tensor in WHOLE[form].items()},
                 tmp_path / "whole.safetensors")  # fmt: skip
    plain = load(folder / "transformer").get_submodule(layer)
    before = plain(torch.eye(COLUMNS)).T
    whole = changed(folder, Lora(file, 1.0)).get_submodule(layer)(torch.eye(COLUMNS)).T - before
    strength = 0.02 * float(before.norm() / whole.norm())
    effect = changed(folder, Lora(file, strength)).get_submodule(layer)(torch.eye(COLUMNS)).T - before
    quantised = load(folder / "transformer", kind).get_submodule(layer)(torch.eye(COLUMNS)).T
    beside = changed(folder, Lora(file, strength), wanted=kind).get_submodule(layer)
    got = beside(torch.eye(COLUMNS)).T - quantised
    kept = float((got * effect).sum() / effect.square().sum())
    error = float((got - effect).norm() / effect.norm())
    # Observed: 0.999 to 1.001, and 0.000 in factors, 0.026 as a matrix, 0.067 for DoRA, which follows the weight.
    assert 0.99 < kept < 1.01
    assert error < (0.1 if form == "DoRA" else 0.035)
    scheme = MEMORY_SCHEMES[kind]
    rounded = scheme.decode(scheme.encode(before + effect), torch.float32, {}) - quantised
    # Observed: 1.4 in fp8, 3.7 in nvfp4.
    assert float((rounded - effect).norm() / effect.norm()) > 1.0


def test_several_loras_add_up_and_are_rounded_once(folder: Path, tmp_path: Path) -> None:
    one = Lora(write(bfl_fused(), tmp_path / "a.safetensors"), 0.5)
    both = changed(folder, one, Lora(one.path, 0.25)).state_dict()
    whole = changed(folder, Lora(one.path, 0.75)).state_dict()
    for name in both:
        torch.testing.assert_close(both[name], whole[name], rtol=1e-5, atol=1e-6)


def test_lora_for_another_base_is_refused_with_both_shapes(folder: Path, tmp_path: Path) -> None:
    up, down = factors(12288, 4096, 0)
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    file = write({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, tmp_path / "nine.safetensors")
    with pytest.raises(BadWeights, match=r"nine\.safetensors was made for another base.*12288×4096.*384×128.*4B LoRAs"):
        changed(folder, Lora(file))


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("transformer.transformer_blocks.7.attn.to_q.lora_A.weight", r"changes transformer\.transformer_blocks\.7"),
        ("lora_te_model_layers_0_self_attn_q_proj.lora_down.weight", "changes only the text encoder"),
        ("diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight", "lacks half of"),
        ("diffusion_model.double_blocks.0.img_attn.qkv.hada_w1_a", "lacks half of"),
        ("diffusion_model.double_blocks.0.img_attn.qkv.oft_R.weight", "uses oft_R"),
        ("img_in.weight", "something unknown, not a LoRA"),
    ],
)
def test_error_names_unsupported_keys(key: str, says: str, folder: Path, tmp_path: Path) -> None:
    file = write({key: torch.zeros(RANK, H)}, tmp_path / "odd.safetensors")
    with pytest.raises(BadWeights, match=says):
        changed(folder, Lora(file))


@pytest.mark.parametrize(
    ("training", "says"),
    [
        ("[]", r"The training settings of LoRA odd\.safetensors make no sense: they are a list"),
        ("{", r"The training settings of LoRA odd\.safetensors make no sense"),
    ],
)
def test_error_names_invalid_training_settings(training: str, says: str, folder: Path, tmp_path: Path) -> None:
    save_file(peft(), tmp_path / "odd.safetensors", {"lora_adapter_metadata": training})
    with pytest.raises(BadWeights, match=says):
        changed(folder, Lora(tmp_path / "odd.safetensors"))


def test_a_model_given_as_a_lora_is_refused(folder: Path, bfl: dict[str, Tensor], tmp_path: Path) -> None:
    file = write(bfl, tmp_path / "model.safetensors")
    with pytest.raises(BadWeights, match=r"model\.safetensors is transformer, not a LoRA"):
        changed(folder, Lora(file))


def test_a_lora_is_found_by_path_or_name_with_a_scale(tmp_path: Path) -> None:
    file = tmp_path / "models" / "loras" / "style" / "ink.safetensors"
    file.parent.mkdir(parents=True)
    save_file({"x": torch.zeros(1)}, file)
    assert lora.resolve_lora(f"{file}:0.8", []) == Lora(file, 0.8)
    assert lora.resolve_lora("ink:-0.5", [tmp_path]) == Lora(file, -0.5)
    assert lora.resolve_lora("ink.safetensors", [tmp_path]) == Lora(file, 1.0)
    dotted = file.with_name("ink-v1.5.safetensors")
    save_file({"x": torch.zeros(1)}, dotted)
    assert (
        lora.resolve_lora("ink-v1.5", [tmp_path])
        == lora.resolve_lora("ink-v1.5.safetensors:1", [tmp_path])
        == Lora(dotted)
    )
    with pytest.raises(ModelNotFound, match=r"No LoRA 'oil'; there are ink, ink-v1\.5"):
        lora.resolve_lora("oil", [tmp_path])
    with pytest.raises(ModelNotFound, match="No LoRA at"):
        lora.resolve_lora("/nowhere/x.safetensors:1", [])
    with pytest.raises(InvalidJob, match="scale of LoRA 'ink:strong' is 'strong'"):
        lora.resolve_lora("ink:strong", [tmp_path])


def test_the_fingerprint_follows_content_and_scale(tmp_path: Path) -> None:
    tensors = bfl_fused()
    a = Lora(write(tensors, tmp_path / "a.safetensors"))
    tensors[next(iter(tensors))] *= 1.01
    b = Lora(write(tensors, tmp_path / "b.safetensors"))
    prints = {a.fingerprint(), b.fingerprint(), Lora(a.path, 0.9).fingerprint()}
    assert len(prints) == 3
    assert load_file(a.path).keys() == load_file(b.path).keys()


# -- other kinds of change, each compared with a delta computed independently --------------------------------------

ROW = "double_blocks.1.img_attn.proj"
"""The layer that is changed, 128 × 128 in the toy."""


def weight_after(
    folder: Path, tensors: dict[str, Tensor], tmp_path: Path, layer: str = ROW, scale: float = 1.0
) -> Tensor:
    file = write({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "kind.safetensors")
    return changed(folder, Lora(file, scale)).get_parameter(f"{layer}.weight")


@pytest.fixture
def base(folder: Path) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in load(folder / "transformer").state_dict().items()}


def test_loha_is_a_product_of_two_low_ranks(folder: Path, base: dict[str, Tensor], tmp_path: Path) -> None:
    (a1, b1), (a2, b2) = factors(H, H, 1), factors(H, H, 2)
    key = f"lora_unet_{ROW.replace('.', '_')}"
    tensors = {f"{key}.hada_w1_a": a1, f"{key}.hada_w1_b": b1, f"{key}.hada_w2_a": a2, f"{key}.hada_w2_b": b2,
               f"{key}.alpha": torch.tensor(2.0)}  # fmt: skip
    want = base[f"{ROW}.weight"] + 0.5 * (2.0 / RANK) * ((a1 @ b1) * (a2 @ b2))
    torch.testing.assert_close(weight_after(folder, tensors, tmp_path, scale=0.5), want, rtol=1e-5, atol=1e-6)


def test_dora_by_rows_is_what_peft_merges(folder: Path, base: dict[str, Tensor], tmp_path: Path) -> None:
    """Check all three spellings against peft's own layer."""
    from peft import LoraConfig, get_peft_model

    up, down = factors(H, H, 3)
    weight = base[f"{ROW}.weight"]
    net = torch.nn.Sequential(torch.nn.Linear(H, H, bias=False))
    net[0].weight.data.copy_(weight)  # type: ignore
    model = get_peft_model(net, LoraConfig(r=RANK, lora_alpha=8, use_dora=True, target_modules=["0"]))  # type: ignore[arg-type]
    layer = model.base_model.model[0]  # type: ignore
    layer.lora_A["default"].weight.data.copy_(down)  # type: ignore
    layer.lora_B["default"].weight.data.copy_(up)  # type: ignore
    magnitude = torch.rand(H) + 0.5
    layer.lora_magnitude_vector["default"].weight.data.copy_(magnitude)  # type: ignore
    layer.merge()  # type: ignore
    want = layer.base_layer.weight.detach()  # type: ignore
    for spelling, value in (
        ("dora_scale", magnitude[:, None]),
        ("lora_magnitude_vector", magnitude),
        ("magnitude", magnitude),
    ):
        leaves = {"lora_A.weight": down, "lora_B.weight": up, "alpha": torch.tensor(8.0), spelling: value}
        tensors = {f"diffusion_model.{ROW}.{leaf}": tensor for leaf, tensor in leaves.items()}
        torch.testing.assert_close(weight_after(folder, tensors, tmp_path), want, rtol=1e-5, atol=1e-6)


def test_dora_by_columns_divides_by_norms_of_columns(folder: Path, base: dict[str, Tensor], tmp_path: Path) -> None:
    up, down = factors(H, H, 4)
    magnitude = torch.rand(1, H) + 0.5
    tensors = {f"{ROW}.lora_down.weight": down, f"{ROW}.lora_up.weight": up, f"{ROW}.dora_scale": magnitude}
    whole = base[f"{ROW}.weight"] + up @ down
    want = magnitude * whole / whole.norm(dim=0, keepdim=True)
    torch.testing.assert_close(weight_after(folder, tensors, tmp_path), want, rtol=1e-5, atol=1e-6)


def test_dora_on_part_of_a_fused_layer_leaves_the_rest(folder: Path, base: dict[str, Tensor], tmp_path: Path) -> None:
    up, down = factors(H, H, 5)
    magnitude, layer = torch.rand(H) + 0.5, "double_blocks.0.img_attn.qkv"
    key = "transformer.transformer_blocks.0.attn.to_k"
    tensors = {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up, f"{key}.lora_magnitude_vector": magnitude}
    want = base[f"{layer}.weight"].clone()
    rows = want[H : 2 * H] + up @ down
    want[H : 2 * H] = rows * (magnitude / rows.norm(dim=1))[:, None]
    torch.testing.assert_close(weight_after(folder, tensors, tmp_path, layer), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_config_beside_the_file_scales_it(
    rslora: bool, folder: Path, base: dict[str, Tensor], tmp_path: Path
) -> None:
    """Check an adapter as peft saves it.

    Only adapter_config.json has alpha, patterns and rsLoRA.
    """
    up, down = factors(H, H, 6)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    key = f"base_model.model.{ROW}"
    file = write({f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}, adapter / "adapter_model.safetensors")
    config = {"lora_alpha": 3.0, "r": RANK, "use_rslora": rslora}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    scale = 3.0 / (RANK**0.5 if rslora else RANK)
    for lora_file in (Lora(file), lora.resolve_lora(str(adapter), [])):
        got = changed(folder, lora_file).get_parameter(f"{ROW}.weight")
        torch.testing.assert_close(got, base[f"{ROW}.weight"] + scale * up @ down, rtol=1e-5, atol=1e-6)
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {"img_attn.proj": 1.0}}))
    got = changed(folder, Lora(file)).get_parameter(f"{ROW}.weight")
    torch.testing.assert_close(got, base[f"{ROW}.weight"] + scale / 3 * up @ down, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "spelling", ["lora_{}.default_0.weight", "lora_{}.my-style.weight", "lora_{}", "_.lora_{}.weight"]
)
def test_adapter_name_inside_a_key_is_ignored(
    spelling: str, folder: Path, base: dict[str, Tensor], tmp_path: Path
) -> None:
    up, down = factors(H, H, 7)
    dot = "" if spelling.startswith("_") else "."
    tensors = {f"diffusion_model.{ROW}{dot}{spelling.format(side)}": value for side, value in (("A", down), ("B", up))}
    got = weight_after(folder, tensors, tmp_path)
    torch.testing.assert_close(got, base[f"{ROW}.weight"] + up @ down, rtol=1e-5, atol=1e-6)


def test_norms_are_changed_and_weights_are_replaced(folder: Path, base: dict[str, Tensor], tmp_path: Path) -> None:
    norm = "single_blocks.0.norm.query_norm"
    delta, new = torch.randn(base[f"{norm}.scale"].shape[0]), torch.randn(H, H)
    tensors = {f"diffusion_model.{norm}.diff": delta, f"diffusion_model.{ROW}.set_weight": new,
               f"diffusion_model.{ROW}.diff_b": torch.zeros(H)}  # fmt: skip
    file = write(tensors, tmp_path / "extracted.safetensors")
    after = changed(folder, Lora(file, 0.5)).state_dict()
    torch.testing.assert_close(after[f"{norm}.scale"], base[f"{norm}.scale"] + 0.5 * delta)
    torch.testing.assert_close(after[f"{ROW}.weight"], base[f"{ROW}.weight"].lerp(new, 0.5), rtol=1e-5, atol=1e-6)


def test_text_encoder_keys_are_skipped_with_a_warning(folder: Path, tmp_path: Path) -> None:
    extra = {"lora_te1_model_layers_0_self_attn_q_proj.lora_down.weight": torch.zeros(RANK, 32)}
    file = write(bfl_fused() | extra, tmp_path / "both.safetensors")
    deltas, warnings = lora.read(Lora(file), load(folder / "transformer"))
    assert len(deltas) == len(LAYERS)
    assert warnings == ["LoRA both also changes the text encoder (1 layers), which is not applied"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_numbers_are_refused_on_reading(bad: float, folder: Path, tmp_path: Path) -> None:
    tensors = bfl_fused()
    name = next(iter(tensors))
    tensors[name][0, 0] = bad
    with pytest.raises(BadWeights, match=r"numbers that are not finite in diffusion_model.*its training diverged"):
        lora.read(Lora(write(tensors, tmp_path / "nan.safetensors")), load(folder / "transformer"))


def test_kronecker_product_is_never_materialised(folder: Path, tmp_path: Path) -> None:
    """Check that Kronecker products are computed a few rows at a time.

    All layers of a 4B written out in fp32 would take 15 GB.
    """
    w1, w2 = torch.randn(16, 4), torch.randn(24, 32)
    product = Kronecker(w1, w2)
    whole = torch.kron(w1, w2)
    assert product.shape == tuple(whole.shape)
    for begin, end in ((0, 384), (5, 30), (100, 101), (383, 384)):
        torch.testing.assert_close(product.rows(begin, end), whole[begin:end])
