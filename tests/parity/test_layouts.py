"""Tests that other layouts of the same weights generate the same image.

The parameter list must be the published one.
"""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLFlux2
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.checkpoints.key_map import KeyMap
from engine.checkpoints.loading import param_shapes
from engine.contract import BadWeights, EngineConfig, ModelNotFound, Rgb8
from engine.engine import Engine
from engine.families.klein import components
from engine.families.klein.key_maps import diffusers_autoencoder, diffusers_transformer
from engine.families.klein.transformer import Transformer, TransformerShape
from engine.memory.device import Device
from engine.nn.autoencoder import Autoencoder, AutoencoderShape
from tests import toys
from tests.parity.conftest import CASES, agreement, paint

COMPOSE = "compose, three references"


def bfl_transformer(folder: Path) -> dict[str, Tensor]:
    """Convert a diffusers folder to the tensors of BFL's single file.

    The mapping is written by hand, because the loader's own table would prove nothing.
    """
    theirs = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    count = {kind: 1 + max(int(n) for n in re.findall(rf"(?m)^{kind}\.(\d+)\.", "\n".join(theirs)))
             for kind in ("transformer_blocks", "single_transformer_blocks")}  # fmt: skip
    scale, shift = theirs["norm_out.linear.weight"].chunk(2)
    out = {
        "img_in.weight": theirs["x_embedder.weight"],
        "txt_in.weight": theirs["context_embedder.weight"],
        "time_in.in_layer.weight": theirs["time_guidance_embed.timestep_embedder.linear_1.weight"],
        "time_in.out_layer.weight": theirs["time_guidance_embed.timestep_embedder.linear_2.weight"],
        "final_layer.adaLN_modulation.1.weight": torch.cat([shift, scale]),
        "final_layer.linear.weight": theirs["proj_out.weight"],
    }
    for stream in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
        out[f"{stream}.lin.weight"] = theirs[f"{stream}.linear.weight"]
    for i in range(count["transformer_blocks"]):
        a, b = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for here, q, k, v, proj, norm, mlp in (
            ("img", "to_q", "to_k", "to_v", "to_out.0", "norm_", "ff"),
            ("txt", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_added_", "ff_context"),
        ):
            out[f"{b}.{here}_attn.qkv.weight"] = torch.cat([theirs[f"{a}.attn.{x}.weight"] for x in (q, k, v)])
            out[f"{b}.{here}_attn.proj.weight"] = theirs[f"{a}.attn.{proj}.weight"]
            out[f"{b}.{here}_attn.norm.query_norm.scale"] = theirs[f"{a}.attn.{norm}q.weight"]
            out[f"{b}.{here}_attn.norm.key_norm.scale"] = theirs[f"{a}.attn.{norm}k.weight"]
            out[f"{b}.{here}_mlp.0.weight"] = theirs[f"{a}.{mlp}.linear_in.weight"]
            out[f"{b}.{here}_mlp.2.weight"] = theirs[f"{a}.{mlp}.linear_out.weight"]
    for i in range(count["single_transformer_blocks"]):
        a, b = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        out[f"{b}.linear1.weight"] = theirs[f"{a}.attn.to_qkv_mlp_proj.weight"]
        out[f"{b}.linear2.weight"] = theirs[f"{a}.attn.to_out.weight"]
        out[f"{b}.norm.query_norm.scale"] = theirs[f"{a}.attn.norm_q.weight"]
        out[f"{b}.norm.key_norm.scale"] = theirs[f"{a}.attn.norm_k.weight"]
    return {name: tensor.contiguous() for name, tensor in out.items()}


def bfl_autoencoder(folder: Path, levels: int = 4) -> dict[str, Tensor]:
    """Convert a diffusers `vae/` to the tensors of BFL's autoencoder file."""
    spellings = [
        (r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)", r"encoder.down.\1.block.\2"),
        (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0", r"encoder.down.\1.downsample"),
        (r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.block.{m[2]}"),
        (r"decoder\.up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.upsample"),
        (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_([qkv])\b", r"mid.attn_1.\1"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        (r"conv_shortcut", "nin_shortcut"),
        (r"conv_norm_out", "norm_out"),
        (r"^quant_conv", "encoder.quant_conv"),
        (r"^post_quant_conv", "decoder.post_quant_conv"),
    ]
    out = {}
    for name, tensor in load_file(folder / "vae" / "diffusion_pytorch_model.safetensors").items():
        for pattern, new in spellings:
            name = re.sub(pattern, new, name)
        if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name):
            tensor = tensor[:, :, None, None]
        out[name] = tensor.contiguous()
    return out


def single_file(folder: Path, home: Path, prefix: str = "", name: str = "flux-2-klein-4b.safetensors") -> Path:
    """Create a folder with BFL's two single files, the encoder and the tokenizer."""
    home.mkdir()
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(folder / part, home / part)
    tensors = {prefix + key: tensor for key, tensor in bfl_transformer(folder).items()}
    save_file(tensors, home / name)
    save_file(bfl_autoencoder(folder), home / "flux2-vae.safetensors")
    return home / name


@pytest.fixture(scope="module")
def whole(toy: Callable[[str], Path], engine: Engine) -> Rgb8:
    """Return the image the folder generates.

    A file of the same weights must generate it to the last bit.
    """
    return paint(engine, CASES[COMPOSE].job(toy("distilled"))).image


def test_single_file_generates_the_same_image_as_the_folder(
    toy: Callable[[str], Path], whole: Rgb8, tmp_path: Path
) -> None:
    file = single_file(toy("distilled"), tmp_path / "bfl")
    engine = Engine(EngineConfig(device="cpu", dtype="float32", cache_bytes=0))
    assert agreement(paint(engine, CASES[COMPOSE].job(file)).image, whole) == (1.0, 0)


def test_repacked_file_with_a_prefix_generates_the_same_image(
    toy: Callable[[str], Path], whole: Rgb8, tmp_path: Path
) -> None:
    file = single_file(toy("distilled"), tmp_path / "comfy", "model.diffusion_model.")
    engine = Engine(EngineConfig(device="cpu", dtype="float32", cache_bytes=0))
    assert agreement(paint(engine, CASES[COMPOSE].job(file)).image, whole) == (1.0, 0)


def test_sharded_folder_generates_the_same_image(toy: Callable[[str], Path], whole: Rgb8, tmp_path: Path):
    folder = tmp_path / "sharded"
    shutil.copytree(toy("distilled"), folder)
    for part in ("transformer", "text_encoder"):
        _shard(folder / part)
    engine = Engine(EngineConfig(device="cpu", dtype="float32", cache_bytes=0))
    assert agreement(paint(engine, CASES[COMPOSE].job(folder)).image, whole) == (1.0, 0)
    next((folder / "transformer").glob("*00002*")).unlink()
    with pytest.raises(BadWeights, match=r"lacks .*00002.*index"):
        paint(Engine(EngineConfig(device="cpu", dtype="float32")), CASES[COMPOSE].job(folder))


def _shard(folder: Path) -> None:
    (whole,) = folder.glob("*.safetensors")
    tensors = load_file(whole)
    names = sorted(tensors)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    weight_map = {}
    for i, half in enumerate(halves, 1):
        shard = f"{whole.stem}-{i:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in half}, folder / shard)
        weight_map |= dict.fromkeys(half, shard)
    whole.unlink()
    (folder / f"{whole.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def shapes_in(module: nn.Module, table: KeyMap) -> dict[str, tuple[int, ...]]:
    """Return published name -> shape for the tensors that fill our module."""
    ours = param_shapes(module)
    rows = {their: (ours[place.name], place.parts) for their, place in table.items() if place.name in ours}
    return {their: (whole[0] // parts, *whole[1:]) for their, (whole, parts) in rows.items()}


def official_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize(
    ("shape", "heads", "tensors", "parameters"),
    [
        (TransformerShape(3072, 128, 7680, 5, 20, 9216), 24, 169, 3_875_544_576),
        (TransformerShape(4096, 128, 12288, 8, 24, 12288), 32, 233, 9_078_581_248),
    ],
    ids=["4B", "9B"],
)
def test_parameters_are_the_published_ones(shape: TransformerShape, heads: int, tensors: int, parameters: int) -> None:
    with torch.device("meta"):
        ours = Transformer(shape)
        theirs = Flux2Transformer2DModel(
            num_layers=shape.double_blocks,
            num_single_layers=shape.single_blocks,
            num_attention_heads=heads,
            attention_head_dim=shape.head_dim,
            joint_attention_dim=shape.context,
            guidance_embeds=False,
        )
    there = shapes_in(ours, diffusers_transformer(max(shape.double_blocks, shape.single_blocks)))
    assert there == official_shapes(theirs)
    assert len(there) == tensors
    assert sum(map(math.prod, there.values())) == sum(p.numel() for p in ours.parameters()) == parameters


def test_real_autoencoder_has_the_published_parameters() -> None:
    with torch.device("meta"):
        ours, theirs = Autoencoder(AutoencoderShape()), AutoencoderKLFlux2()
    official = official_shapes(theirs)
    assert len(official) == 251
    del official["bn.num_batches_tracked"]  # nothing reads it
    there = shapes_in(ours, diffusers_autoencoder(4, 3))
    assert there == official
    assert sum(p.numel() for p in ours.parameters()) == 84_046_115


def edit_tensors(file: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


CHANGES = {
    "missing": (
        lambda tensors: tensors.pop("transformer_blocks.1.attn.to_k.weight"),
        r"lacks the tensor transformer_blocks\.1\.attn\.to_k",
    ),
    "extra": (
        lambda tensors: tensors.update({"surprise.weight": torch.zeros(3)}),
        r"does not know: surprise\.weight",
    ),
    "misshapen": (
        lambda tensors: tensors.update({"proj_out.weight": torch.zeros(128, 95)}),
        r"proj_out\.weight is \(128, 95\); expected \(128, 96\)",
    ),
    "guidance": (
        lambda tensors: tensors.update({"guidance_in.in_layer.weight": torch.zeros(3)}),
        r"FLUX\.2 \[dev\]",
    ),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_error_names_a_wrong_tensor(kind: str, toy: Callable[[str], Path], tmp_path: Path) -> None:
    change, says = CHANGES[kind]
    folder = tmp_path / "broken"
    shutil.copytree(toy("distilled"), folder)
    edit_tensors(folder / "transformer" / "diffusion_pytorch_model.safetensors", change)
    with pytest.raises(BadWeights, match=says):
        paint(Engine(EngineConfig(device="cpu", dtype="float32")), CASES[COMPOSE].job(folder))


def test_truncated_file_is_refused_with_its_name(toy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(toy("distilled"), folder)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(BadWeights, match=r"diffusion_pytorch_model\.safetensors .* not a whole safetensors file"):
        paint(Engine(EngineConfig(device="cpu", dtype="float32")), CASES[COMPOSE].job(folder))


def test_wrong_text_encoder_is_refused_by_width(toy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    toys.save(folder, joint_attention_dim=192)
    with pytest.raises(BadWeights, match="gives 96 numbers a token, the transformer reads 192"):
        paint(Engine(EngineConfig(device="cpu", dtype="float32")), CASES[COMPOSE].job(folder))


def test_error_for_missing_model_says_how_to_get_it(tmp_path: Path) -> None:
    job = CASES["text to image"].job(tmp_path)
    for model, says in (
        ("klein-4b", "Pull klein-4b."),
        ("klein-4d", "Did you mean klein-4b"),
        (str(tmp_path / "nowhere"), "No model at"),
        (str(tmp_path), "model_index.json"),
    ):
        with pytest.raises((ModelNotFound, BadWeights), match=re.escape(says)):
            paint(Engine(EngineConfig(device="cpu", dtype="float32")), job.__class__(job.prompt, model=model))


def test_shapes_are_read_from_the_files(toy: Callable[[str], Path]) -> None:
    shape = components.transformer(toy("distilled") / "transformer").module.shape
    assert shape == TransformerShape(96, 32, 96, 2, 2, 288, axes=(8, 8, 8, 8), theta=2000.0)


def test_text_encoder_stops_at_the_last_layer_in_use(toy: Callable[[str], Path]) -> None:
    part = components.text_encoder(toy("distilled") / "text_encoder", (9, 18, 27))
    assert len(part.module.model.layers) == 27
    assert not any(
        name.startswith(("model.layers.27", "model.layers.28", "lm_head", "model.norm")) for name in part.key_map
    )
    assert all(p.dtype == torch.float32 for p in part.module.parameters())
    list(part.load(Device(torch.device("cpu"), torch.float32)))
    assert not any(p.is_meta for p in part.module.parameters())
