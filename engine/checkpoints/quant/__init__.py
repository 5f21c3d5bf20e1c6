"""Storage formats of a linear layer: which one each layer of a file is in, and which one it shall have in memory."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from engine.checkpoints.files.safetensors import Entry, Shape
from engine.checkpoints.quant import fp8, nvfp4
from engine.checkpoints.quant.fp8 import Fp8Linear
from engine.checkpoints.quant.nvfp4 import Nvfp4Linear
from engine.contract import BadWeights, InvalidJob
from engine.memory.device import multiplies_fp8, stores_fp8

Quant = Literal["fp8", "nvfp4"]
QUANTS: tuple[Quant, ...] = ("fp8", "nvfp4")
"""Formats that a user may ask for."""

Decode = Callable[[dict[str, Tensor], torch.dtype], Tensor]

DECODE: Mapping[str, Decode] = {"fp8": fp8.decode, "nvfp4": nvfp4.decode}
ENCODE: Mapping[str, Callable[[Tensor], dict[str, Tensor]]] = {"fp8": fp8.encode, "nvfp4": nvfp4.encode}

QuantLinear = Fp8Linear | Nvfp4Linear

# Suffixes of what lies beside a quantised weight; the second spelling is ComfyUI's older one.
_BESIDE = {
    "weight_scale": "weight_scale",
    "weight_scale_2": "weight_scale_2",
    "input_scale": "input_scale",
    "scale_weight": "weight_scale",
    "scale_input": "input_scale",
}
_MARK = ".comfy_quant"
_OLD_MARK = "scaled_fp8"
_READ = {"float8_e4m3fn": "fp8", "float8_e5m2": "fp8", "nvfp4": "nvfp4"}
"""Names of formats in a file's own words, and ours."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A quantised layer as a file holds it. entries: by our names. full_precision: never to be multiplied as it is."""

    kind: str
    entries: dict[str, Entry]
    full_precision: bool = False

    @property
    def shape(self) -> Shape:
        """Of the weight that is meant."""
        rows, columns = self.entries["weight"].shape
        return (rows, 2 * columns) if self.kind == "nvfp4" else (rows, columns)

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.entries.values())


def stored_layers(
    entries: Mapping[str, Entry], header_metadata: Mapping[str, str], read: Callable[[Entry], bytes]
) -> tuple[dict[str, Stored], set[str]]:
    """The quantised layers among `entries`, by the weight's name; and all names that belong to one or mark it.

    Decided layer by layer from what the file holds: the published files differ in which layers they left in bf16.
    read: the bytes of a small marker. Raises BadWeights for a format that is not read.
    """
    said = _said(entries, header_metadata, read)
    layers: dict[str, Stored] = {}
    used = {name for name in entries if name.endswith((_MARK, "." + _OLD_MARK)) or name == _OLD_MARK}
    for name, entry in entries.items():
        layer, _, leaf = name.rpartition(".")
        if leaf != "weight" or not _is_quantised(entry, said.get(layer)):
            continue
        beside = {our: entries[f"{layer}.{their}"] for their, our in _BESIDE.items() if f"{layer}.{their}" in entries}
        kind = "nvfp4" if entry.format == "U8" else "fp8"
        if kind == "nvfp4" and not {"weight_scale", "weight_scale_2"} <= beside.keys():
            raise BadWeights(f"{name} is packed in a format that is not read; read are {', '.join(_READ)}.")
        _check_scales(kind, entry, beside)
        full = bool(said.get(layer, {}).get("full_precision_matrix_mult", False))
        layers[name] = Stored(kind, {"weight": entry, **beside}, full)
        used |= {f"{layer}.{their}" for their in _BESIDE if f"{layer}.{their}" in entries}
    return layers, used


def _check_scales(kind: str, weight: Entry, beside: Mapping[str, Entry]) -> None:
    """Raises BadWeights for scales of another format (mxfp8 has one for 32 weights, others one a column)."""
    rows, columns = weight.shape
    whole = ("F32", "BF16", "F16")
    wanted: dict[str, tuple[tuple[str, ...], set[int]]] = {
        "weight_scale": (whole, {1, rows}), "weight_scale_2": (whole, {1}), "input_scale": (whole, {1}),
    }  # fmt: skip
    if kind == "nvfp4":
        wanted["weight_scale"] = (("F8_E4M3",), {rows * 2 * columns // nvfp4.GROUP})
    for name, scale in beside.items():
        formats, counts = wanted[name]
        if scale.format not in formats or math.prod(scale.shape) not in counts:
            raise BadWeights(
                f"{scale.name} is {scale.format} {list(scale.shape)}: a scaling that is not read; "
                f"read are {', '.join(_READ)}."
            )


def _is_quantised(entry: Entry, said: dict | None) -> bool:
    if said is not None and said.get("format") not in _READ:
        raise BadWeights(
            f"{entry.name} is quantised as {said.get('format')}, which is not read; read are {', '.join(_READ)}."
        )
    return len(entry.shape) == 2 and entry.format in ("F8_E4M3", "F8_E5M2", "U8")


def _said(entries: Mapping[str, Entry], metadata: Mapping[str, str], read: Callable[[Entry], bytes]) -> dict[str, dict]:
    """Layer -> what the header's metadata or ComfyUI's marker tensors say of it."""
    try:
        said: dict[str, dict] = dict(json.loads(metadata.get("_quantization_metadata", "{}")).get("layers", {}))
        for name, entry in entries.items():
            if name.endswith(_MARK):
                said[name.removesuffix(_MARK)] = json.loads(read(entry))
    except (ValueError, AttributeError) as problem:
        raise BadWeights(f"The quantisation metadata makes no sense: {problem}.", hint="Download it again.") from None
    return said


def check(quant: str | None) -> None:
    """Raises InvalidJob for a format there is not."""
    if quant is not None and quant not in QUANTS:
        raise InvalidJob(f"quant is {quant!r}; allowed: {', '.join(QUANTS)}.")


def target(stored: Stored | None, wanted: str | None, device: torch.device) -> str | None:
    """The format a layer shall have in memory; None for the model's own dtype.

    wanted: what was asked for ; without it a layer stays as its file holds it.
    """
    if not stores_fp8(device):
        # Everything is widened as it is read.
        return None
    if wanted is not None:
        return wanted
    if stored is None:
        return None
    # Widening four bits at every step costs more than it saves where fp8 is multiplied as it is; and packing what they
    # are multiplied with, on Blackwell, is not yet one kernel. Who lacks the memory for fp8 asks for nvfp4.
    return "fp8" if stored.kind == "nvfp4" and multiplies_fp8(device) else stored.kind


def fits(kind: str, layer: nn.Linear) -> bool:
    """Whether a layer of this size can be held in that format: nvfp4's scales lie in whole blocks."""
    return kind != "nvfp4" or (layer.out_features % 128 == 0 and layer.in_features % 64 == 0)


def make(kind: str, layer: nn.Linear, device: torch.device, *, full_precision: bool = False) -> QuantLinear:
    """A layer of that format in place of `layer`."""
    if kind == "nvfp4":
        native = nvfp4.multiplies(device) and not full_precision
        return Nvfp4Linear(layer.in_features, layer.out_features, native=native)
    native = multiplies_fp8(device) and not full_precision
    return Fp8Linear(layer.in_features, layer.out_features, native=native)
