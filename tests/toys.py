"""Toy kleins: the real layout, the real architecture, random weights, a few hundred kilobytes.

The weights are drawn so that images do not saturate and every input shows in them: a comparison of two grey
images would pass whatever the code does. `tests/parity/test_toys.py` holds both.
"""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinKVPipeline, Flux2KleinPipeline
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")

# Renders what Qwen3's own template renders for one user turn with thinking off.
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)

TRANSFORMER: dict[str, Any] = {
    "num_layers": 2,
    "num_single_layers": 2,
    "num_attention_heads": 3,
    "attention_head_dim": 32,
    "joint_attention_dim": 96,
    "axes_dims_rope": (8, 8, 8, 8),
    "rope_theta": 2000,
    "guidance_embeds": False,
}
QWEN3: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 29,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "tie_word_embeddings": True,
    "max_position_embeddings": 1024,
}
AUTOENCODER: dict[str, Any] = {
    "block_out_channels": (32, 32, 64, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "sample_size": 128,
}


def autoencoder(levels: int) -> dict[str, Any]:
    """The config of an autoencoder of so many levels: a fifth one makes a token of 32 × 32 pixels."""
    return AUTOENCODER | {
        "block_out_channels": (32, 32, *(64,) * (levels - 2)),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }


def tokenizer() -> PreTrainedTokenizerFast:
    """Every byte a token, and Qwen's special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {token: i for i, token in enumerate((*SPECIAL, *alphabet))}
    bpe = Tokenizer(models.BPE(vocab=words, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s+|\S+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<|endoftext|>", eos_token="<|im_end|>", chat_template=CHAT_TEMPLATE
    )


def pipeline(*, kv: bool = False, distilled: bool = True, seed: int = 0, levels: int = 4, **changes: Any) -> Any:
    """A toy diffusers pipeline, fp32 on the CPU. levels: of the autoencoder. changes: of the transformer's config."""
    torch.manual_seed(seed)
    tokens = tokenizer()
    text_encoder = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokens), **QWEN3))
    transformer = Flux2Transformer2DModel(**(TRANSFORMER | changes))
    vae = AutoencoderKLFlux2(**autoencoder(levels))
    _enliven(text_encoder, transformer, vae)
    kind = Flux2KleinKVPipeline if kv else Flux2KleinPipeline
    return kind(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokens,
        transformer=transformer.eval(),
        is_distilled=distilled,
    )


@torch.no_grad()
def _enliven(text_encoder: Any, transformer: Any, vae: Any) -> None:
    # Norm weights off 1, so that a skipped or misplaced norm shows.
    for net in (text_encoder, transformer, vae):
        for name, parameter in net.named_parameters():
            if parameter.ndim == 1 and "norm" in name and name.endswith("weight"):
                parameter.normal_(1.0, 0.3)
    # transformers draws its weights with 0.02: prompts would hardly differ.
    for name, parameter in text_encoder.named_parameters():
        if parameter.ndim == 2:
            parameter.normal_(0.0, 1.0 if "embed" in name else 0.15)
    # Attention that looks somewhere instead of averaging, and blocks that change their stream.
    for name, parameter in transformer.named_parameters():
        if "norm_q" in name or "norm_k" in name or "norm_added" in name:
            parameter.mul_(2.0)
        elif "modulation" in name:
            parameter.mul_(4.0)
        elif parameter.ndim == 2 and "blocks" in name:
            parameter.mul_(1.5)
    transformer.context_embedder.weight.mul_(3.0)
    transformer.proj_out.weight.mul_(3.0)
    vae.bn.running_mean.normal_(0.0, 0.3)
    vae.bn.running_var.uniform_(0.5, 2.0)


def save(folder: Path, **kwargs: Any) -> Path:
    """Write a toy as a diffusers folder."""
    pipeline(**kwargs).save_pretrained(folder)
    return folder


def extras(folder: Path, **keys: Any) -> None:
    """Put a klein.json beside the index."""
    (folder / "klein.json").write_text(json.dumps(keys))
