"""From files to the three networks: read the shapes, make the module on the meta device, fill it."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from engine.checkpoints import quant
from engine.checkpoints.files.safetensors import Header, Shape, expect
from engine.checkpoints.loading import Home, Tensors, fill
from engine.contract import BadWeights
from engine.families.klein.key_maps import (
    KeyMap,
    bfl_name,
    diffusers_autoencoder,
    diffusers_transformer,
    encoder_name,
    plain,
)
from engine.families.klein.text_encoder import TextEncoder
from engine.families.klein.transformer import KLEIN_THETA, Transformer, TransformerShape
from engine.memory.device import Device
from engine.nn.autoencoder import Autoencoder, AutoencoderShape

Net = TypeVar("Net", bound=nn.Module)

_MOST_BLOCKS = 64
"""More blocks of a kind than any FLUX.2 has (dev: 48)."""

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class ComponentSpec(Generic[Net]):
    """A network on the meta device, and what will fill it. layers: names of the linear layers in its blocks."""

    what: str
    module: Net
    tensors: Tensors
    table: KeyMap
    unneeded: re.Pattern[str]
    layers: tuple[str, ...] = field(default=())

    @property
    def bytes(self) -> int:
        """What will be read, in bytes on disk."""
        return sum(self.tensors.bytes(name) for name in self.table)

    def fill(self, placement: Device, home: Home | None = None) -> Iterator[int]:
        """Read the weights into their places; yields bytes as they are read."""
        ignore = self.unneeded.fullmatch
        yield from fill(
            self.module,
            self.tensors,
            self.table,
            placement,
            what=self.what,
            ignore=lambda name: bool(ignore(name)),
            home=home,
        )


_NOTHING = re.compile(r"(?!)")


def _open(path: Path, part: str, rename: Any = str) -> Tensors:
    """The tensors of a file or a folder. Raises BadWeights for a file that is something else."""
    if not path.is_file():
        return Tensors.folder(path, rename)
    expect(Header.read(path), part)
    return Tensors.open([path], rename)


def _all_there(tensors: Tensors, what: str) -> None:
    if tensors.absent:
        shard = min(tensors.absent.values())
        raise BadWeights(f"The {what} lacks {shard}, which its index names.", hint="Download it again.")


def transformer(path: Path, wanted: str | None = None, device: torch.device = _CPU) -> ComponentSpec[Transformer]:
    """The velocity field in a diffusers `transformer/` folder or in BFL's single file.

    wanted: the format its blocks shall have on `device`, None for the file's own.
    """
    what = f"transformer {path.name}" if path.is_file() else "transformer"
    config = {} if path.is_file() else _config(path)
    tensors = _open(path, "transformer", bfl_name)
    _all_there(tensors, what)
    # Content tells the layout, not the name: some single files carry diffusers' names, some folders BFL's.
    theirs = "x_embedder.weight" in tensors.shapes
    table = diffusers_transformer(_MOST_BLOCKS) if theirs else plain(tensors.shapes)
    if config.get("guidance_embeds") or any("guidance_in." in name for name in tensors.shapes):
        raise BadWeights(f"The {what} has a guidance embedding: that is FLUX.2 [dev], not klein.")
    with _making(what), torch.device("meta"):
        shape = _transformer_shape(_ours(tensors, table), config, what)
        module = Transformer(shape)
    if theirs:
        table = _restrict(diffusers_transformer(max(shape.double_blocks, shape.single_blocks)), module)
    else:
        table = plain(name for name, _ in module.named_parameters())
    layers = _quantise(module, r"(?:double|single)_blocks\..*", tensors, table, wanted, device)
    return ComponentSpec(what, module, tensors, table, _NOTHING, layers)


def _quantise(
    module: nn.Module, blocks: str, tensors: Tensors, table: KeyMap, wanted: str | None, device: torch.device
) -> tuple[str, ...]:
    """Put layers of another format where the file has them or `wanted` says so; the names of all block layers."""
    stored = {place.name: tensors.quantised.get(their) for their, place in table.items()}
    linears = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    found = tuple(name for name in linears if re.fullmatch(blocks, name))
    for name in found:
        layer, held = linears[name], stored.get(f"{name}.weight")
        kind = quant.target(held, wanted, device)
        if layer.bias is None and kind is not None and quant.fits(kind, layer):
            full_precision = held is not None and held.full_precision
            with torch.device("meta"):
                module.set_submodule(name, quant.make(kind, layer, device, full_precision=full_precision))
    return found


def _transformer_shape(shapes: dict[str, Shape], config: dict[str, Any], what: str) -> TransformerShape:
    try:
        hidden, channels = shapes["img_in.weight"]
        shape = TransformerShape(
            hidden=hidden,
            channels=channels,
            head_dim=shapes["single_blocks.0.norm.query_norm.scale"][0],
            context=shapes["txt_in.weight"][1],
            # Counted only where no config says: what lacks its last block must not pass for a smaller model.
            double_blocks=config.get("num_layers") or _count(shapes, r"double_blocks\.(\d+)\..*") or 1,
            single_blocks=config.get("num_single_layers") or _count(shapes, r"single_blocks\.(\d+)\..*"),
            mlp=shapes["single_blocks.0.linear2.weight"][1] - hidden,
            time_channels=shapes["time_in.in_layer.weight"][1],
        )
    except KeyError as missing:
        raise BadWeights(f"The {what} is not a FLUX.2 [klein] transformer: it has no {missing.args[0]}.") from None
    except (ValueError, IndexError):
        raise BadWeights(f"The {what} is not a FLUX.2 [klein] transformer: a matrix in it is none.") from None
    axes = tuple(config.get("axes_dims_rope", (shape.head_dim // 4,) * 4))
    if sum(axes) != shape.head_dim:
        raise BadWeights(f"The {what} turns {sum(axes)} channels of a head that has {shape.head_dim}.")
    theta = float(config.get("rope_theta", KLEIN_THETA))
    return replace(shape, axes=axes, theta=theta)


def autoencoder(path: Path) -> ComponentSpec[Autoencoder]:
    """The autoencoder in a diffusers `vae/` folder or in BFL's single file, with the full or the small decoder."""
    what = f"autoencoder {path.name}" if path.is_file() else "autoencoder"
    config = {} if path.is_file() else _config(path)
    tensors = _open(path, "autoencoder")
    _all_there(tensors, what)
    theirs = any(name.startswith("encoder.down_blocks.") for name in tensors.shapes)
    if theirs:
        levels = _count(tensors.shapes, r"encoder\.down_blocks\.(\d+)\..*")
        layers = _count(tensors.shapes, r"decoder\.up_blocks\.0\.resnets\.(\d+)\..*")
        table = diffusers_autoencoder(levels, layers)
    else:
        table = plain(tensors.shapes)
    with _making(what), torch.device("meta"):
        shape = _autoencoder_shape(_ours(tensors, table), config, what)
        module = Autoencoder(shape)
    table = _restrict(table, module) if theirs else plain(module.state_dict())
    return ComponentSpec(what, module, tensors, table, re.compile(r"bn\.num_batches_tracked"))


