"""Read LoRA files of any trainer as deltas of our layers."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from engine.checkpoints import quant
from engine.checkpoints.files import read_header
from engine.checkpoints.reader import CODE_DTYPES, TensorReader
from engine.checkpoints.tensors import Tensors
from engine.contract import BadWeights
from engine.families.klein import signatures
from engine.families.klein.lora.deltas import Dense, Hadamard, Kronecker, LowRank, Matrix, RowRange, WeightDelta
from engine.families.klein.lora.files import Lora, Training
from engine.families.klein.lora.names import columns_of, find_rows, is_text_encoder, layer_names
from engine.families.klein.transformer import Transformer

_LEAF = re.compile(
    r"^(?P<module>.+?)[._](?P<leaf>lora_A|lora_B|lora_down|lora_up|lora_mid|lora\.down|lora\.up"
    r"|lokr_w[12](?:_[ab])?|lokr_t2|hada_w[12]_[ab]|hada_t[12]|oft_\w+|alpha|dora_scale|lora_magnitude_vector|magnitude"
    r"|diff_b|diff|set_weight|reshape_weight|bias)(?P<adapter>\.(?!weight$|bias$)[\w-]+)?(?:\.(?P<end>weight|bias))?$"
)
_DOWN, _UP = ("lora_A", "lora_down", "lora.down"), ("lora_B", "lora_up", "lora.up")
_MAGNITUDES = ("dora_scale", "lora_magnitude_vector", "magnitude")
_UNREAD = ("lokr_t2", "hada_t1", "hada_t2", "lora_mid", "reshape_weight", "oft_")
"""Kinds that no trainer of klein was found to write."""

Leaves = dict[str, Tensor]


class LoraDeltas(NamedTuple):
    """The deltas of a file, and warnings about the rest."""

    deltas: list[WeightDelta]
    warnings: list[str]


def read(lora: Lora, transformer: Transformer) -> LoraDeltas:
    """Read the deltas of a file for a transformer.

    Raises BadWeights for a file that is no LoRA, was made for another base, changes what is not read, or has NaN.
    """
    header = read_header(lora.path)
    if (found := signatures.component(header)) != signatures.LORA:
        raise BadWeights(f"{lora.path.name} is {found or 'something unknown'}, not a LoRA.")
    training = Training.of(header)
    names = layer_names(transformer)
    deltas: list[WeightDelta] = []
    skipped: list[str] = []
    for module, leaves in _read_modules(lora).items():
        if is_text_encoder(module):
            skipped.append(module)
            continue
        rows = find_rows(module, names)
        if rows is None:
            raise BadWeights(
                f"LoRA {lora.path.name} changes {module}, which klein lacks.", hint="Is it for another model?"
            )
        if (delta := _delta(_Source(lora, module, rows, transformer, training), leaves)) is not None:
            deltas.append(delta)
    if skipped and not deltas:
        raise BadWeights(f"LoRA {lora.path.name} changes only the text encoder, which is not read.")
    note = f"LoRA {lora.path.stem} also changes the text encoder ({len(skipped)} layers), which is not applied"
    return LoraDeltas(deltas, [note] if skipped else [])


def _read_modules(lora: Lora) -> dict[str, Leaves]:
    """Return each module's tensors in fp32, finite but for alpha."""
    tensors = Tensors.open([lora.path])
    modules: dict[str, Leaves] = {}
    with TensorReader(torch.device("cpu")) as reader:
        for name in tensors.shapes:
            leaf = _LEAF.match(name)
            if leaf is None:
                raise BadWeights(f"LoRA {lora.path.name} has {name[:100]}, which is not read.")
            kind = f"{leaf['leaf']}.bias" if leaf["end"] == "bias" else leaf["leaf"]
            held = modules.setdefault(leaf["module"], {})
            if kind in held:
                raise BadWeights(f"LoRA {lora.path.name} holds several adapters for {leaf['module']}.")
            _check_readable(lora, name, kind, tensors)
            held[kind] = _load(tensors, name, reader)
            # An alpha is checked where it scales: ai-toolkit's for LoKr of full rank is infinite in fp16, and unused.
            if kind != "alpha":
                _check_finite(lora, name, held[kind])
    return modules


