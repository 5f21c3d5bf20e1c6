"""LoRA files of any producer, as changes of our layers: merged where weights are plain, beside them where quantised."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.checkpoints import quant
from engine.checkpoints.files.safetensors import Header, Shape, kind
from engine.checkpoints.loading import Reader, Tensors
from engine.checkpoints.quant import QuantLinear
from engine.contract import BadWeights, InvalidJob, ModelNotFound
from engine.families.klein.key_maps import diffusers_transformer
from engine.families.klein.transformer import Transformer


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA file and how strongly it is applied."""

    path: Path
    scale: float = 1.0

    def fingerprint(self) -> str:
        """Of its content and scale: they change the picture as the model's own weights do."""
        with self.path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256")
        digest.update(repr(self.scale).encode())
        return digest.hexdigest()


def find(text: str, folders: Iterable[Path]) -> Lora:
    """`path[:scale]` or `name[:scale]`, where a name is that of a file in a `loras` folder below `folders`.

    Raises ModelNotFound or InvalidJob.
    """
    name, scale = _split(text)
    path, short = Path(name).expanduser(), name.removesuffix(".safetensors")
    if path.is_absolute() or path.is_file():
        if not path.is_file():
            raise ModelNotFound(f"No LoRA at {path}.")
        return Lora(path, scale)
    there = {file.stem: file for folder in folders for file in sorted(folder.rglob("loras/**/*.safetensors"))}
    if short not in there:
        known = f"there are {', '.join(sorted(there))}" if there else "there are none in a loras folder"
        raise ModelNotFound(f"No LoRA {name!r}; {known}.", hint="Give its absolute path, or a name found there.")
    return Lora(there[short], scale)


def _split(text: str) -> tuple[str, float]:
    name, colon, scale = text.rpartition(":")
    # A single letter before the colon is a drive of Windows.
    if not colon or len(name) == 1:
        return text, 1.0
    try:
        return name, float(scale)
    except ValueError:
        raise InvalidJob(f"The scale of LoRA {text!r} is {scale!r}; it must be a number, as in {name}:0.8.") from None


@dataclass(frozen=True, slots=True)
class RowRange:
    """Which rows of which of our layers a change is for. swap: its halves change places, as in `layouts`."""

    layer: str
    begin: int
    end: int
    swap: bool = False


@dataclass(frozen=True, slots=True)
class WeightDelta:
    """What is added to some rows: up @ down, or a whole matrix in `up` where there is no `down`. Scaled already."""

    rows: RowRange
    up: Tensor
    down: Tensor | None = None

    def dense(self, begin: int, end: int) -> Tensor:
        """The part for rows begin … end of those it is for, in fp32."""
        up = self.up[begin:end]
        return up if self.down is None else up @ self.down


_LEAVES = re.compile(
    r"^(?P<module>.+?)[._](?P<leaf>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up"
    r"|lokr_w[12](?:_[ab])?|lokr_t2|hada_\w+|alpha|dora_scale|diff_b|diff)(?:\.default)?(?:\.weight)?$"
)
_DOWN, _UP = ("lora_A", "lora_down", "lora.down"), ("lora_B", "lora_up", "lora.up")

_PREFIX = re.compile(
    r"^(?:base_model_model_|lora_unet_|lora_transformer_|lycoris_|model_diffusion_model_|diffusion_model_|unet_"
    r"|transformer_(?!blocks_)|model_)+"
)


def read(lora: Lora, transformer: Transformer) -> list[WeightDelta]:
    """The changes a file makes to `transformer`, which may still be on the meta device.

    Raises BadWeights for a file that is no LoRA, was made for another base, or changes what is not read.
    """
    header = Header.read(lora.path)
    if (found := kind(header)) != "LoRA":
        raise BadWeights(f"{lora.path.name} is {found or 'something unknown'}, not a LoRA.")
    names = _names(transformer)
    modules: dict[str, dict[str, str]] = {}
    for key in header.entries:
        match = _LEAVES.match(key)
        if match is None:
            raise BadWeights(f"LoRA {lora.path.name} has a tensor of a kind that is not read: {key}.")
        modules.setdefault(match["module"], {})[match["leaf"]] = key
    tensors, trained = Tensors.open([lora.path]), _Trained.read(header)
    changes = []
    with Reader(torch.device("cpu")) as reader:
        for module, leaves in modules.items():
            rows = _rows(module, names, lora)
            held = {leaf: reader.load(tensors.entries[key]).float() for leaf, key in leaves.items()}
            if "alpha" not in held and (alpha := trained.alpha(module)) is not None:
                held["alpha"] = torch.tensor(alpha)
            changes.append(_change(rows, held, transformer, lora, module))
    return changes


