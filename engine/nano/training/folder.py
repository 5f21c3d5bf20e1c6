"""nano as a diffusers folder, which training writes and resumes from."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Qwen3ForCausalLM, Qwen3Model

from engine.families.klein.key_maps import KeyMap, diffusers_autoencoder, diffusers_transformer
from engine.families.klein.transformer import Transformer, TransformerShape
from engine.nn.autoencoder import Autoencoder, AutoencoderShape

WEIGHTS = Path(__file__).parents[1] / "weights"
"""The set that is shipped."""

_TENSORS = "diffusion_pytorch_model.safetensors"
_BLOCKS = 64
"""More blocks of a kind than a nano will ever have."""


def _config(folder: Path, part: str) -> dict:
    return json.loads((folder / part / "config.json").read_text())


def load_extras(folder: Path) -> dict:
    """Return klein.json: text length, sizes and words, readable without torch."""
    return json.loads((folder / "klein.json").read_text())


def token_side(folder: Path) -> int:
    """Return the pixels that a token of the folder's nano spans."""
    return 2 ** len(_config(folder, "vae")["block_out_channels"])


def transformer_shape(config: dict) -> TransformerShape:
    """From diffusers' config."""
    hidden = config["num_attention_heads"] * config["attention_head_dim"]
    return TransformerShape(
        hidden=hidden,
        head_dim=config["attention_head_dim"],
        context=config["joint_attention_dim"],
        double_blocks=config["num_layers"],
        single_blocks=config["num_single_layers"],
        mlp=int(hidden * config["mlp_ratio"]),
        channels=config["in_channels"],
        time_channels=config["timestep_guidance_channels"],
        axes=tuple(config["axes_dims_rope"]),
        theta=config["rope_theta"],
    )


def autoencoder_shape(config: dict) -> AutoencoderShape:
    """From diffusers' config."""
    return AutoencoderShape(
        encoder=tuple(config["block_out_channels"]),
        decoder=tuple(config["decoder_block_out_channels"] or config["block_out_channels"]),
        layers=config["layers_per_block"],
        latent=config["latent_channels"],
        groups=config["norm_num_groups"],
        attention=config["mid_block_add_attention"],
    )


def _swap(tensor: Tensor) -> Tensor:
    first, second = tensor.chunk(2)
    return torch.cat((second, first))


def _fill(module: nn.Module, published: dict[str, Tensor], table: KeyMap) -> None:
    """Copy every published tensor into its parameter.

    A parameter that no tensor fills stays as it is.
    """
    ours = module.state_dict()
    for name, tensor in published.items():
        if name.endswith("num_batches_tracked"):
            continue
        place = table[name]
        tensor = _swap(tensor) if place.swap else tensor
        rows = ours[place.name].chunk(place.parts)[place.part]
        rows.copy_(tensor.to(rows.dtype).reshape(rows.shape))


def _publish(module: nn.Module, table: KeyMap) -> dict[str, Tensor]:
    """The module's tensors under their published names, in 16 bit."""
    ours = module.state_dict()
    published = {}
    for name, place in table.items():
        if place.name in ours:
            tensor = ours[place.name].chunk(place.parts)[place.part]
            tensor = _swap(tensor) if place.swap else tensor
            # The latent statistics are divided by: they keep their full precision, as in klein.
            kept = tensor.float() if name.startswith("bn.") else tensor.half()
            published[name] = kept.contiguous().cpu().clone()
    return published


def load_transformer(folder: Path) -> Transformer:
    config = _config(folder, "transformer")
    transformer = Transformer(transformer_shape(config))
    _fill(transformer, load_file(folder / "transformer" / _TENSORS), diffusers_transformer(_BLOCKS))
    return transformer


def load_autoencoder(folder: Path) -> Autoencoder:
    config = _config(folder, "vae")
    autoencoder = Autoencoder(autoencoder_shape(config))
    table = diffusers_autoencoder(len(config["block_out_channels"]), config["layers_per_block"] + 1)
    _fill(autoencoder, load_file(folder / "vae" / _TENSORS), table)
    return autoencoder


def load_text_encoder(folder: Path) -> Qwen3Model:
    model = Qwen3ForCausalLM.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    return model.model


def save_autoencoder(autoencoder: Autoencoder, folder: Path) -> None:
    """Into a folder that already holds the config."""
    config = _config(folder, "vae")
    table = diffusers_autoencoder(len(config["block_out_channels"]), config["layers_per_block"] + 1)
    tensors = _publish(autoencoder, table)
    tensors["bn.num_batches_tracked"] = torch.tensor(0)
    save_file(tensors, folder / "vae" / _TENSORS, metadata={"format": "pt"})


def save_transformer(transformer: Transformer, folder: Path) -> None:
    """Into a folder that already holds the config."""
    tensors = _publish(transformer, diffusers_transformer(_BLOCKS))
    save_file(tensors, folder / "transformer" / _TENSORS, metadata={"format": "pt"})


def save_text_encoder(text_encoder: Qwen3Model, folder: Path) -> None:
    """Into a folder that already holds the config."""
    tensors = {f"model.{name}": tensor.half().contiguous().cpu() for name, tensor in text_encoder.state_dict().items()}
    save_file(tensors, folder / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
