"""What lies among the models, looks like a klein, and has no name to be called by: what it is, and what to do."""

from pathlib import Path

from engine.checkpoints.files.safetensors import Header, kind, kind_of
from engine.contract import BadWeights
from engine.families.klein import identify

UNREAD = (".gguf", ".ckpt", ".pt", ".pth", ".sft")
"""Suffixes of weights that are not searched for models, but told of, so that nobody wonders where theirs is."""

_KLEIN = "klein"
"""In the name of a file, before it is worth a word that it cannot be read: other programs' models lie here too."""


def why(file: Path) -> str:
    """Of a single file: why it is no model that could be called by name; "" for one that is, or is no klein."""
    if identify.by_place(file) and kind_of(file):
        return ""
    try:
        header = Header.read(file)
    except BadWeights as problem:
        return str(problem) if _KLEIN in file.name.lower() else ""
    if kind(header) != "transformer":
        return ""
    return str(identify.ask(file, identify.width(header)) if file.suffix == ".safetensors" else unread(file))


def unread(file: Path) -> BadWeights:
    """What to say of a file in a format that is not read, or with a name that is not searched."""
    try:
        Header.read(file)
    except BadWeights as problem:
        return problem
    return BadWeights(f"{file.name} is not searched.", hint="Rename it to end in .safetensors.")


def in_place_of_a_model(folder: Path, kleins: list[Path], index: str) -> BadWeights:
    """What to say of a folder without an index that was given as a model: what it has instead."""
    if kleins:
        there = ", ".join(file.name for file in kleins)
        return BadWeights(f"{folder} has {len(kleins)} klein files: {there}.", hint="Give one of them.")
    if (folder.parent / index).is_file():
        return BadWeights(f"{folder} is a part of the model in {folder.parent}.", hint="Give that folder.")
    if found := next((file for file in sorted(folder.glob("*")) if file.suffix in UNREAD), None):
        return unread(found)
    return BadWeights(
        f"{folder} has no {index}, nor is one klein file in it.", hint="Give a whole diffusers model or a file."
    )
