"""A model's name to its files: which variant a folder or a single file is, and where its companions lie."""

import difflib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.contract import BadWeights, ModelNotFound
from engine.variants import EMBEDDED, VARIANTS, Variant

NANO = Path(__file__).parent / "nano" / "weights"
INDEX = "model_index.json"
EXTRAS = "klein.json"
"""Beside model_index.json: what a klein that is not one of the published ones was made for."""

_EXTRA_KEYS = {"text_length", "text_layers", "native_size", "max_references"}
_DENOISERS = ("Flux2KleinPipeline", "Flux2KleinKVPipeline", "Flux2KleinInpaintPipeline")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where each part of a model lies. transformer and vae: a folder or a single file."""

    variant: Variant
    transformer: Path
    vae: Path
    text_encoder: Path
    tokenizer: Path


@dataclass(frozen=True, slots=True)
class Shelf:
    """Where models may lie.

    paths: folders that are models or hold models, and single files. hub: the hub's cache folder.
    """

    paths: tuple[Path, ...] = ()
    hub: Path | None = None

    def installed(self) -> dict[str, Path]:
        """Variant name -> its folder or file, for every published variant that is there."""
        found: dict[str, Path] = {EMBEDDED: NANO}
        for place in self._places():
            for name in VARIANTS:
                if name not in found and _is_named(place, name):
                    found[name] = place
        return found

    def find(self, model: str, variant: str | None = None) -> Checkpoint:
        """The checkpoint of a variant's name, a diffusers folder, or a single file.

        variant: what the user says the files are, where they cannot tell themselves.
        Raises ModelNotFound or BadWeights.
        """
        path = Path(model).expanduser()
        if model in VARIANTS:
            installed = self.installed()
            if model not in installed:
                raise ModelNotFound(
                    f"Model {model} is not installed; installed: {', '.join(installed)}.",
                    hint=f"Run: klein-mcp pull {model}",
                )
            return self._checkpoint(installed[model], VARIANTS[model])
        if path.is_absolute() or os.sep in model:
            if not path.exists():
                raise ModelNotFound(f"No model at {model}.")
            return self._checkpoint(path, VARIANTS[variant] if variant else None)
        near = difflib.get_close_matches(model, VARIANTS, 1)
        meant = f" Did you mean {near[0]}?" if near else ""
        raise ModelNotFound(
            f"There is no model {model!r}.{meant} Known: {', '.join(VARIANTS)}; or give the path of a folder or file."
        )

    def _places(self) -> Iterator[Path]:
        for path in self.paths:
            if not path.exists():
                continue
            yield path
            if path.is_dir() and not (path / INDEX).is_file():
                yield from sorted(child for child in path.iterdir() if _may_be_model(child))
        if self.hub is not None:
            yield from _snapshots(self.hub)

    def _checkpoint(self, path: Path, variant: Variant | None) -> Checkpoint:
        if path.is_dir():
            return _folder(path, variant)
        if path.suffix != ".safetensors":
            raise BadWeights(f"{path.name} is not safetensors.", hint="Only safetensors files and folders are read.")
        return self._single_file(path, variant)

    def _single_file(self, file: Path, variant: Variant | None) -> Checkpoint:
        """Companions come from the file's own folder, then from what is installed."""
        beside = [file.parent, *(place for place in self._places() if place.is_dir())]
        index = next((home for home in beside[:1] if (home / INDEX).is_file()), None)
        variant = variant or _by_name(file.stem)
        if variant is None and index is not None:
            variant = read_variant(index)
        if variant is None:
            raise BadWeights(
                f"{file.name} does not say which klein it is; the files of two variants look alike.",
                hint=f"Name it with --variant: {', '.join(name for name in VARIANTS if name != EMBEDDED)}.",
            )
        return Checkpoint(
            variant=variant,
            transformer=file,
            vae=_companion(beside, "vae", _VAE_FILES),
            text_encoder=_companion(beside, "text_encoder"),
            tokenizer=_companion(beside, "tokenizer"),
        )


_VAE_FILES = ("flux2-vae.safetensors", "flux2_vae.safetensors", "ae.safetensors")


