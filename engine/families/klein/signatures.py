"""Tell components of klein, and other models, by tensor names."""

from pathlib import Path

from engine.checkpoints.files import Header, cached_by_file
from engine.contract import BadWeights, Fix

TRANSFORMER, AUTOENCODER, TEXT_ENCODER = "transformer", "autoencoder", "text encoder"
COMPONENTS = (TRANSFORMER, AUTOENCODER, TEXT_ENCODER)
LORA = "LoRA"

# Substrings that only one architecture has. The first match wins; repackers may put anything before them.
_SIGNATURES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (LORA, (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", ".lora.down.", ".lokr_w", ".hada_w", ".oft_R.")),
    (TRANSFORMER, ("double_stream_modulation_img.lin",)),  # both layouts: `.lin.` and `.linear.`
    ("a vision-language model", (".visual.", "visual.blocks.", "model.vision_tower.")),
    ("a Gemma text encoder", ("feedforward_layernorm",)),
    (TEXT_ENCODER, ("layers.0.self_attn.q_norm.weight", "blk.0.attn_q_norm.weight")),
    (AUTOENCODER, ("decoder.post_quant_conv.weight", "post_quant_conv.weight")),
    ("an SDXL or SD checkpoint", ("model.diffusion_model.input_blocks.", "down_blocks.0.attentions.", "conditioner.")),
    ("a FLUX.1 model", ("double_blocks.0.img_mod.lin", "transformer_blocks.0.norm1.linear", "time_text_embed.")),
    ("a text encoder of another family", ("encoder.block.0.layer.0.SelfAttention", "text_model.encoder.layers.")),
)


def component(header: Header) -> str:
    """Return a component of klein, "LoRA", another model's name, or ""."""
    names = header.entries.keys()
    if any(name.endswith((".diff", ".diff_b", ".lora_A", ".lora_B", ".set_weight")) for name in names):
        return LORA
    found = next((kind for kind, signs in _SIGNATURES if any(sign in name for sign in signs for name in names)), "")
    # SD's autoencoders have the same names; only FLUX.2's keeps the statistics of its latents.
    if found == AUTOENCODER and not any(name.endswith("bn.running_mean") for name in names):
        return "an autoencoder of another family"
    return found


def components(header: Header) -> frozenset[str]:
    """Return every component in a file: an all-in-one checkpoint has several."""
    found = component(header)
    if found != TRANSFORMER:
        return frozenset({found} & set(COMPONENTS))
    names = header.entries.keys()
    inside = {TRANSFORMER}
    if any(name.startswith(("vae.", "first_stage_model.")) and "post_quant_conv.weight" in name for name in names):
        inside.add(AUTOENCODER)
    if any(name.endswith("layers.0.self_attn.q_norm.weight") for name in names):
        inside.add(TEXT_ENCODER)
    return frozenset(inside)


def expect(header: Header, wanted: str) -> None:
    """Raise BadWeights for a file that is something else than `wanted`."""
    if wanted not in components(header) and (found := component(header)):
        fix = Fix("set", "loras") if found == LORA else None
        raise BadWeights(f"{header.file.name} is {_with_article(found)}, not a klein {wanted}.", fix=fix)


def _with_article(kind: str) -> str:
    if kind == LORA:
        return "a LoRA, which changes a model but is not one"
    return kind if kind.startswith(("a ", "an ")) else f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def components_of(file: Path) -> frozenset[str]:
    """Return `components` of a file, none for one that cannot be read."""
    try:
        return read_components(file)
    except BadWeights:
        return frozenset()


read_components = cached_by_file(components)
"""Return `components` of a file. Raises BadWeights for one that cannot be read."""
