"""Components: files -> networks on the meta device and their key maps."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from engine.checkpoints import quant
from engine.checkpoints.files import Shape, read_header
from engine.checkpoints.key_map import KeyMap, identity_map
from engine.checkpoints.loading import Allocator, check_tensors, load_into
from engine.checkpoints.narrow import narrowed
from engine.checkpoints.reader import DTYPES
from engine.checkpoints.tensors import Rename, Tensors
from engine.contract import BadWeights
from engine.families.klein import foreign, signatures
from engine.families.klein.checkpoint import Checkpoint
from engine.families.klein.folder import read_json
from engine.families.klein.key_maps import (
    autoencoder_name,
    diffusers_autoencoder,
    diffusers_transformer,
    encoder_name,
    transformer_name,
)
from engine.families.klein.text_encoder import TextEncoder
from engine.families.klein.transformer import KLEIN_THETA, Transformer, TransformerShape
from engine.memory.device import Device
from engine.nn.autoencoder import Autoencoder, AutoencoderShape

log = logging.getLogger(__name__)

Net = TypeVar("Net", bound=nn.Module)

_MOST_BLOCKS = 64
"""More blocks of a kind than any FLUX.2 has (dev: 48)."""

_CPU = torch.device("cpu")
_NOTHING = re.compile(r"(?!)")


@dataclass(frozen=True, slots=True)
class QuantPolicy:
    """The way quantised layers are held.

    wanted: the scheme the user asked for, None for the file's own.

    compact: layers in a scheme that cannot be computed with become fp8, not the model's dtype.
    narrow: large matrices of 16 bits stay so and are widened for each product; those that are decoded become bf16.
    """

    wanted: str | None = None
    compact: bool = False
    narrow: bool = False


@dataclass(frozen=True, slots=True)
class ComponentSpec(Generic[Net]):
    """A network on the meta device, and what will fill it.

    layers: names of the linear layers in its blocks. widened: whether some are stored in a scheme that cannot be
    computed with, so that `QuantPolicy.compact` would make it smaller.
    """

    what: str
    module: Net
    tensors: Tensors
    key_map: KeyMap
    ignored: re.Pattern[str]
    layers: tuple[str, ...] = field(default=())
    widened: bool = False

    @property
    def bytes(self) -> int:
        """Bytes that will be read from disk."""
        return sum(self.tensors.bytes(name) for name in self.key_map)

    def verify(self) -> None:
        """Raise BadWeights for a missing, extra or misshapen tensor."""
        check_tensors(self.module, self.tensors, self.key_map, self.what, self._ignore)

    def load(self, device: Device, allocate: Allocator | None = None) -> Iterator[int]:
        """Read the weights, yielding bytes as they are read."""
        yield from load_into(
            self.module,
            self.tensors,
            self.key_map,
            device,
            what=self.what,
            ignore=self._ignore,
            allocate=allocate,
        )

    def _ignore(self, name: str) -> bool:
        return self.ignored.fullmatch(name) is not None


def _open(path: Path, component: str, rename: Rename) -> Tensors:
    """Open a file or a folder. Raises BadWeights for another component."""
    if not path.is_file():
        return Tensors.folder(path, rename)
    header = read_header(path)
    foreign.refuse(header)
    signatures.expect(header, component)
    return Tensors.open([path], rename)


def _refuse_absent(tensors: Tensors, what: str) -> None:
    if tensors.absent:
        shard = min(tensors.absent.values())
        raise BadWeights(f"The {what} lacks {shard}, which its index names.", hint="Download it again.")


def transformer(
    path: Path, policy: QuantPolicy | None = None, device: torch.device = _CPU
) -> ComponentSpec[Transformer]:
    """Open the velocity field in a diffusers folder or single file."""
    what = f"transformer {path.name}" if path.is_file() else "transformer"
    config = {} if path.is_file() else _read_config(path)
    tensors = _open(path, signatures.TRANSFORMER, transformer_name)
    _refuse_absent(tensors, what)
    # Content tells the layout, not the name: some single files carry diffusers' names, some folders BFL's.
    diffusers = "x_embedder.weight" in tensors.shapes
    key_map = diffusers_transformer(_MOST_BLOCKS) if diffusers else identity_map(tensors.shapes)
    if config.get("guidance_embeds") or any("guidance_in." in name for name in tensors.shapes):
        raise BadWeights(f"The {what} has a guidance embedding: that is FLUX.2 [dev], not klein.")
    with _config_errors(what), torch.device("meta"):
        shape = _transformer_shape(_to_our_names(tensors, key_map), config, what)
        module = Transformer(shape)
    if diffusers:
        key_map = _restrict(diffusers_transformer(max(shape.double_blocks, shape.single_blocks)), module)
    else:
        key_map = identity_map(name for name, _ in module.named_parameters())
    blocks = r"(?:double|single)_blocks\..*"
    policy = policy or QuantPolicy()
    layers, widened = _quantise(module, blocks, tensors, key_map, policy, device)
    if policy.narrow:
        _narrow(module, tensors, key_map)
    return ComponentSpec(what, module, tensors, key_map, _NOTHING, layers, widened)


def _quantise(
    module: nn.Module, blocks: str, tensors: Tensors, key_map: KeyMap, policy: QuantPolicy, device: torch.device
) -> tuple[tuple[str, ...], bool]:
    """Replace block layers by quantised ones, by file and policy.

    Returns the names of all block layers, and whether some are stored in a scheme that is widened.
    """
    stored = {place.name: tensors.quantised.get(source) for source, place in key_map.items()}
    linears = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    found = tuple(name for name in linears if re.fullmatch(blocks, name))
    widened = False
    for name in found:
        layer, held = linears[name], stored.get(f"{name}.weight")
        scheme = quant.memory_scheme(held, policy.wanted, device, compact=policy.compact)
        widened = widened or (held is not None and held.scheme.memory_scheme(held, device) is None)
        if layer.bias is None and scheme is not None and scheme.fits(layer):
            full_precision = held is not None and held.full_precision
            with torch.device("meta"):
                module.set_submodule(name, scheme.make(layer, device, full_precision=full_precision))
    return found, widened


def _narrow(module: nn.Module, tensors: Tensors, key_map: KeyMap) -> None:
    """Replace large layers by ones that hold their weights in 16 bits."""
    stored: dict[str, set[torch.dtype | None]] = {}
    for source, place in key_map.items():
        plain = tensors.entries[source].storage_dtype if source in tensors.entries else ""
        held = "BF16" if source in tensors.quantised else plain
        stored.setdefault(place.name, set()).add(DTYPES[held] if held in _NARROW else None)
    for name, layer in list(module.named_modules()):
        dtypes = stored.get(f"{name}.weight", set())
        held = next(iter(dtypes)) if len(dtypes) == 1 else None
        if held is not None:
            with torch.device("meta"):
                narrow = narrowed(layer, held)
            if narrow is not None:
                module.set_submodule(name, narrow)


_NARROW = ("BF16", "F16")
"""The formats of files that are held as they are: widened, they mean the same numbers."""


def verify(checkpoint: Checkpoint) -> None:
    """Raise BadWeights unless the files are complete, reading headers only."""
    layers = checkpoint.variant.text_layers
    for part in (
        transformer(checkpoint.transformer),
        text_encoder(checkpoint.text_encoder, layers),
        autoencoder(checkpoint.vae),
    ):
        part.verify()


def _transformer_shape(shapes: dict[str, Shape], config: dict[str, Any], what: str) -> TransformerShape:
    double, single = _blocks(config, "num_layers", what), _blocks(config, "num_single_layers", what)
    try:
        hidden, channels = shapes["img_in.weight"]
        shape = TransformerShape(
            hidden=hidden,
            channels=channels,
            head_dim=shapes["single_blocks.0.norm.query_norm.scale"][0],
            context=shapes["txt_in.weight"][1],
            # Counted only where no config says: what lacks its last block must not pass for a smaller model.
            double_blocks=double or _count(shapes, r"double_blocks\.(\d+)\..*") or 1,
            single_blocks=single or _count(shapes, r"single_blocks\.(\d+)\..*"),
            mlp=shapes["single_blocks.0.linear2.weight"][1] - hidden,
            time_channels=shapes["time_in.in_layer.weight"][1],
        )
    except KeyError as missing:
        raise BadWeights(f"The {what} is not a FLUX.2 [klein] transformer: it has no {missing.args[0]}.") from None
    except (ValueError, IndexError):
        raise BadWeights(f"The {what} is not a FLUX.2 [klein] transformer: a weight of it is not a matrix.") from None
    axes = tuple(config.get("axes_dims_rope", (shape.head_dim // 4,) * 4))
    if sum(axes) != shape.head_dim:
        raise BadWeights(f"The {what} turns {sum(axes)} channels of a head that has {shape.head_dim}.")
    theta = float(config.get("rope_theta", KLEIN_THETA))
    return replace(shape, axes=axes, theta=theta)


def _blocks(config: dict[str, Any], key: str, what: str) -> int:
    """Return a config's number of blocks, within reason, or 0."""
    count = config.get(key, 0)
    if type(count) is not int or not 0 <= count <= _MOST_BLOCKS:
        raise BadWeights(f"The {what}'s config says {key} {str(count)[:20]}; at most {_MOST_BLOCKS} is read.")
    return count


