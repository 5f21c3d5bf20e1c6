"""Key maps as data: published layouts -> our modules, named as BFL's.

A row is (published name, our name, part, parts): the tensor fills the part-th of `parts` equal row ranges.
`{i}` stands for a block's number. Source of the names: diffusers 0.42 modules and BFL's published checkpoints.
"""

import re
from collections.abc import Iterable, Iterator

from engine.checkpoints.key_map import KeyMap, ParamSlice

Row = tuple[str, str, int, int]

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
    """Map diffusers' AutoencoderKLFlux2 names to BFL's, for `levels` levels."""
    for side in ("encoder", "decoder"):
        for level in range(levels):
            source = f"encoder.down_blocks.{level}" if side == "encoder" else f"decoder.up_blocks.{levels - 1 - level}"
            target = f"encoder.down.{level}" if side == "encoder" else f"decoder.up.{level}"
            for wb in _WB:
                for part in _RESNET:
                    yield f"{source}.resnets.{{i}}.{part}.{wb}", f"{target}.block.{{i}}.{part}.{wb}", 0, 1
                yield f"{source}.resnets.{{i}}.conv_shortcut.{wb}", f"{target}.block.{{i}}.nin_shortcut.{wb}", 0, 1
                if side == "encoder":
                    yield f"{source}.downsamplers.0.conv.{wb}", f"{target}.downsample.conv.{wb}", 0, 1
                else:
                    yield f"{source}.upsamplers.0.conv.{wb}", f"{target}.upsample.conv.{wb}", 0, 1
        for wb in _WB:
            for resnet in (0, 1):
                for part in _RESNET:
                    yield (f"{side}.mid_block.resnets.{resnet}.{part}.{wb}",
                           f"{side}.mid.block_{resnet + 1}.{part}.{wb}", 0, 1)  # fmt: skip
            for source, target in (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"),
                               ("to_out.0", "proj_out")):  # fmt: skip
                yield f"{side}.mid_block.attentions.0.{source}.{wb}", f"{side}.mid.attn_1.{target}.{wb}", 0, 1
            yield f"{side}.conv_in.{wb}", f"{side}.conv_in.{wb}", 0, 1
            yield f"{side}.conv_norm_out.{wb}", f"{side}.norm_out.{wb}", 0, 1
            yield f"{side}.conv_out.{wb}", f"{side}.conv_out.{wb}", 0, 1
    for wb in _WB:
        yield f"quant_conv.{wb}", f"encoder.quant_conv.{wb}", 0, 1
        yield f"post_quant_conv.{wb}", f"decoder.post_quant_conv.{wb}", 0, 1
    for statistic in ("running_mean", "running_var"):
        yield f"bn.{statistic}", f"bn.{statistic}", 0, 1


def _expand(rows: Iterable[Row], numbers: int) -> KeyMap:
    return {
        source.replace("{i}", str(i)): ParamSlice(target.replace("{i}", str(i)), part, parts, source in SWAPPED)
        for source, target, part, parts in rows
        for i in range(numbers if "{i}" in source else 1)
    }


def diffusers_transformer(blocks: int) -> KeyMap:
    """Return every name of a diffusers transformer of `blocks` blocks."""
    return _expand(DIFFUSERS_TRANSFORMER, blocks)


def diffusers_autoencoder(levels: int, layers: int) -> KeyMap:
    """Return every name of a diffusers autoencoder of this size."""
    return _expand(_autoencoder_rows(levels), layers)


_WRAPPERS = ("_orig_mod.", "module.", "base_model.model.")
"""Prefixes of torch.compile, DistributedDataParallel and peft."""
_TRANSFORMER_PREFIXES = (*_WRAPPERS, "model.diffusion_model.", "diffusion_model.", "model.", "transformer.", "net.")
"""What ComfyUI and others put before the transformer's names."""
_AUTOENCODER_PREFIXES = (*_WRAPPERS, "first_stage_model.", "vae.")

_OTHER_COMPONENTS = re.compile(
    r"(?:vae|first_stage_model|text_encoders?|cond_stage_model|conditioner|model_ema|ema|model_sampling)[._]"
)
"""In an all-in-one checkpoint, names of what is not the transformer; and what samplers and trainers leave behind."""

_SPELLINGS = ((re.compile(r"(query_norm|key_norm)\.weight$"), r"\1.scale"),)
"""Spellings found in repacked BFL files, and ours."""


def _strip(name: str, prefixes: tuple[str, ...]) -> str:
    """Strip prefixes, several of them where a wrapper wraps another."""
    while prefix := next((prefix for prefix in prefixes if name.startswith(prefix)), ""):
        name = name.removeprefix(prefix)
    return name


def transformer_name(name: str) -> str:
    """Return the name without prefixes, "" for another component's."""
    if _OTHER_COMPONENTS.match(name):
        return ""
    name = _strip(name, _TRANSFORMER_PREFIXES)
    if _OTHER_COMPONENTS.match(name):
        return ""
    for spelling, ours in _SPELLINGS:
        name = spelling.sub(ours, name)
    return name


_TOP_CONVOLUTIONS = {"encoder.": "quant_conv.", "decoder.": "post_quant_conv."}
"""In BFL's file these are below encoder and decoder; diffusers has them at the top, and so has what ComfyUI saves."""
_NOT_AUTOENCODER = re.compile(
    r"(?:model\.|diffusion_model\.|text_encoders?\.|cond_stage_model\.|conditioner\.|model_ema\.|model_sampling\.)"
)


def autoencoder_name(name: str) -> str:
    """Return the name without prefixes, "" for another component's."""
    if _NOT_AUTOENCODER.match(name):
        return ""
    name = _strip(name, _AUTOENCODER_PREFIXES)
    side = next((side for side, top in _TOP_CONVOLUTIONS.items() if name.startswith(top)), "")
    return side + name


_GGUF_ENCODER = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
"""llama.cpp's names of a Qwen3 -> transformers'. Unlike LLaMA's, the rows of q and k are not permuted."""
_GGUF_LAYER = re.compile(r"^blk\.(\d+)\.(\w+)\.weight$")

_NOT_ENCODER = re.compile(
    r"(?:model\.diffusion_model|diffusion_model|vae|first_stage_model|model_sampling|model_ema)\."
)


def encoder_name(name: str) -> str:
    """Return transformers' name of a Qwen3 tensor, "" for another component's."""
    if _NOT_ENCODER.match(name):
        return ""
    if layer := _GGUF_LAYER.match(name):
        return f"model.layers.{layer[1]}.{_GGUF_ENCODER.get(layer[2], layer[2])}.weight"
    base, _, leaf = name.rpartition(".")
    if base in _GGUF_ENCODER:
        return f"{_GGUF_ENCODER[base]}.{leaf}"
    name = _strip(name, _WRAPPERS)
    name = re.sub(r"^(?:text_encoders?\.)?(?:qwen3_\w+\.)?(?:transformer\.)?", "", name)
    return f"model.{name}" if name.startswith(("layers.", "embed_tokens.", "norm.")) else name
