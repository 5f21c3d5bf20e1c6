"""Which variant a file or folder is: by its name, its place in the hub's cache, its hash; or what to ask the user."""

import difflib
import hashlib
from pathlib import Path

from engine.checkpoints.files.safetensors import Header
from engine.contract import BadWeights, Fix, ModelNotFound
from engine.families.klein.key_maps import bfl_name
from engine.families.klein.variants import EMBEDDED, FP8, FULL, NVFP4, VARIANTS, Variant


def by_place(path: Path) -> Variant | None:
    """By the name of a folder or file, or of the hub's repository that it came from."""
    return (
        by_name(path.name) or by_repository(path) if path.is_dir() else by_name(path.stem) or by_repository(path.parent)
    )


def by_name(name: str) -> Variant | None:
    """By a folder's or a file's name without its suffix."""
    return next((row for row in VARIANTS.values() if _spells(name, row.name)), None)


def _spells(name: str, variant: str) -> bool:
    plain = (
        name.lower()
        .replace("_", "-")
        .replace(".", "-")
        .replace("flux2-", "flux-2-")
        .removeprefix("flux-2-")
        .removesuffix("-safetensors")
    )
    return plain == variant or plain.startswith(tuple(f"{variant}-{quant}" for quant in (FP8, NVFP4, FULL)))


def by_repository(snapshot: Path) -> Variant | None:
    """Of a snapshot in the hub's cache: models--owner--name/snapshots/revision."""
    if snapshot.parent.name != "snapshots":
        return None
    repo = snapshot.parent.parent.name.removeprefix("models--").replace("--", "/", 1).lower()
    rows = VARIANTS.values()
    return next(
        (row for row in rows if repo in {row.repo.lower(), *(known.repo.lower() for known in row.files)} - {""}), None
    )


def by_hash(file: Path) -> Variant | None:
    """A renamed file of the published ones. Only a file of just that size is read through, and only once."""
    size = file.stat().st_size
    rows = [(row, known) for row in VARIANTS.values() for known in row.files if known.sha256 and known.bytes == size]
    if not rows:
        return None
    # The hub's cache names each large file by its hash.
    blob = file.resolve().name
    digest = blob if len(blob) == 64 else sha256(file)
    return next((row for row, known in rows if digest.startswith(known.sha256)), None)


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def width(header: Header) -> int:
    """Of the transformer that a file holds, which tells a 4B from a 9B; 0 where it has none."""
    names = ("img_in.weight", "x_embedder.weight")
    return next((entry.shape[0] for name, entry in header.entries.items() if bfl_name(name) in names), 0)


def check_width(file: Path, width: int, row: Variant) -> None:
    """Raises BadWeights if the published models that are so wide do not include `row`."""
    widths = {row.hidden for row in VARIANTS.values() if row.hidden}
    if {width, row.hidden} <= widths and row.hidden != width:
        raise BadWeights(f"{file.name} is {width} wide; {row.name} is {row.hidden}.", fix=_fix(width))


def ask(file: Path, width: int) -> BadWeights:
    """What to raise where nothing tells which klein a file is."""
    return BadWeights(
        f"{file.name} does not say which klein it is; the files of two variants look alike.", fix=_fix(width)
    )


def _fix(width: int) -> Fix:
    """Fix that names the variants of this width; all variants where none has it."""
    names = [name for name in VARIANTS if name != EMBEDDED]
    names = [name for name in names if VARIANTS[name].hidden == width] or names
    return Fix("set", "variant", choices=tuple(names))


def named(variant: str) -> Variant:
    """Raises ModelNotFound for a name that is none."""
    if variant not in VARIANTS:
        raise unknown(variant, "")
    return VARIANTS[variant]


def unknown(name: str, rest: str) -> ModelNotFound:
    """What to raise for a name that is none, with the one that was meant."""
    near = difflib.get_close_matches(name, VARIANTS, 1)
    meant = f" Did you mean {near[0]}?" if near else ""
    return ModelNotFound(f"There is no model {name!r}.{meant} Known: {', '.join(VARIANTS)}; {rest}".rstrip("; "))
