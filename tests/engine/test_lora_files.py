"""Tests that LoRA files are found, scaled by what lies beside them, and refused with a reason."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.contract import BadWeights, InvalidJob, ModelNotFound
from engine.families.klein import lora
from engine.families.klein.lora import Lora
from tests.engine.loras import LAYERS, RANK, ROW, H, bfl_fused, changed, factors, load, peft, write


def test_lora_for_another_base_is_refused_with_both_shapes(folder: Path, tmp_path: Path) -> None:
    up, down = factors(12288, 4096, 0)
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    file = write({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, tmp_path / "nine.safetensors")
    with pytest.raises(BadWeights, match=r"nine\.safetensors was made for another base.*12288×4096.*384×128.*4B LoRAs"):
        changed(folder, Lora(file))


@pytest.mark.parametrize("products", [("lokr_w1_a", "lokr_w1_b"), ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")])
def test_product_of_another_shape_is_refused_before_it_is_computed(
    products: tuple[str, ...], folder: Path, tmp_path: Path
) -> None:
    """Written out, the product of two of these tensors of 8 MB would take 281 TB."""
    shapes = {leaf: (2**23, 1) if leaf.endswith("a") else (1, 2**23) for leaf in products}
    if "lokr_w1_a" in products:
        shapes["lokr_w2"] = (1, 1)
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    tensors = {f"{name}.{leaf}": torch.zeros(shape, dtype=torch.float8_e4m3fn) for leaf, shape in shapes.items()}
    with pytest.raises(BadWeights, match=r"was made for another base.*8388608×8388608"):
        changed(folder, Lora(write(tensors, tmp_path / "odd.safetensors")))


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
        ('{"transformer.lora_alpha": "16"}', "lora_alpha is '16', not a number"),
        ('{"transformer.lora_alpha": NaN}', "lora_alpha is 'nan', not a number"),
        ('{"lora_alpha": "16"}', "lora_alpha is '16', not a number"),
        ('{"transformer.alpha_pattern": {"([a-z_.]+)+!": 1}}', "repeats too much"),
    ],
)
def test_error_names_invalid_training_settings(training: str, says: str, folder: Path, tmp_path: Path) -> None:
    save_file(peft(), tmp_path / "odd.safetensors", {"lora_adapter_metadata": training})
    with pytest.raises(BadWeights, match=says):
        changed(folder, Lora(tmp_path / "odd.safetensors"))


@pytest.mark.parametrize(
    ("leaf", "tensor", "says"),
    [
        ("lora_A.weight", torch.zeros(H), r"has the shape \[128\]"),
        ("hada_w1_a", torch.zeros(2, 2, 2), r"has the shape \[2, 2, 2\]"),
        ("alpha", torch.zeros(0), r"has the shape \[0\]"),
        ("diff", torch.zeros(()), r"has the shape \[\]"),
        ("lora_A.weight", torch.zeros(RANK, H, dtype=torch.bool), "is stored as BOOL, which is not read"),
    ],
)
def test_misshapen_tensor_is_refused_in_one_line(
    leaf: str, tensor: Tensor, says: str, folder: Path, tmp_path: Path
) -> None:
    name = "diffusion_model.double_blocks.0.img_attn.proj"
    others = {f"{name}.lora_A.weight": torch.zeros(RANK, H), f"{name}.lora_B.weight": torch.zeros(H, RANK)}
    file = write(others | {f"{name}.{leaf}": tensor}, tmp_path / "odd.safetensors")
    with pytest.raises(BadWeights, match=says):
        changed(folder, Lora(file))


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
    for odd in ("/" + "x" * 5000, "~no-such-user/ink.safetensors", "i\0nk"):
        with pytest.raises(ModelNotFound, match="No LoRA"):
            lora.resolve_lora(odd, [tmp_path])
    loud = file.with_name("Oils.SAFETENSORS")
    save_file({"x": torch.zeros(1)}, loud)
    assert lora.resolve_lora("Oils", [tmp_path]) == lora.resolve_lora("Oils.SAFETENSORS", [tmp_path]) == Lora(loud)
    colon = file.with_name("ink: the second.safetensors")
    save_file({"x": torch.zeros(1)}, colon)
    assert lora.resolve_lora(str(colon), []) == Lora(colon)
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


@pytest.mark.parametrize("rslora", [False, True])
def test_a_config_beside_the_file_scales_it(rslora: bool, folder: Path, tmp_path: Path) -> None:
    """Check an adapter as peft saves it.

    Only adapter_config.json has alpha, patterns and rsLoRA.
    """
    up, down = factors(H, H, 6)
    before = load(folder / "transformer").get_parameter(f"{ROW}.weight")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    key = f"base_model.model.{ROW}"
    file = write({f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}, adapter / "adapter_model.safetensors")
    config = {"lora_alpha": 3.0, "r": RANK, "use_rslora": rslora}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    scale = 3.0 / (RANK**0.5 if rslora else RANK)
    for lora_file in (Lora(file), lora.resolve_lora(str(adapter), [])):
        got = changed(folder, lora_file).get_parameter(f"{ROW}.weight")
        torch.testing.assert_close(got, before + scale * up @ down, rtol=1e-5, atol=1e-6)
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {"img_attn.proj": 1.0}}))
    got = changed(folder, Lora(file)).get_parameter(f"{ROW}.weight")
    torch.testing.assert_close(got, before + scale / 3 * up @ down, rtol=1e-5, atol=1e-6)


def test_config_of_a_lokr_names_its_alpha_without_a_prefix(folder: Path, tmp_path: Path) -> None:
    w1, (a, b) = torch.randn(4, 4), factors(32, 32, 6)
    before = load(folder / "transformer").get_parameter(f"{ROW}.weight")
    tensors = {f"base_model.model.{ROW}.lokr_{leaf}": part for leaf, part in (("w1", w1), ("w2_a", a), ("w2_b", b))}
    file = write(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LOKR", "alpha": 8, "r": RANK}))
    got = changed(folder, Lora(file)).get_parameter(f"{ROW}.weight")
    torch.testing.assert_close(got, before + 8 / RANK * torch.kron(w1, a @ b), rtol=1e-4, atol=1e-5)


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
