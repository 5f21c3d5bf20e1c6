"""Key maps as data: where each tensor of a published layout belongs in our modules, which are named as BFL's files.

A row is (published name, our name, part, parts): the tensor fills the part-th of `parts` equal row ranges.
`{i}` stands for a block's number. Source of the names: diffusers 0.42 modules and BFL's published checkpoints.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

Row = tuple[str, str, int, int]


@dataclass(frozen=True, slots=True)
class ParamSlice:
    """Where a published tensor goes: our parameter's name and the row range it fills (part of parts).

    swap: its two halves change places on the way.
    """

    name: str
    part: int = 0
    parts: int = 1
    swap: bool = False


_QKV = ("to_q", "to_k", "to_v")
_ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")

DIFFUSERS_TRANSFORMER: tuple[Row, ...] = (
    ("x_embedder.weight", "img_in.weight", 0, 1),
    ("context_embedder.weight", "txt_in.weight", 0, 1),
    ("time_guidance_embed.timestep_embedder.linear_1.weight", "time_in.in_layer.weight", 0, 1),
    ("time_guidance_embed.timestep_embedder.linear_2.weight", "time_in.out_layer.weight", 0, 1),
    ("double_stream_modulation_img.linear.weight", "double_stream_modulation_img.lin.weight", 0, 1),
    ("double_stream_modulation_txt.linear.weight", "double_stream_modulation_txt.lin.weight", 0, 1),
    ("single_stream_modulation.linear.weight", "single_stream_modulation.lin.weight", 0, 1),
    *((f"transformer_blocks.{{i}}.attn.{n}.weight", "double_blocks.{i}.img_attn.qkv.weight", p, 3)
      for p, n in enumerate(_QKV)),
    *((f"transformer_blocks.{{i}}.attn.{n}.weight", "double_blocks.{i}.txt_attn.qkv.weight", p, 3)
      for p, n in enumerate(_ADDED_QKV)),
    ("transformer_blocks.{i}.attn.to_out.0.weight", "double_blocks.{i}.img_attn.proj.weight", 0, 1),
    ("transformer_blocks.{i}.attn.to_add_out.weight", "double_blocks.{i}.txt_attn.proj.weight", 0, 1),
    ("transformer_blocks.{i}.attn.norm_q.weight", "double_blocks.{i}.img_attn.norm.query_norm.scale", 0, 1),
    ("transformer_blocks.{i}.attn.norm_k.weight", "double_blocks.{i}.img_attn.norm.key_norm.scale", 0, 1),
    ("transformer_blocks.{i}.attn.norm_added_q.weight", "double_blocks.{i}.txt_attn.norm.query_norm.scale", 0, 1),
    ("transformer_blocks.{i}.attn.norm_added_k.weight", "double_blocks.{i}.txt_attn.norm.key_norm.scale", 0, 1),
    ("transformer_blocks.{i}.ff.linear_in.weight", "double_blocks.{i}.img_mlp.0.weight", 0, 1),
    ("transformer_blocks.{i}.ff.linear_out.weight", "double_blocks.{i}.img_mlp.2.weight", 0, 1),
    ("transformer_blocks.{i}.ff_context.linear_in.weight", "double_blocks.{i}.txt_mlp.0.weight", 0, 1),
    ("transformer_blocks.{i}.ff_context.linear_out.weight", "double_blocks.{i}.txt_mlp.2.weight", 0, 1),
    ("single_transformer_blocks.{i}.attn.to_qkv_mlp_proj.weight", "single_blocks.{i}.linear1.weight", 0, 1),
    ("single_transformer_blocks.{i}.attn.to_out.weight", "single_blocks.{i}.linear2.weight", 0, 1),
    ("single_transformer_blocks.{i}.attn.norm_q.weight", "single_blocks.{i}.norm.query_norm.scale", 0, 1),
    ("single_transformer_blocks.{i}.attn.norm_k.weight", "single_blocks.{i}.norm.key_norm.scale", 0, 1),
    # diffusers keeps [scale; shift], BFL [shift; scale]: `SWAPPED`.
    ("norm_out.linear.weight", "final_layer.adaLN_modulation.1.weight", 0, 1),
    ("proj_out.weight", "final_layer.linear.weight", 0, 1),
)  # fmt: skip
SWAPPED = frozenset({"norm_out.linear.weight"})

_RESNET = ("norm1", "conv1", "norm2", "conv2")
_WB = ("weight", "bias")


def _autoencoder_rows(levels: int) -> Iterator[Row]:
    """diffusers' AutoencoderKLFlux2 names -> BFL's, for an autoencoder of so many levels."""
    for side in ("encoder", "decoder"):
        for level in range(levels):
            there = f"encoder.down_blocks.{level}" if side == "encoder" else f"decoder.up_blocks.{levels - 1 - level}"
            here = f"encoder.down.{level}" if side == "encoder" else f"decoder.up.{level}"
            for wb in _WB:
                for part in _RESNET:
                    yield f"{there}.resnets.{{i}}.{part}.{wb}", f"{here}.block.{{i}}.{part}.{wb}", 0, 1
                yield f"{there}.resnets.{{i}}.conv_shortcut.{wb}", f"{here}.block.{{i}}.nin_shortcut.{wb}", 0, 1
                if side == "encoder":
                    yield f"{there}.downsamplers.0.conv.{wb}", f"{here}.downsample.conv.{wb}", 0, 1
                else:
                    yield f"{there}.upsamplers.0.conv.{wb}", f"{here}.upsample.conv.{wb}", 0, 1
        for wb in _WB:
            for resnet in (0, 1):
                for part in _RESNET:
                    yield (f"{side}.mid_block.resnets.{resnet}.{part}.{wb}",
                           f"{side}.mid.block_{resnet + 1}.{part}.{wb}", 0, 1)  # fmt: skip
            for their, our in (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"),
                               ("to_out.0", "proj_out")):  # fmt: skip
                yield f"{side}.mid_block.attentions.0.{their}.{wb}", f"{side}.mid.attn_1.{our}.{wb}", 0, 1
            yield f"{side}.conv_in.{wb}", f"{side}.conv_in.{wb}", 0, 1
            yield f"{side}.conv_norm_out.{wb}", f"{side}.norm_out.{wb}", 0, 1
            yield f"{side}.conv_out.{wb}", f"{side}.conv_out.{wb}", 0, 1
    for wb in _WB:
        yield f"quant_conv.{wb}", f"encoder.quant_conv.{wb}", 0, 1
        yield f"post_quant_conv.{wb}", f"decoder.post_quant_conv.{wb}", 0, 1
    for statistic in ("running_mean", "running_var"):
        yield f"bn.{statistic}", f"bn.{statistic}", 0, 1


KeyMap = dict[str, ParamSlice]
"""Published name -> its place."""


def _expand(rows: Iterable[Row], numbers: int) -> KeyMap:
    return {
        their.replace("{i}", str(i)): ParamSlice(our.replace("{i}", str(i)), part, parts, their in SWAPPED)
        for their, our, part, parts in rows
        for i in range(numbers if "{i}" in their else 1)
    }


def diffusers_transformer(blocks: int) -> KeyMap:
    """Every name a diffusers Flux2Transformer2DModel with up to `blocks` blocks of a kind can have."""
    return _expand(DIFFUSERS_TRANSFORMER, blocks)


def diffusers_autoencoder(levels: int, layers: int) -> KeyMap:
    """Every name a diffusers AutoencoderKLFlux2 can have, with so many levels and residual blocks a level."""
    return _expand(_autoencoder_rows(levels), layers)


def plain(names: Iterable[str]) -> KeyMap:
    """BFL's own layout: every name is its own place."""
    return {name: ParamSlice(name) for name in names}


_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "transformer.")
"""What ComfyUI and others put in front of the transformer's names."""

_SPELLINGS = ((re.compile(r"(query_norm|key_norm)\.weight$"), r"\1.scale"),)
"""Spellings found in repacked BFL files, and ours."""


def bfl_name(name: str) -> str:
    """`name` without what repackers added."""
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            break
    for spelling, ours in _SPELLINGS:
        name = spelling.sub(ours, name)
    return name


def encoder_name(name: str) -> str:
    """A Qwen3 tensor's name as transformers writes it, whatever a repacker put in front or left out."""
    name = re.sub(r"^(?:text_encoders?\.)?(?:qwen3_\w+\.)?(?:transformer\.)?", "", name)
    return f"model.{name}" if name.startswith(("layers.", "embed_tokens.", "norm.")) else name