def autoencoder(path: Path) -> ComponentSpec[Autoencoder]:
    """Open the autoencoder in a diffusers folder or single file."""
    what = f"autoencoder {path.name}" if path.is_file() else "autoencoder"
    config = {} if path.is_file() else _read_config(path)
    tensors = _open(path, signatures.AUTOENCODER, autoencoder_name)
    _refuse_absent(tensors, what)
    diffusers = any(name.startswith("encoder.down_blocks.") for name in tensors.shapes)
    if diffusers:
        levels = _count(tensors.shapes, r"encoder\.down_blocks\.(\d+)\..*")
        layers = _count(tensors.shapes, r"decoder\.up_blocks\.0\.resnets\.(\d+)\..*")
        key_map = {autoencoder_name(n): place for n, place in diffusers_autoencoder(levels, layers).items()}
    else:
        key_map = identity_map(tensors.shapes)
    with _config_errors(what), torch.device("meta"):
        shape = _autoencoder_shape(_to_our_names(tensors, key_map), config, what)
        module = Autoencoder(shape)
    key_map = _restrict(key_map, module) if diffusers else identity_map(module.state_dict())
    return ComponentSpec(what, module, tensors, key_map, re.compile(r"bn\.num_batches_tracked"))


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
    except IndexError:
        raise BadWeights(f"The {what} is not a FLUX.2 autoencoder: a weight of it is not a matrix.") from None


