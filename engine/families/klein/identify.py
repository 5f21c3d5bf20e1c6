"""Identify a variant by name, hub repository, hash, or earlier answer."""

import difflib
import hashlib
import re
from pathlib import Path

from engine.checkpoints.files import Header
from engine.contract import BadWeights, Fix, ModelNotFound
from engine.families.klein.answers import Answers
from engine.families.klein.key_maps import transformer_name
from engine.families.klein.variants import EMBEDDED, VARIANTS, Variant


def by_path(path: Path) -> Variant | None:
    """Identify by the name of a path or of its hub repository."""
    name = path.name if path.is_dir() else path.stem
    return by_name(name) or by_repository(path)


_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_SIZE = re.compile(r"(?:flux2?)?(?:klein)?(?:base|kv)?([49]b)(?:base|kv|distilled)?")
_BASE = re.compile(r"kleinbase|base([49]b)?$")
_KV = re.compile(r"kv([49]b)?$")


def by_name(name: str) -> Variant | None:
    """Identify by words: `klein`, a size, and maybe `base` or `kv`.

    flux-2-klein-4b, FLUX.2-klein-base-4B-fp8, flux2Klein_9bBase, flux2KleinBase9b, klein4b (1),
    Flux2-Klein-9B-True-V3-bf16 are names that people have.
    """
    if name == EMBEDDED:
        return VARIANTS[EMBEDDED]
    words = [word for word in re.split(r"[^a-z0-9]+", _CAMEL.sub("-", name).lower()) if word]
    if not any("klein" in word for word in words):
        return None
    sizes = {found[1] for word in words if (found := _SIZE.fullmatch(word))}
    if len(sizes) != 1:
        return None
    base = any(map(_BASE.search, words))
    kv = any(map(_KV.search, words))
    return VARIANTS.get("klein-" + ("base-" if base else "") + sizes.pop() + ("-kv" if kv else ""))


_FORMAT_ENDING = re.compile(r"[-_.](?:(?:ud[-_])?i?q\d\w*|f16|f32)$", re.IGNORECASE)
_FORMATS = {file.format for row in VARIANTS.values() for file in row.files}
_PUBLISHED_WORDS = {"flux", "2", "flux2", "klein", "4b", "9b", "base", "kv", "fp16", "safetensors"} | _FORMATS


def is_published_name(name: str) -> bool:
    """Return whether a name tells variant and format alone.

    A fine-tune has a word of its own.
    """
    words = re.split(r"[^a-z0-9]+", _CAMEL.sub("-", _FORMAT_ENDING.sub("", name)).lower())
    return set(words) - {""} <= _PUBLISHED_WORDS


def by_repository(path: Path) -> Variant | None:
    """Identify by the repository of a snapshot in the hub's cache: models--owner--name/snapshots/revision/…"""
    snapshot = next((folder for folder in (path, *path.parents) if folder.parent.name == "snapshots"), None)
    if snapshot is None:
        return None
    repo = snapshot.parent.parent.name.removeprefix("models--").replace("--", "/", 1).lower()
    for row in VARIANTS.values():
        if repo in {row.repo.lower(), *(known.repo.lower() for known in row.files)} - {""}:
            return row
    return by_name(repo.rpartition("/")[2])


def by_hash(file: Path, answers: Answers) -> Variant | None:
    """Identify a renamed published file, hashed once, by size and hash."""
    size = file.stat().st_size
    rows = [(row, known) for row in VARIANTS.values() for known in row.files if known.sha256 and known.bytes == size]
    if not rows:
        return None
    # The hub's cache names each large file by its hash.
    blob = file.resolve().name
    digest = blob if len(blob) == 64 else answers.sha256(file)
    if not digest:
        digest = sha256(file)
        answers.remember(file, sha256=digest)
    return next((row for row, known in rows if digest.startswith(known.sha256)), None)


def by_known_hash(file: Path, answers: Answers) -> Variant | None:
    """Identify by a hash that is known without reading the file."""
    return by_hash(file, answers) if answers.sha256(file) or len(file.resolve().name) == 64 else None


def by_answer(file: Path, answers: Answers) -> Variant | None:
    """Identify by the user's earlier answer."""
    return VARIANTS.get(answers.variant(file))


def sha256(file: Path) -> str:
    """Hash a whole file: 18 GB take a minute."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def width(header: Header) -> int:
    """Return the width of the transformer in a file, or 0."""
    names = ("img_in.weight", "x_embedder.weight")
    widths = (
        entry.shape[0] for name, entry in header.entries.items() if entry.shape and transformer_name(name) in names
    )
    return next(widths, 0)


def has_width(row: Variant, width: int) -> bool:
    """Return whether a variant has this width, or no published one has."""
    widths = {row.hidden for row in VARIANTS.values() if row.hidden}
    return row.hidden == width or not {width, row.hidden} <= widths


def check_width(file: Path, width: int, row: Variant) -> None:
    """Raise BadWeights if `row` is of another width."""
    if not has_width(row, width):
        raise BadWeights(f"{file.name} is {width} wide; {row.name} is {row.hidden}.", fix=_fix(width))


def ambiguous_variant(file: Path, width: int) -> BadWeights:
    """Return the error for a file that nothing identifies."""
    return BadWeights(
        f"{file.name} does not say which klein it is; the files of two variants look alike.", fix=_fix(width)
    )


def _fix(width: int) -> Fix:
    """Return a fix that names the variants of this width."""
    names = [name for name in VARIANTS if name != EMBEDDED]
    names = [name for name in names if VARIANTS[name].hidden == width] or names
    return Fix("set", "variant", choices=tuple(names))


def named(variant: str) -> Variant:
    """Return the variant of this name. Raises ModelNotFound."""
    if variant not in VARIANTS:
        raise unknown_name(variant, "")
    return VARIANTS[variant]


def unknown_name(name: str, rest: str) -> ModelNotFound:
    """Return the error for an unknown name, with the nearest one."""
    near = difflib.get_close_matches(name, VARIANTS, 1)
    meant = f" Did you mean {near[0]}?" if near else ""
    return ModelNotFound(f"There is no model {name!r}.{meant} Known: {', '.join(VARIANTS)}; {rest}".rstrip("; "))