def _autoencoder_shape(shapes: dict[str, Shape], config: dict[str, Any], what: str) -> AutoencoderShape:
    levels = range(_count(shapes, r"encoder\.down\.(\d+)\..*"))
    try:
        return AutoencoderShape(
            encoder=tuple(shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in levels),
            decoder=tuple(shapes[f"decoder.up.{i}.block.0.conv1.weight"][0] for i in levels),
            layers=_count(shapes, r"encoder\.down\.0\.block\.(\d+)\..*"),
            latent=shapes["decoder.post_quant_conv.weight"][0],
            groups=config.get("norm_num_groups", AutoencoderShape().groups),
            # nano has none; whether its absence is meant, only a config can tell.
            attention=config.get("mid_block_add_attention", AutoencoderShape().attention),
        )
    except KeyError as missing:
        raise BadWeights(f"The {what} is not a FLUX.2 autoencoder: it has no {missing.args[0]}.") from None


def text_encoder(path: Path, layers: tuple[int, ...], device: torch.device = _CPU) -> ComponentSpec[TextEncoder]:
    """Qwen3 in a transformers folder or a single file, cut after the last of `layers`."""
    what = f"text encoder {path.name}" if path.is_file() else "text encoder"
    tensors = _open(path, "text encoder", encoder_name)
    config = _qwen3(tensors.shapes, what) if path.is_file() else _config(path)
    if config.get("model_type") != "qwen3":
        raise BadWeights(f"The {what} is {config.get('model_type')!r}; klein reads with qwen3.")
    with _making(what), torch.device("meta"):
        if max(layers) > config["num_hidden_layers"]:
            raise BadWeights(f"The {what} has {config['num_hidden_layers']} layers; layer {max(layers)} is read.")
        module = TextEncoder(config, layers)
    needed = plain(name for name, _ in module.named_parameters())
    inside = _quantise(module, r"model\.layers\..*", tensors, needed, None, device)
    return ComponentSpec(what, module, tensors, needed, _unneeded(max(layers)), inside)


