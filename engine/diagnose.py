"""Explain why what looks like a model cannot be used."""

from pathlib import Path

from engine.checkpoints.files import SUFFIXES, read_header
from engine.contract import BadWeights
from engine.families.klein import foreign, identify, signatures

UNREAD_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".onnx", ".dduf")
"""Of weights that are not searched for models, but reported, so that nobody wonders where theirs is."""

_KLEIN = "klein"
"""In the name of a file, before it is worth a line that it cannot be read: other programs' models are here too."""


def reason(file: Path) -> BadWeights | None:
    """Return why a klein in a single file is unusable, else None."""
    try:
        found = signatures.read_components(file)
    except BadWeights as error:
        return error if _KLEIN in file.name.lower() else None
    if signatures.TRANSFORMER not in found:
        return None
    try:
        header = read_header(file)
        foreign.refuse(header)
        if file.suffix not in SUFFIXES:
            return BadWeights(f"{file.name} is not searched.", hint="Rename it to end in .safetensors.")
        width = identify.width(header)
        if (row := identify.by_path(file)) is None:
            return identify.ambiguous_variant(file, width)
        identify.check_width(file, width, row)
    except BadWeights as error:
        return error
    return None


def not_a_model(folder: Path, kleins: list[Path], index: str) -> BadWeights:
    """Return the error for a folder without an index: what it has."""
    if kleins:
        names = ", ".join(file.name for file in kleins)
        return BadWeights(f"{folder} has {len(kleins)} klein files: {names}.", hint="Give one of them.")
    if (folder.parent / index).is_file():
        return BadWeights(f"{folder} is a part of the model in {folder.parent}.", hint="Give that folder.")
    if error := next(filter(None, map(reason, filter(Path.is_file, sorted(folder.glob("*"))))), None):
        return error
    return BadWeights(
        f"{folder} has no {index}, nor is one klein file in it.", hint="Give a whole diffusers model or a file."
    )