@dataclass(frozen=True, slots=True)
class _Trained:
    """How diffusers says in the header that a LoRA was trained; without it alpha is the rank."""

    settings: dict[str, Any]

    @classmethod
    def read(cls, header: Header) -> "_Trained":
        try:
            said = json.loads(header.metadata.get("lora_adapter_metadata", "{}"))
            ours = {key.removeprefix(_OURS): value for key, value in said.items() if key.startswith(_OURS)}
        except (ValueError, AttributeError) as problem:
            raise BadWeights(f"What LoRA {header.file.name} says of itself makes no sense: {problem}.") from None
        if ours.get("use_rslora"):
            raise BadWeights(f"LoRA {header.file.name} was trained as rsLoRA, which is not read.")
        return cls(ours)

    def alpha(self, module: str) -> float | None:
        """Of a module; None where nothing is said."""
        own = self.settings.get("alpha_pattern") or {}
        found = (alpha for part, alpha in own.items() if f".{module}".endswith(f".{part}"))
        return next(found, self.settings.get("lora_alpha"))


_OURS = "transformer."
"""Before what is said of the transformer: a pipeline has other parts that can be trained."""


def _rows(module: str, names: dict[str, RowRange], lora: Lora) -> RowRange:
    plain = _PREFIX.sub("", module.replace(".", "_"))
    if plain.startswith("sformer_blocks_"):
        # A converter that cut the first letters off is in the world.
        plain = f"tran{plain}"
    if plain in names:
        return names[plain]
    if re.match(r"^(?:lora_te|text_encoder|te\d?_)", module):
        raise BadWeights(f"LoRA {lora.path.name} changes the text encoder ({module}), which is not read.")
    raise BadWeights(f"LoRA {lora.path.name} changes {module}, which klein has not.", hint="Is it for another model?")


def _names(transformer: Transformer) -> dict[str, RowRange]:
    """Every spelling of our layers' names, with underscores for dots, and the rows it means."""
    sizes = {name: _shape(layer)[0] for name, layer in transformer.named_modules() if _is_linear(layer)}
    names = {name: RowRange(name, 0, rows) for name, rows in sizes.items()}
    blocks = max(transformer.shape.double_blocks, transformer.shape.single_blocks)
    for their, place in diffusers_transformer(blocks).items():
        layer = place.name.removesuffix(".weight")
        if layer in sizes:
            part = sizes[layer] // place.parts
            rows = RowRange(layer, place.part * part, (place.part + 1) * part, place.swap)
            names[their.removesuffix(".weight")] = rows
    hidden = transformer.shape.hidden
    for i in range(transformer.shape.single_blocks):
        ours, theirs = f"single_blocks.{i}.linear1", f"single_transformer_blocks.{i}"
        names[f"{ours}_qkv"] = RowRange(ours, 0, 3 * hidden)
        # As FLUX.1 splits its single blocks: q, k, v of the hidden width each, then the whole of the MLP.
        for part, name in enumerate(("attn.to_q", "attn.to_k", "attn.to_v")):
            names[f"{theirs}.{name}"] = RowRange(ours, part * hidden, (part + 1) * hidden)
        names[f"{theirs}.proj_mlp"] = RowRange(ours, 3 * hidden, sizes[ours])
        names[f"{theirs}.proj_out"] = names[f"single_blocks.{i}.linear2"]
    return {name.replace(".", "_"): rows for name, rows in names.items()}


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear | QuantLinear)


def _shape(layer: nn.Module) -> Shape:
    assert isinstance(layer, nn.Linear | QuantLinear)
    return layer.out_features, layer.in_features


