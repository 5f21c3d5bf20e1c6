"""Quantised weights: the scheme of each layer in files and in memory.

A scheme is one file in this package and one row in `SCHEMES`.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engine.checkpoints.files.header import Entry
from engine.checkpoints.quant import fp8, gguf_blocks, int8, mxfp8, nvfp4
from engine.checkpoints.quant.scheme import Marker, MemoryScheme, QuantLinear, Scheme, StoredWeight
from engine.contract import BadWeights, InvalidJob
from engine.memory.device import stores_fp8

SCHEMES: tuple[Scheme, ...] = (mxfp8.SCHEME, fp8.SCHEME, nvfp4.SCHEME, int8.SCHEME, gguf_blocks.SCHEME)
"""In the order in which a weight without a marker is tried."""
MEMORY_SCHEMES: dict[str, MemoryScheme] = {scheme.name: scheme for scheme in (fp8.SCHEME, nvfp4.SCHEME)}
"""Those whose layers can be computed with, in the order in which they are proposed to a user who lacks memory."""

_MARKERS = {marker: scheme for scheme in SCHEMES for marker in scheme.markers}
_READABLE = "read are " + ", ".join(sorted(_MARKERS))

_OLD_SPELLINGS = {"scale_weight": "weight_scale", "scale_input": "input_scale"}
"""ComfyUI's older names of the tensors beside a weight."""
_SIBLINGS = frozenset().union(*(scheme.siblings for scheme in SCHEMES))
_MARKER = ".comfy_quant"
_OLD_MARKER = "scaled_fp8"


def quantised_weights(
    entries: Mapping[str, Entry], declared: Mapping[str, Marker], read: Callable[[Entry], bytes]
) -> tuple[dict[str, StoredWeight], set[str]]:
    """Return the quantised weights, and all names that belong to them.

    Decided layer by layer from what the file holds: the published files differ in which layers they left in bf16.
    declared: the markers of headers, by layer. read: returns the bytes of a small marker. Raises BadWeights for a
    scheme that is not read.
    """
    markers = {**declared, **_stored_markers(entries, read)}
    weights: dict[str, StoredWeight] = {}
    used = {name for name in entries if name.endswith((_MARKER, "." + _OLD_MARKER)) or name == _OLD_MARKER}
    for name, entry in entries.items():
        layer, _, leaf = name.rpartition(".")
        if leaf != "weight" or len(entry.shape) != 2:
            continue
        names = {leaf: f"{layer}.{leaf}" for leaf in (*_SIBLINGS, *_OLD_SPELLINGS) if f"{layer}.{leaf}" in entries}
        siblings = {_OLD_SPELLINGS.get(leaf, leaf): entries[sibling] for leaf, sibling in names.items()}
        marker = markers.get(layer, {})
        if (scheme := _scheme(entry, siblings, marker)) is None:
            continue
        weights[name] = scheme.store(entry, {n: e for n, e in siblings.items() if n in scheme.siblings}, marker)
        used |= set(names.values())
    return weights, used


def _scheme(weight: Entry, siblings: Mapping[str, Entry], marker: Marker) -> Scheme | None:
    """Return the scheme of a weight, None for a plain one."""
    named = marker.get("format")
    if named is not None and named not in _MARKERS:
        raise BadWeights(f"{weight.name} is quantised as {str(named)[:40]}, which is not read; {_READABLE}.")
    if named is not None and weight.storage_dtype not in ("F32", "F16", "BF16"):
        return _MARKERS[named]
    found = next((scheme for scheme in SCHEMES if scheme.detect(weight, siblings)), None)
    if found is None and weight.storage_dtype == "U8":
        raise BadWeights(f"{weight.name} is packed in a format that is not read; {_READABLE}.")
    return found


def declared_markers(metadata: Mapping[str, str]) -> dict[str, Marker]:
    """Return the markers in a header's metadata, by layer. Raises BadWeights."""
    return _checked(lambda: dict(json.loads(metadata.get("_quantization_metadata", "{}")).get("layers", {})))


def _stored_markers(entries: Mapping[str, Entry], read: Callable[[Entry], bytes]) -> dict[str, Marker]:
    """Return the markers that are tensors of ComfyUI's, by layer."""
    found = {name.removesuffix(_MARKER): entry for name, entry in entries.items() if name.endswith(_MARKER)}
    return _checked(lambda: {layer: json.loads(read(entry)) for layer, entry in found.items()})


def _checked(parse: Callable[[], dict[str, Any]]) -> dict[str, Marker]:
    """Return the markers that `parse` finds. Raises BadWeights."""
    try:
        markers = parse()
        if any(not isinstance(marker, dict) for marker in markers.values()):
            raise ValueError("a layer's entry is no object")
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:100]
        raise BadWeights(f"The quantisation metadata makes no sense: {reason}.", hint="Download it again.") from None
    return markers


def check(quant: str | None) -> None:
    """Raise InvalidJob for a scheme that no layer can be held in."""
    if quant is not None and quant not in MEMORY_SCHEMES:
        raise InvalidJob(f"quant is {quant!r}; allowed: {', '.join(MEMORY_SCHEMES)}.")


def memory_scheme(
    stored: StoredWeight | None, wanted: str | None, device: torch.device, *, compact: bool = False
) -> MemoryScheme | None:
    """Return the scheme of a layer in memory, None for plain.

    wanted: what the user asked for; without it a layer stays as its file holds it. compact: layers whose own scheme
    cannot be computed with become fp8 instead of the model's dtype.
    """
    if not stores_fp8(device):
        # Everything is widened as it is read.
        return None
    name = wanted
    if wanted is None and stored is not None:
        name = stored.scheme.memory_scheme(stored, device) or (fp8.SCHEME.name if compact else None)
    return None if name is None else MEMORY_SCHEMES[name]


def decode(tensors: dict[str, Tensor], stored: StoredWeight, dtype: torch.dtype) -> Tensor:
    """Return the matrix that a file's tensors mean."""
    return stored.scheme.decode(tensors, dtype, stored.options)


def decode_layer(layer: QuantLinear, dtype: torch.dtype) -> Tensor:
    """Return the matrix that a layer in memory means."""
    return MEMORY_SCHEMES[layer.scheme].decode(dict(layer.named_buffers()), dtype, {})


def shape_of(layer: nn.Linear | QuantLinear) -> tuple[int, int]:
    """Rows and columns of the matrix that a layer multiplies by."""
    return layer.out_features, layer.in_features


def storage(quantised: Mapping[str, StoredWeight]) -> tuple[str, float]:
    """Return the scheme of most quantised weights, and their mean bits.

    The label of a GGUF weight is its block type.
    """
    weights: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for stored in quantised.values():
        label = stored.label
        weights[label] = weights.get(label, 0) + stored.shape[0] * stored.shape[1]
        sizes[label] = sizes.get(label, 0) + stored.bytes
    if not weights:
        return "", 16.0
    label = max(weights, key=lambda name: weights[name])
    return label, 8 * sum(sizes.values()) / max(1, sum(weights.values()))


__all__ = [
    "MEMORY_SCHEMES",
    "SCHEMES",
    "MemoryScheme",
    "QuantLinear",
    "Scheme",
    "StoredWeight",
    "check",
    "declared_markers",
    "decode",
    "decode_layer",
    "memory_scheme",
    "quantised_weights",
    "shape_of",
    "storage",
]