def _unneeded(read: int) -> re.Pattern[str]:
    """The layers above the cut, the final norm above them, and the language model's head: never read."""
    above = "|".join(str(i) for i in range(read, _MOST_LAYERS))
    return re.compile(rf"lm_head\..*|model\.norm\..*|model\.layers\.(?:{above})\..*")


_MOST_LAYERS = 100
"""More than any Qwen3 has."""


def _qwen3(shapes: dict[str, Shape], what: str) -> dict[str, Any]:
    """The config that a single file leaves out. What no shape tells is alike in every Qwen3."""
    first = "model.layers.0"
    try:
        vocabulary, hidden = shapes["model.embed_tokens.weight"]
        head_dim = shapes[f"{first}.self_attn.q_norm.weight"][0]
        return {
            "model_type": "qwen3",
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": shapes[f"{first}.mlp.gate_proj.weight"][0],
            "num_hidden_layers": _count(shapes, r"model\.layers\.(\d+)\..*"),
            "num_attention_heads": shapes[f"{first}.self_attn.q_proj.weight"][0] // head_dim,
            "num_key_value_heads": shapes[f"{first}.self_attn.k_proj.weight"][0] // head_dim,
            "head_dim": head_dim,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "max_position_embeddings": 40960,
        }
    except KeyError as missing:
        raise BadWeights(f"The {what} is not Qwen3: it has no {missing.args[0]}.") from None


def _ours(tensors: Tensors, table: KeyMap) -> dict[str, Shape]:
    """The shapes found, under our names."""
    return {place.name: tensors.shapes[their] for their, place in table.items() if their in tensors.shapes}


def _restrict(table: KeyMap, module: nn.Module) -> KeyMap:
    names = module.state_dict().keys()
    return {their: place for their, place in table.items() if place.name in names}


def _count(names: dict[str, Shape], pattern: str) -> int:
    numbers = (re.fullmatch(pattern, name) for name in names)
    return 1 + max((int(found.group(1)) for found in numbers if found), default=-1)


@contextmanager
def _making(what: str) -> Iterator[None]:
    """Whatever a module cannot be made of is the config's fault, in whichever words torch or transformers put it."""
    try:
        yield
    except BadWeights:
        raise
    except Exception as problem:
        why = " ".join(f"{type(problem).__name__}: {problem}".split())
        raise BadWeights(f"The {what}'s config makes no sense ({why[:200]}).", hint="Download it again.") from None


def _config(folder: Path) -> dict[str, Any]:
    try:
        said = json.loads((folder / "config.json").read_text())
        if not isinstance(said, dict):
            raise ValueError(f"it is a {type(said).__name__}")
        return said
    except FileNotFoundError:
        raise BadWeights(f"{folder} has no config.json.", hint="Download it again.") from None
    except PermissionError:
        raise BadWeights(f"{folder / 'config.json'} may not be read by this user.", hint="Run: chmod u+r it.") from None
    except ValueError as error:
        raise BadWeights(
            f"{folder / 'config.json'} is not a JSON object: {error}.", hint="Download it again."
        ) from None
