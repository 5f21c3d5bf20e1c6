"""From files to the three networks: read the shapes, make the module on the meta device, fill it."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from engine.contract import BadWeights
from engine.device import Placement
from engine.layouts import Table, bfl_name, diffusers_autoencoder, diffusers_transformer, plain
from engine.model.autoencoder import Autoencoder, AutoencoderShape
from engine.model.text_encoder import TextEncoder
from engine.model.transformer import KLEIN_THETA, Transformer, TransformerShape
from engine.weights import Shape, Tensors, fill

Net = TypeVar("Net", bound=nn.Module)

_MOST_BLOCKS = 64
"""More blocks of a kind than any FLUX.2 has (dev: 48)."""


@dataclass(frozen=True, slots=True)
class Part(Generic[Net]):
    """A network on the meta device, and what will fill it."""

    what: str
    module: Net
    tensors: Tensors
    table: Table
    unneeded: re.Pattern[str]

    @property
    def bytes(self) -> int:
        """What will be read, in bytes on disk."""
        return sum(self.tensors.bytes.get(name, 0) for name in self.table)

    def fill(self, placement: Placement) -> Iterator[int]:
        """Read the weights onto the device; yields bytes as they are read."""
        ignore = self.unneeded.fullmatch
        yield from fill(
            self.module, self.tensors, self.table, placement, what=self.what, ignore=lambda name: bool(ignore(name))
        )


_NOTHING = re.compile(r"(?!)")


def transformer(path: Path) -> Part[Transformer]:
    """The velocity field in a diffusers `transformer/` folder or in BFL's single file."""
    what = f"transformer {path.name}" if path.is_file() else "transformer"
    config: dict[str, Any] = {}
    if path.is_file():
        tensors = Tensors.open([path], rename=bfl_name)
        table = plain(tensors.shapes)
    else:
        config = _config(path)
        tensors = Tensors.folder(path)
        table = diffusers_transformer(_MOST_BLOCKS)
    if config.get("guidance_embeds") or "guidance_in.in_layer.weight" in tensors.shapes:
        raise BadWeights(f"The {what} has a guidance embedding: that is FLUX.2 [dev], not klein.")
    shapes = _ours(tensors, table)
    shape = _transformer_shape(shapes, config, what)
    with torch.device("meta"):
        module = Transformer(shape)
    if path.is_file():
        table = plain(name for name, _ in module.named_parameters())
    else:
        table = _restrict(diffusers_transformer(max(shape.double_blocks, shape.single_blocks)), module)
    return Part(what, module, tensors, table, _NOTHING)


def _transformer_shape(shapes: dict[str, Shape], config: dict[str, Any], what: str) -> TransformerShape:
    try:
        hidden, channels = shapes["img_in.weight"]
        shape = TransformerShape(
            hidden=hidden,
            channels=channels,
            head_dim=shapes["single_blocks.0.norm.query_norm.scale"][0],
            context=shapes["txt_in.weight"][1],
            double_blocks=_count(shapes, r"double_blocks\.(\d+)\..*"),
            single_blocks=_count(shapes, r"single_blocks\.(\d+)\..*"),
            mlp=shapes["single_blocks.0.linear2.weight"][1] - hidden,
            time_channels=shapes["time_in.in_layer.weight"][1],
        )
    except KeyError as missing:
        raise BadWeights(f"The {what} is not a FLUX.2 [klein] transformer: it has no {missing.args[0]}.") from None
    axes = tuple(config.get("axes_dims_rope", (shape.head_dim // 4,) * 4))
    if sum(axes) != shape.head_dim:
        raise BadWeights(f"The {what} turns {sum(axes)} channels of a head that has {shape.head_dim}.")
    theta = float(config.get("rope_theta", KLEIN_THETA))
    return replace(shape, axes=axes, theta=theta)


def autoencoder(path: Path) -> Part[Autoencoder]:
    """The autoencoder in a diffusers `vae/` folder or in BFL's single file."""
    what = f"autoencoder {path.name}" if path.is_file() else "autoencoder"
    config: dict[str, Any] = {}
    if path.is_file():
        tensors = Tensors.open([path])
        table = plain(tensors.shapes)
    else:
        config = _config(path)
        tensors = Tensors.folder(path)
        levels = _count(tensors.shapes, r"encoder\.down_blocks\.(\d+)\..*")
        layers = _count(tensors.shapes, r"decoder\.up_blocks\.0\.resnets\.(\d+)\..*")
        table = diffusers_autoencoder(levels, layers)
    shapes = _ours(tensors, table)
    shape = _autoencoder_shape(shapes, config.get("norm_num_groups", AutoencoderShape().groups), what)
    with torch.device("meta"):
        module = Autoencoder(shape)
    table = plain(module.state_dict()) if path.is_file() else _restrict(table, module)
    return Part(what, module, tensors, table, re.compile(r"bn\.num_batches_tracked"))


def _autoencoder_shape(shapes: dict[str, Shape], groups: int, what: str) -> AutoencoderShape:
    levels = range(_count(shapes, r"encoder\.down\.(\d+)\..*"))
    try:
        return AutoencoderShape(
            encoder=tuple(shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in levels),
            decoder=tuple(shapes[f"decoder.up.{i}.block.0.conv1.weight"][0] for i in levels),
            layers=_count(shapes, r"encoder\.down\.0\.block\.(\d+)\..*"),
            latent=shapes["decoder.post_quant_conv.weight"][0],
            groups=groups,
            attention="encoder.mid.attn_1.q.weight" in shapes,
        )
    except KeyError as missing:
        raise BadWeights(f"The {what} is not a FLUX.2 autoencoder: it has no {missing.args[0]}.") from None


def text_encoder(path: Path, layers: tuple[int, ...]) -> Part[TextEncoder]:
    """Qwen3 in a transformers folder, cut after the last of `layers`."""
    config = _config(path)
    if config.get("model_type") != "qwen3":
        raise BadWeights(f"The text encoder is {config.get('model_type')!r}; klein reads with qwen3.")
    if max(layers) > config["num_hidden_layers"]:
        raise BadWeights(f"The text encoder has {config['num_hidden_layers']} layers; layer {max(layers)} is read.")
    tensors = Tensors.folder(path)
    with torch.device("meta"):
        module = TextEncoder(config, layers)
    needed = plain(name for name, _ in module.named_parameters())
    # The layers above the cut, the final norm above them, and the language model's head: never read.
    above = "|".join(str(i) for i in range(max(layers), config["num_hidden_layers"])) or "(?!)"
    unneeded = re.compile(rf"lm_head\..*|model\.norm\..*|model\.layers\.(?:{above})\..*")
    return Part("text encoder", module, tensors, needed, unneeded)


def _ours(tensors: Tensors, table: Table) -> dict[str, Shape]:
    """The shapes found, under our names."""
    return {place.name: tensors.shapes[their] for their, place in table.items() if their in tensors.shapes}


def _restrict(table: Table, module: nn.Module) -> Table:
    names = module.state_dict().keys()
    return {their: place for their, place in table.items() if place.name in names}


def _count(names: dict[str, Shape], pattern: str) -> int:
    numbers = (re.fullmatch(pattern, name) for name in names)
    return 1 + max((int(found.group(1)) for found in numbers if found), default=-1)


def _config(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise BadWeights(f"{folder} has no config.json.", hint="Download it again.") from None
    except ValueError as error:
        raise BadWeights(f"{folder / 'config.json'} is not JSON: {error}.", hint="Download it again.") from None
