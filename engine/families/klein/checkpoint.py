"""Checkpoint: the files of one model."""

from dataclasses import dataclass
from pathlib import Path

from engine.families.klein.variants import Variant


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The file or folder of each component of a model.

    An all-in-one checkpoint is the file of several components.
    """

    variant: Variant
    transformer: Path
    vae: Path
    text_encoder: Path
    tokenizer: Path
