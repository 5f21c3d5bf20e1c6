"""Spellings of klein's layers in LoRA files, and their rows."""

import re

from torch import nn

from engine.checkpoints.quant import QuantLinear, shape_of
from engine.families.klein.key_maps import diffusers_transformer
from engine.families.klein.lora.deltas import RowRange
from engine.families.klein.transformer import Transformer

_PREFIX = re.compile(
    r"^(?:base_model_model_|lora_unet_|lora_transformer_|lycoris_|model_diffusion_model_|diffusion_model_|unet_"
    r"|_orig_mod_|module_|transformer_(?!blocks_)|model_)+"
)
_LINEAR = nn.Linear | QuantLinear
_TEXT_ENCODER = re.compile(r"^(?:lora_te\d?_|text_encoders?[._]|te\d?_|lora_text_)")


def is_text_encoder(module: str) -> bool:
    """Return whether a LoRA's module belongs to the text encoder."""
    return _TEXT_ENCODER.match(module) is not None


def find_rows(module: str, names: dict[str, RowRange]) -> RowRange | None:
    """Return the rows that a module means, None for unknown ones."""
    flat = _PREFIX.sub("", module.replace(".", "_")).rstrip("_")
    if flat.startswith("sformer_blocks_"):
        # Files of a converter that cut the first letters off are around.
        flat = f"tran{flat}"
    return names.get(flat)


def layer_names(transformer: Transformer) -> dict[str, RowRange]:
    """Return every spelling of our layers, with underscores for dots."""
    sizes = {name: shape_of(layer)[0] for name, layer in transformer.named_modules() if isinstance(layer, _LINEAR)}
    names = {name: RowRange(name, 0, rows) for name, rows in sizes.items()}
    for name, parameter in transformer.named_parameters():
        norm, _, leaf = name.rpartition(".")
        if leaf == "scale":
            names[norm] = names[name] = RowRange(norm, 0, parameter.shape[0], leaf=leaf)
    blocks = max(transformer.shape.double_blocks, transformer.shape.single_blocks)
    for source, place in diffusers_transformer(blocks).items():
        layer = place.name.removesuffix(".weight")
        if layer in sizes:
            part = sizes[layer] // place.parts
            names[source.removesuffix(".weight")] = RowRange(
                layer, place.part * part, (place.part + 1) * part, place.swap
            )
        elif place.name in names:
            names[source.removesuffix(".weight")] = names[place.name]
    names |= _split_single_blocks(transformer, sizes)
    return {name.replace(".", "_"): rows for name, rows in names.items()}


def _split_single_blocks(transformer: Transformer, sizes: dict[str, int]) -> dict[str, RowRange]:
    """Name the parts of single blocks as FLUX.1 splits them."""
    names: dict[str, RowRange] = {}
    hidden = transformer.shape.hidden
    for i in range(transformer.shape.single_blocks):
        ours, theirs = f"single_blocks.{i}.linear1", f"single_transformer_blocks.{i}"
        names[f"{ours}_qkv"] = RowRange(ours, 0, 3 * hidden)
        for part, name in enumerate(("attn.to_q", "attn.to_k", "attn.to_v")):
            names[f"{theirs}.{name}"] = RowRange(ours, part * hidden, (part + 1) * hidden)
        names[f"{theirs}.proj_mlp"] = RowRange(ours, 3 * hidden, sizes[ours])
        names[f"{theirs}.proj_out"] = RowRange(f"single_blocks.{i}.linear2", 0, sizes[f"single_blocks.{i}.linear2"])
    return names


def columns_of(transformer: Transformer, rows: RowRange) -> int:
    """Return the columns of a parameter, one for a norm's scale."""
    layer = transformer.get_submodule(rows.layer)
    return shape_of(layer)[1] if isinstance(layer, _LINEAR) else 1