def _companion(homes: list[Path], part: str, files: tuple[str, ...] = ()) -> Path:
    for home in homes:
        for name in files:
            if (home / name).is_file():
                return home / name
        if (home / part).is_dir():
            return home / part
    raise BadWeights(
        f"No {part} beside the file, nor in an installed model.",
        hint=f"Put the model's {part} folder next to it, or pull the whole model.",
    )


def _folder(folder: Path, variant: Variant | None) -> Checkpoint:
    if not (folder / INDEX).is_file():
        raise BadWeights(f"{folder} has no {INDEX}.", hint="Give the folder of a whole diffusers model.")
    for part in ("transformer", "vae", "text_encoder", "tokenizer"):
        if not (folder / part).is_dir():
            raise BadWeights(f"{folder} has no {part} folder.", hint="Download it again.")
    return Checkpoint(
        variant=read_variant(folder, variant),
        transformer=folder / "transformer",
        vae=folder / "vae",
        text_encoder=folder / "text_encoder",
        tokenizer=folder / "tokenizer",
    )


def read_variant(folder: Path, variant: Variant | None = None) -> Variant:
    """What a diffusers folder was made for: its index and klein.json overrule the row it starts from."""
    index = _json(folder / INDEX)
    kind = index.get("_class_name", "")
    if kind not in _DENOISERS:
        raise BadWeights(f"{folder / INDEX} names {kind or 'no pipeline'}; klein is one of {', '.join(_DENOISERS)}.")
    kv = kind == "Flux2KleinKVPipeline"
    # diffusers' default for is_distilled is False in the plain pipeline, True in the KV one.
    distilled = bool(index.get("is_distilled", kv))
    if variant is None:
        variant = _by_name(folder.name) or _from_hub(folder)
    if variant is None or (variant.kv, variant.distilled) != (kv, distilled):
        like = VARIANTS["klein-4b"] if distilled else VARIANTS["klein-base-4b"]
        variant = replace(like, name=folder.name, title=folder.name, repo="", licence="unknown", kv=kv, memory_gb=0.0)
    return _with_extras(variant, folder)


def _with_extras(variant: Variant, folder: Path) -> Variant:
    if not (folder / EXTRAS).is_file():
        return variant
    extras = _json(folder / EXTRAS)
    if unknown := extras.keys() - _EXTRA_KEYS:
        raise BadWeights(f"{folder / EXTRAS} has {min(unknown)!r}; known: {', '.join(sorted(_EXTRA_KEYS))}.")
    if "text_layers" in extras:
        extras["text_layers"] = tuple(extras["text_layers"])
    if "native_size" in extras:
        # A small klein was made for one area: it neither paints nor sees more than that.
        extras |= {"max_size": extras["native_size"], "reference_size": min(1024, extras["native_size"])}
    return replace(variant, **extras)


def _by_name(name: str) -> Variant | None:
    return next((row for row in VARIANTS.values() if _spells(name, row.name)), None)


def _spells(name: str, variant: str) -> bool:
    plain = name.lower().replace("_", "-").replace(".", "-").removeprefix("flux-2-").removesuffix("-safetensors")
    return plain == variant or plain.startswith(tuple(f"{variant}-{quant}" for quant in ("fp8", "nvfp4", "bf16")))


def _is_named(place: Path, name: str) -> bool:
    if place == NANO or not _may_be_model(place):
        return False
    owner = _from_hub(place)
    return owner.name == name if owner else _spells(place.stem if place.is_file() else place.name, name)


def _may_be_model(path: Path) -> bool:
    return (path / INDEX).is_file() if path.is_dir() else path.suffix == ".safetensors"


def _from_hub(snapshot: Path) -> Variant | None:
    """The variant of a snapshot in the hub's cache: models--owner--name/snapshots/revision."""
    if snapshot.parent.name != "snapshots":
        return None
    repo = snapshot.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
    return next((row for row in VARIANTS.values() if row.repo and row.repo.lower() == repo.lower()), None)


def _snapshots(hub: Path) -> Iterator[Path]:
    for row in VARIANTS.values():
        if row.repo:
            snapshots = hub / f"models--{row.repo.replace('/', '--')}" / "snapshots"
            yield from sorted(path for path in snapshots.glob("*") if (path / INDEX).is_file())


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        raise BadWeights(f"{file} is not there.", hint="Download it again.") from None
    except ValueError as error:
        raise BadWeights(f"{file} is not JSON: {error}.", hint="Download it again.") from None