def _check_finite(lora: Lora, name: str, tensor: Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise BadWeights(
            f"LoRA {lora.path.name} has numbers that are not finite in {name[:100]}: its training diverged.",
            hint="Leave it away, or take an earlier checkpoint of it.",
        )


def _check_readable(lora: Lora, name: str, kind: str, tensors: Tensors) -> None:
    """Raise BadWeights for an unknown dtype or a misshapen tensor."""
    shape = tensors.shapes[name]
    if name not in tensors.quantised and (dtype := tensors.entries[name].storage_dtype) not in CODE_DTYPES:
        raise BadWeights(f"In LoRA {lora.path.name}, {name[:100]} is stored as {dtype}, which is not read.")
    is_factor = kind in (*_DOWN, *_UP) or kind.startswith(("lokr_", "hada_"))
    fewest = 2 if is_factor else 1 if kind in ("diff", "set_weight") else 0
    if len(shape) < fewest or 0 in shape or (kind.startswith("hada") and len(shape) != fewest):
        raise BadWeights(
            f"In LoRA {lora.path.name}, {name[:100]} has the shape {list(shape)}, which no trainer writes.",
            hint="Download it again.",
        )


def _load(tensors: Tensors, name: str, reader: TensorReader) -> Tensor:
    stored = tensors.quantised.get(name)
    if stored is None:
        return reader.load(tensors.entries[name]).float()
    return quant.decode({n: reader.load(entry) for n, entry in stored.entries.items()}, stored, torch.float32)


class _Source(NamedTuple):
    """The origin of a module's tensors, and the rows they change."""

    lora: Lora
    module: str
    rows: RowRange
    transformer: Transformer
    training: Training

    def refuse(self, reason: str, hint: str = "") -> BadWeights:
        return BadWeights(f"LoRA {self.lora.path.name} {reason}.", hint=hint)


def _delta(source: _Source, leaves: Leaves) -> WeightDelta | None:
    """Return a module's delta, None where it changes nothing."""
    for leaf in ("diff_b", "lora_B.bias", "lora_up.bias", "bias"):
        if leaf in leaves and not bool(leaves.pop(leaf).any()):
            # klein's layers have no bias; one of zeros changes nothing.
            continue
    if odd := next((leaf for leaf in leaves if leaf.startswith(_UNREAD) or leaf.endswith(("bias", "diff_b"))), None):
        raise source.refuse(f"uses {odd} ({source.module}), which is not read")
    if not leaves:
        return None
    matrix, scale, replaces = _matrix(source, leaves)
    magnitude, by_columns = _magnitude(source, leaves, matrix)
    _check_shape(source, matrix.shape)
    return WeightDelta(source.rows, matrix, scale, source.lora.scale, magnitude, by_columns, replaces)


def _matrix(source: _Source, leaves: Leaves) -> tuple[Matrix, float, bool]:
    """Return the matrix, its scale, and whether it replaces the weight."""
    up = next((leaves[leaf].flatten(1) for leaf in _UP if leaf in leaves), None)
    down = next((leaves[leaf].flatten(1) for leaf in _DOWN if leaf in leaves), None)
    if up is not None and down is not None and up.shape[1] == down.shape[0]:
        return LowRank(up, down), _scale(source, leaves, down.shape[0]), False
    if {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} <= leaves.keys():
        first, second = (LowRank(leaves[f"hada_w{i}_a"], leaves[f"hada_w{i}_b"]) for i in (1, 2))
        if first.shape == second.shape and first.up.shape[1] == first.down.shape[0]:
            return Hadamard(first, second), _scale(source, leaves, first.down.shape[0]), False
    if any(leaf.startswith("lokr") for leaf in leaves):
        return *_kronecker(source, leaves), False
    for leaf in ("diff", "set_weight"):
        if leaf in leaves:
            matrix = leaves[leaf]
            return Dense(matrix[:, None] if matrix.ndim == 1 else matrix.flatten(1)), 1.0, leaf == "set_weight"
    raise source.refuse(f"lacks half of {source.module}", "Download it again.")


def _scale(source: _Source, leaves: Mapping[str, Tensor], rank: int) -> float:
    if "alpha" in leaves:
        _check_finite(source.lora, f"{source.module}.alpha", leaves["alpha"])
        return float(leaves["alpha"].reshape(-1)[0]) / rank
    return source.training.scale(source.module, rank)


def _kronecker(source: _Source, leaves: Leaves) -> tuple[Kronecker, float]:
    """Build LoKr. Each factor is whole or a product, which alpha scales."""
    first, second = (_kronecker_factor(source, leaves, name) for name in ("lokr_w1", "lokr_w2"))
    # Before any product is written out: 80 kB can declare one of 1.5 GB.
    _check_shape(source, (first.shape[0] * second.shape[0], first.shape[1] * second.shape[1]))
    scale = 1.0
    for factor in (first, second):
        if isinstance(factor, LowRank):
            scale = _scale(source, leaves, factor.down.shape[0])
    return Kronecker(first.rows(0, first.shape[0]), second.rows(0, second.shape[0])), scale


def _kronecker_factor(source: _Source, leaves: Leaves, name: str) -> LowRank | Dense:
    if name in leaves:
        return Dense(leaves[name].flatten(1))
    if not {f"{name}_a", f"{name}_b"} <= leaves.keys():
        raise source.refuse(f"lacks half of {source.module}", "Download it again.")
    a, b = leaves[f"{name}_a"].flatten(1), leaves[f"{name}_b"].flatten(1)
    if a.shape[1] != b.shape[0]:
        raise source.refuse(f"has factors of {source.module} that do not fit together", "Download it again.")
    return LowRank(a, b)


def _magnitude(source: _Source, leaves: Leaves, matrix: Matrix) -> tuple[Tensor | None, bool]:
    """Return DoRA's magnitudes, and whether they are of columns.

    Magnitudes of columns are [1, in], of rows [out, 1] or [out].
    """
    found = next((leaves[leaf] for leaf in _MAGNITUDES if leaf in leaves), None)
    if found is None:
        return None, False
    rows, columns = matrix.shape
    by_columns = found.ndim == 2 and found.shape[0] == 1 and found.shape[1] != 1
    if found.numel() != (columns if by_columns else rows):
        raise source.refuse(f"has {list(found.shape)} magnitudes for {source.module} of {rows}×{columns}")
    return found.flatten(), by_columns


def _check_shape(source: _Source, shape: tuple[int, int]) -> None:
    rows = source.rows
    expected = (rows.end - rows.begin, columns_of(source.transformer, rows))
    if shape != expected:
        raise source.refuse(
            f"was made for another base: {source.module} is {shape[0]}×{shape[1]} in it, "
            f"{expected[0]}×{expected[1]} in this model",
            "4B LoRAs go with 4B models, 9B ones with 9B models.",
        )
