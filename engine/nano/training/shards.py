"""Learned weights as a few small files, and back.

`python -m engine.nano.training.shards FILES FOLDER` puts them into a folder that holds the configs.
"""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.nano.training.folder import save_autoencoder, save_text_encoder, save_transformer
from engine.nano.training.model import Nano

SHARDS = 3
DECODER = "decoder.safetensors"


def _shard(i: int) -> str:
    return f"weights-{i + 1}-of-{SHARDS}.safetensors"


def _replace(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a file that is always whole, the new or the old."""
    part = path.with_suffix(".part")
    save_file(tensors, part)
    os.replace(part, path)


def save_shards(learned: nn.Module, out: Path) -> None:
    """Write the module's tensors in 16 bit, as SHARDS files."""
    tensors = {name: tensor.detach().half().cpu().contiguous() for name, tensor in learned.state_dict().items()}
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise ValueError("The weights are not finite; the files written before stay.")
    shards: list[dict[str, Tensor]] = [{} for _ in range(SHARDS)]
    sizes = [0] * SHARDS
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].numel()):
        smallest = sizes.index(min(sizes))
        shards[smallest][name] = tensor
        sizes[smallest] += tensor.numel()
    for i, shard in enumerate(shards):
        _replace(shard, out / _shard(i))


def save_decoder(decoder: nn.Module, out: Path) -> None:
    """Write the decoder's tensors in 16 bit."""
    _replace({name: t.detach().half().cpu().contiguous() for name, t in decoder.state_dict().items()}, out / DECODER)


def learned_parts(nano: Nano) -> nn.ModuleDict:
    """Return what is trained on velocities: everything but the autoencoder."""
    return nn.ModuleDict({"transformer": nano.transformer, "text_encoder": nano.text_encoder})


def load_shards(nano: Nano, files: Path) -> None:
    """Fill a nano with the shards and the decoder, if any."""
    tensors: dict[str, Tensor] = {}
    for i in range(SHARDS):
        tensors |= load_file(files / _shard(i))
    learned_parts(nano).load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    if (files / DECODER).exists():
        decoder = load_file(files / DECODER)
        nano.autoencoder.decoder.load_state_dict({name: tensor.float() for name, tensor in decoder.items()})


def assemble(files: Path, folder: Path) -> None:
    """Write the shards into a diffusers folder that holds the configs."""
    nano = Nano(folder)
    with torch.no_grad():
        load_shards(nano, files)
    save_transformer(nano.transformer, folder)
    save_text_encoder(nano.text_encoder, folder)  # type: ignore[arg-type] - Module as far as nn.Module tells
    save_autoencoder(nano.autoencoder, folder)


if __name__ == "__main__":
    assemble(Path(sys.argv[1]), Path(sys.argv[2]))