def _change(rows: RowRange, held: dict[str, Tensor], transformer: Transformer, lora: Lora, module: str) -> WeightDelta:
    up = next((held[leaf].flatten(1) for leaf in _UP if leaf in held), None)
    down = next((held[leaf].flatten(1) for leaf in _DOWN if leaf in held), None)
    if "dora_scale" in held or any(leaf.startswith(("hada", "lokr_t2", "diff_b")) for leaf in held):
        odd = next(leaf for leaf in held if leaf.startswith(("dora", "hada", "lokr_t2", "diff_b")))
        raise BadWeights(f"LoRA {lora.path.name} uses {odd} ({module}), which is not read.")
    if up is not None and down is not None:
        scale = _alpha(held, down.shape[0])
    elif any(leaf.startswith("lokr") for leaf in held):
        up, down, scale = *_kronecker(held), 1.0
    elif "diff" in held:
        up, down, scale = held["diff"].flatten(1), None, 1.0
    else:
        raise BadWeights(f"LoRA {lora.path.name} lacks half of {module}.", hint="Download it again.")
    theirs = (up.shape[0], (up if down is None else down).shape[1])
    ours = (rows.end - rows.begin, _shape(transformer.get_submodule(rows.layer))[1])
    if theirs != ours:
        raise BadWeights(
            f"LoRA {lora.path.name} was made for another base: {module} is {theirs[0]}×{theirs[1]} in it, "
            f"{ours[0]}×{ours[1]} in this model.",
            hint="4B LoRAs go with 4B models, 9B ones with 9B models.",
        )
    if rows.swap:
        up = torch.cat(tuple(reversed(up.chunk(2))))
    return WeightDelta(rows, up * (scale * lora.scale), down)


def _alpha(held: dict[str, Tensor], rank: int) -> float:
    return float(held["alpha"]) / rank if "alpha" in held else 1.0


def _kronecker(held: dict[str, Tensor]) -> tuple[Tensor, None]:
    """LoKr: the Kronecker product of two factors, each whole or a product itself; alpha counts only for a product."""
    scale = 1.0
    factors = []
    for name in ("lokr_w1", "lokr_w2"):
        if name in held:
            factors.append(held[name].flatten(1))
        else:
            a, b = held[f"{name}_a"].flatten(1), held[f"{name}_b"].flatten(1)
            factors.append(a @ b)
            scale = _alpha(held, b.shape[0])
    return scale * torch.kron(factors[0], factors[1]), None


_ROWS = 2048
"""Rows that are changed at once, in fp32."""


@torch.no_grad()
def apply(transformer: Transformer, changes: Iterable[WeightDelta]) -> None:
    """Make the changes. All that meet in a layer are summed in fp32 before the layer's own format rounds them."""
    by_layer: dict[str, list[WeightDelta]] = {}
    for change in changes:
        by_layer.setdefault(change.rows.layer, []).append(change)
    for name, there in by_layer.items():
        layer = transformer.get_submodule(name)
        if isinstance(layer, nn.Linear):
            _merge(layer.weight, there)
            continue
        assert isinstance(layer, QuantLinear)
        if whole := [change for change in there if change.down is None]:
            dtype = transformer.img_in.weight.dtype
            weight = quant.DECODE[layer.kind](dict(layer.named_buffers()), dtype)
            _merge(weight, whole)
            layer.take(dict(layer.named_buffers()) | quant.ENCODE[layer.kind](weight))
        if low_rank := [change for change in there if change.down is not None]:
            transformer.set_submodule(name, LoraLinear(layer, low_rank, transformer.img_in.weight))


def _merge(weight: Tensor, changes: list[WeightDelta]) -> None:
    for begin in range(0, weight.shape[0], _ROWS):
        end = min(begin + _ROWS, weight.shape[0])
        target = weight[begin:end]
        total = target.float()
        for change, first, last in _overlaps(changes, begin, end):
            delta = change.dense(first - change.rows.begin, last - change.rows.begin)
            total[first - begin : last - begin] += delta.to(total.device)
        target.copy_(total)


def _overlaps(changes: list[WeightDelta], begin: int, end: int) -> Iterator[tuple[WeightDelta, int, int]]:
    for change in changes:
        first, last = max(begin, change.rows.begin), min(end, change.rows.end)
        if first < last:
            yield change, first, last


class LoraLinear(nn.Module):
    """A layer whose weights stay as they are, with low-rank changes computed beside it."""

    def __init__(self, layer: QuantLinear, changes: list[WeightDelta], like: Tensor) -> None:
        """like: has the device and the format to compute in."""
        super().__init__()
        self.layer = layer
        self.rows = [(change.rows.begin, change.rows.end) for change in changes]
        for i, change in enumerate(changes):
            assert change.down is not None
            self.register_buffer(f"up_{i}", change.up.to(like))
            self.register_buffer(f"down_{i}", change.down.to(like))

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        for i, (begin, end) in enumerate(self.rows):
            out[..., begin:end] += F.linear(F.linear(x, getattr(self, f"down_{i}")), getattr(self, f"up_{i}"))
        return out
