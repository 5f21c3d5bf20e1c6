"""Checks that several schemes share."""

import math

from engine.checkpoints.files.header import Entry
from engine.contract import BadWeights

FLOATS = ("F32", "BF16", "F16")


def check_weight(weight: Entry, dtype: str, scheme: str) -> None:
    """Raise BadWeights for codes of another dtype than the scheme's."""
    if weight.storage_dtype != dtype:
        raise BadWeights(f"{weight.name} is marked as {scheme} and stored as {weight.storage_dtype}.")


def check_scale(scale: Entry | None, dtypes: tuple[str, ...], counts: set[int]) -> None:
    """Raise BadWeights for a scale of another dtype or count."""
    if scale is not None and (scale.storage_dtype not in dtypes or math.prod(scale.shape) not in counts):
        raise BadWeights(f"{scale.name} is {scale.storage_dtype} {list(scale.shape)}: a scaling that is not read.")