def text_encoder(
    path: Path, layers: tuple[int, ...], device: torch.device = _CPU, *, compact: bool = False, narrow: bool = False
) -> ComponentSpec[TextEncoder]:
    """Open Qwen3, cut after the last of `layers`."""
    what = f"text encoder {path.name}" if path.is_file() else "text encoder"
    tensors = _open(path, signatures.TEXT_ENCODER, encoder_name)
    config = _qwen3_config(tensors.shapes, what) if path.is_file() else _read_config(path)
    if config.get("model_type") != "qwen3":
        raise BadWeights(f"The {what} is {config.get('model_type')!r}; klein reads with qwen3.")
    with _config_errors(what), torch.device("meta"):
        if not max(layers) <= config["num_hidden_layers"] <= _MOST_LAYERS:
            raise BadWeights(f"The {what} has {config['num_hidden_layers']} layers; layer {max(layers)} is read.")
        module = TextEncoder(config, layers)
    key_map = identity_map(name for name, _ in module.named_parameters())
    policy = QuantPolicy(compact=compact)
    inside, widened = _quantise(module, r"model\.layers\..*", tensors, key_map, policy, device)
    if narrow:
        _narrow(module, tensors, key_map)
    return ComponentSpec(what, module, tensors, key_map, _unread(max(layers)), inside, widened)


def _unread(read: int) -> re.Pattern[str]:
    """Match layers above the cut, the final norm and the head."""
    above = "|".join(str(i) for i in range(read, _MOST_LAYERS))
    return re.compile(rf"lm_head\..*|model\.norm\..*|model\.layers\.(?:{above})\..*|logit_scale|rope_freqs\..*")


_MOST_LAYERS = 100
"""More than any Qwen3 has."""


def _qwen3_config(shapes: dict[str, Shape], what: str) -> dict[str, Any]:
    """Return the config that a single file leaves out.

    The values that no shape tells are alike in every Qwen3.
    """
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
    except (ValueError, IndexError, ZeroDivisionError):
        raise BadWeights(f"The {what} is not Qwen3: a weight of it is not a matrix.") from None


def _to_our_names(tensors: Tensors, key_map: KeyMap) -> dict[str, Shape]:
    """Return the shapes found, under our names."""
    return {place.name: tensors.shapes[source] for source, place in key_map.items() if source in tensors.shapes}


def _restrict(key_map: KeyMap, module: nn.Module) -> KeyMap:
    names = module.state_dict().keys()
    return {source: place for source, place in key_map.items() if place.name in names}


def _count(names: dict[str, Shape], pattern: str) -> int:
    """Return one more than the highest number in matching names."""
    numbers = (re.fullmatch(pattern, name) for name in names)
    # A name may hold any number; a hundred is more than any of these networks has.
    return 1 + min(100, max((int(found.group(1)[:9]) for found in numbers if found), default=-1))


_WRONG_CONFIG = (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError)
"""Errors that constructors, ours and torch's, raise for a wrong config or shape. Any other one is a fault of ours."""


@contextmanager
def _config_errors(what: str) -> Iterator[None]:
    """Turn a constructor's error into BadWeights: the config is at fault."""
    try:
        yield
    except _WRONG_CONFIG as error:
        log.debug("the %s's config makes no sense", what, exc_info=error)
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise BadWeights(f"The {what}'s config makes no sense ({reason[:200]}).", hint="Download it again.") from error


def _read_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    foreign.refuse_config(config, folder)
    return config
