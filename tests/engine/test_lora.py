"""Tests that LoRAs of every producer change the same rows equally.

diffusers is the reference for the layouts that it reads.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from peft import LoraConfig
from torch import Tensor

from engine.families.klein.lora import Lora
from tests.engine import published
from tests.engine.loras import FORMS, LAYERS, RANK, ROW, H, bfl_fused, changed, factors, load, peft, weight_after, write


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


def test_adapter_saved_by_the_transformer_alone_keeps_its_alpha(folder: Path, tmp_path: Path) -> None:
    """diffusers then writes the settings without the prefix that a pipeline gives them."""
    torch.manual_seed(3)
    theirs = Flux2Transformer2DModel.from_pretrained(folder / "transformer")
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
    theirs.add_adapter(config)
    theirs.save_lora_adapter(tmp_path / "lora")
    theirs.fuse_lora()
    theirs.unload_lora()
    theirs.save_pretrained(tmp_path / "fused" / "transformer")
    ours = changed(folder, Lora(tmp_path / "lora" / "pytorch_lora_weights.safetensors")).state_dict()
    for name, weight in published.bfl_transformer(tmp_path / "fused").items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-5, atol=2e-6)


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


def test_several_loras_add_up_and_are_rounded_once(folder: Path, tmp_path: Path) -> None:
    one = Lora(write(bfl_fused(), tmp_path / "a.safetensors"), 0.5)
    both = changed(folder, one, Lora(one.path, 0.25)).state_dict()
    whole = changed(folder, Lora(one.path, 0.75)).state_dict()
    for name in both:
        torch.testing.assert_close(both[name], whole[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "spelling", ["lora_{}.default_0.weight", "lora_{}.my-style.weight", "lora_{}", "_.lora_{}.weight"]
)
def test_adapter_name_inside_a_key_is_ignored(spelling: str, folder: Path, tmp_path: Path) -> None:
    up, down = factors(H, H, 7)
    dot = "" if spelling.startswith("_") else "."
    tensors = {f"diffusion_model.{ROW}{dot}{spelling.format(side)}": value for side, value in (("A", down), ("B", up))}
    before = load(folder / "transformer").get_parameter(f"{ROW}.weight")
    got = weight_after(folder, tensors, tmp_path)
    torch.testing.assert_close(got, before + up @ down, rtol=1e-5, atol=1e-6)
