"""A model's name to its files: which variant a folder or a single file is, and where its companions lie."""

import difflib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.contract import BadWeights, ModelNotFound
from engine.headers import Header, Shape, kind_of, storage
from engine.layouts import bfl_name, encoder_name
from engine.variants import EMBEDDED, FP8, FULL, NVFP4, VARIANTS, Variant

NANO = Path(__file__).parent / "nano" / "weights"
INDEX = "model_index.json"
EXTRAS = "klein.json"
"""Beside model_index.json: what a klein that is not one of the published ones was made for."""

_EXTRA_KEYS = {"text_length", "text_layers", "native_size", "max_references", "words"}
_DENOISERS = ("Flux2KleinPipeline", "Flux2KleinKVPipeline", "Flux2KleinInpaintPipeline")
_DEPTH = 3
"""Folders below a given one that are searched: ComfyUI's models/diffusion_models/flux/x.safetensors."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where each part of a model lies: a folder or a single file each; the tokenizer is always a folder."""

    variant: Variant
    transformer: Path
    vae: Path
    text_encoder: Path
    tokenizer: Path


@dataclass(frozen=True, slots=True)
class Source:
    """An installed model. path: its diffusers folder or single file. format: how its transformer is stored."""

    name: str
    path: Path
    format: str


@dataclass(frozen=True, slots=True)
class Shelf:
    """Where models may lie.

    paths: folders that are models or hold models (ComfyUI's `models` among them), and single files.
    hub: the hub's cache folder. small_decoder: take the distilled autoencoder where one is found.
    """

    paths: tuple[Path, ...] = ()
    hub: Path | None = None
    small_decoder: bool = False

    def sources(self) -> list[Source]:
        """Every model that is there and whose name is known, full precision first."""
        found = [Source(EMBEDDED, NANO, FULL)]
        for place in self._places():
            if place.is_dir() and _is_whole(place):
                row = _by_name(place.name) or _from_hub(place)
                found += [Source(row.name, place, _folder_format(place))] if row else []
            elif place.is_file() and kind_of(place) == "transformer":
                row = _by_name(place.stem) or _from_hub(place.parent)
                found += [Source(row.name, place, storage(Header.read(place)))] if row else []
        return sorted(found, key=lambda source: (FULL, FP8, NVFP4).index(source.format))

    def installed(self) -> dict[str, Path]:
        """Variant name -> its folder or file, for every published variant that is there."""
        found: dict[str, Path] = {}
        for source in self.sources():
            found.setdefault(source.name, source.path)
        return {name: found[name] for name in VARIANTS if name in found}

    def find(self, model: str, variant: str | None = None, quant: str | None = None) -> Checkpoint:
        """The checkpoint of a variant's name, a diffusers folder, or a single file.

        variant: what the user says the files are, where they cannot tell themselves.
        quant: the format that is preferred where a variant is there in several.
        Raises ModelNotFound or BadWeights.
        """
        path = Path(model).expanduser()
        row = _named(variant) if variant else None
        if model in VARIANTS:
            return self._checkpoint(self._source(model, quant), VARIANTS[model])
        if path.is_absolute() or os.sep in model:
            if not _exists(path):
                raise ModelNotFound(f"No model at {model}.")
            return self._checkpoint(path, row)
        raise _unknown(model, "or give the path of a folder or file.")

    def checkpoint(self, source: Source) -> Checkpoint:
        """Of an installed model. Raises BadWeights."""
        return self._checkpoint(source.path, VARIANTS[source.name])

    def _source(self, name: str, quant: str | None) -> Path:
        there = self.sources()
        ours = [source for source in there if source.name == name]
        if not ours:
            names = dict.fromkeys(source.name for source in there)
            raise ModelNotFound(
                f"Model {name} is not installed; installed: {', '.join(names)}.", hint=f"Run: klein-mcp pull {name}"
            )
        return next((source.path for source in ours if source.format == quant), ours[0].path)

    def _places(self) -> Iterator[Path]:
        """Folders with an index, and single files."""
        for path in self.paths:
            yield from _walk(path, _DEPTH)
        if self.hub is not None:
            yield from _snapshots(self.hub)

    def _checkpoint(self, path: Path, variant: Variant | None) -> Checkpoint:
        if path.is_dir():
            if (path / INDEX).is_file() or not (alone := _only_transformer(path)):
                return self._folder(path, variant)
            path = alone
        return self._single_file(path, variant)

    def _folder(self, folder: Path, variant: Variant | None) -> Checkpoint:
        if not (folder / INDEX).is_file():
            raise BadWeights(
                f"{folder} has no {INDEX}, nor is one klein file in it.", hint="Give a whole diffusers model or a file."
            )
        for part in ("transformer", "vae", "text_encoder", "tokenizer"):
            if not (folder / part).is_dir():
                raise BadWeights(f"{folder} has no {part} folder.", hint="Download it again.")
        vae = self._companion([folder], "vae", _autoencoders, _is_small) if self.small_decoder else folder / "vae"
        return Checkpoint(
            variant=read_variant(folder, variant),
            transformer=folder / "transformer",
            vae=vae,
            text_encoder=folder / "text_encoder",
            tokenizer=folder / "tokenizer",
        )

    def _single_file(self, file: Path, variant: Variant | None) -> Checkpoint:
        """Companions come from the file's own folder and those beside it, then from what is installed."""
        header = Header.read(file)
        shapes = {bfl_name(name): entry.shape for name, entry in header.entries.items()}
        width = next((shapes[name][0] for name in ("img_in.weight", "x_embedder.weight") if name in shapes), 0)
        row = variant or _of_file(file, width)
        if width in _WIDTHS and row.hidden in _WIDTHS and row.hidden != width:
            raise BadWeights(f"{file.name} is {width} wide; {row.name} is {row.hidden}.", hint=_say(_of_width(width)))
        context = next((shapes[name][1] for name in ("txt_in.weight", "context_embedder.weight") if name in shapes), 0)
        near = [file.parent, *(file.parent.parent / name for name in _COMFYUI)]
        return Checkpoint(
            variant=row,
            transformer=file,
            vae=self._companion(near, "vae", _autoencoders, lambda path: _is_small(path) == self.small_decoder),
            text_encoder=self._companion(
                near, "text_encoder", _encoders, lambda path: len(row.text_layers) * _encoder_width(path) == context
            ),
            tokenizer=self._companion(near, "tokenizer", _tokenizers, lambda path: True),
        )

    def _companion(
        self, near: list[Path], part: str, inside: "Callable[[Path], Iterator[Path]]", suits: Callable[[Path], bool]
    ) -> Path:
        """The first that suits; else the first at all, so that the error says what does not fit together."""
        first: Path | None = None
        for home in (*near, *self._places()):
            for found in inside(home):
                if suits(found):
                    return found
                first = first or found
        if first is None:
            raise BadWeights(
                f"No {part} beside the file, nor in an installed model.",
                hint=f"Put the model's {part} folder next to it, or pull the whole model.",
            )
        return first


_COMFYUI = ("vae", "text_encoders", "clip")
"""Folders of ComfyUI beside the one that holds transformers."""


def _autoencoders(home: Path) -> Iterator[Path]:
    if (home / "vae" / "config.json").is_file():
        yield home / "vae"
    yield from _files(home, "autoencoder")


def _encoders(home: Path) -> Iterator[Path]:
    if (home / "text_encoder" / "config.json").is_file():
        yield home / "text_encoder"
    yield from _files(home, "text encoder")


def _tokenizers(home: Path) -> Iterator[Path]:
    if (home / "tokenizer").is_dir():
        yield home / "tokenizer"


def _files(home: Path, kind: str) -> Iterator[Path]:
    files = [home] if home.is_file() else sorted(home.glob("*.safetensors"))
    yield from (file for file in files if kind_of(file) == kind)


def _shapes(path: Path) -> dict[str, Shape]:
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return {name: entry.shape for file in files for name, entry in Header.read(file).entries.items()}


def _encoder_width(path: Path) -> int:
    if path.is_dir():
        return int(_json(path / "config.json").get("hidden_size", 0))
    names = {encoder_name(name): shape for name, shape in _shapes(path).items()}
    return names.get("model.embed_tokens.weight", (0, 0))[1]


def _is_small(path: Path) -> bool:
    """Whether an autoencoder's decoder is narrower than its encoder."""
    shapes = _shapes(path)
    return shapes.get("decoder.conv_in.weight", (0,))[0] < shapes.get("encoder.conv_out.weight", (0, 0))[1]


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
        variant = replace(
            like, name=folder.name, title=folder.name, repo="", licence="unknown", kv=kv, memory_gb=0.0, files=()
        )
    return _with_extras(variant, folder)


def _with_extras(variant: Variant, folder: Path) -> Variant:
    if not (folder / EXTRAS).is_file():
        return variant
    extras = _json(folder / EXTRAS)
    if unknown := extras.keys() - _EXTRA_KEYS:
        raise BadWeights(f"{folder / EXTRAS} has {min(unknown)!r}; known: {', '.join(sorted(_EXTRA_KEYS))}.")
    if "text_layers" in extras:
        extras["text_layers"] = tuple(extras["text_layers"])
    if "words" in extras:
        extras["words"] = frozenset(extras["words"])
    if "native_size" in extras:
        # A small klein was made for one area: it neither paints nor sees more than that.
        extras |= {"max_size": extras["native_size"], "reference_size": min(1024, extras["native_size"])}
    return replace(variant, **extras)


def _of_file(file: Path, width: int) -> Variant:
    """Which klein a single file is: by the index beside it, by its name, by its hash. Raises BadWeights to ask."""
    if (file.parent / INDEX).is_file():
        return read_variant(file.parent)
    if row := _by_name(file.stem) or _from_hub(file.parent) or _by_hash(file):
        return row
    raise BadWeights(
        f"{file.name} does not say which klein it is; the files of two variants look alike.",
        hint=_say(_of_width(width)),
    )


_WIDTHS = {row.hidden for row in VARIANTS.values() if row.hidden}


def _of_width(width: int) -> list[str]:
    """Names of the variants that are so wide; all where none is."""
    names = [name for name in VARIANTS if name != EMBEDDED]
    return [name for name in names if VARIANTS[name].hidden == width] or names


def _say(names: list[str]) -> str:
    return f"Name it with --variant: {' or '.join(names) if len(names) < 3 else ', '.join(names)}."


def _by_hash(file: Path) -> Variant | None:
    """A renamed file of the published ones. Only a file of just that size is read through, and only once."""
    size = file.stat().st_size
    rows = [(row, known) for row in VARIANTS.values() for known in row.files if known.sha256 and known.bytes == size]
    if not rows:
        return None
    # The hub's cache names each large file by its hash.
    blob = file.resolve().name
    digest = blob if len(blob) == 64 else _sha256(file)
    return next((row for row, known in rows if digest.startswith(known.sha256)), None)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _by_name(name: str) -> Variant | None:
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


def _named(variant: str) -> Variant:
    if variant not in VARIANTS:
        raise _unknown(variant, "")
    return VARIANTS[variant]


def _unknown(name: str, rest: str) -> ModelNotFound:
    near = difflib.get_close_matches(name, VARIANTS, 1)
    meant = f" Did you mean {near[0]}?" if near else ""
    return ModelNotFound(f"There is no model {name!r}.{meant} Known: {', '.join(VARIANTS)}; {rest}".rstrip("; "))


def _walk(path: Path, depth: int) -> Iterator[Path]:
    try:
        if path.suffix == ".safetensors" and path.is_file():
            yield path
        elif path.is_dir():
            if (path / INDEX).is_file():
                yield path
                yield from sorted(path.glob("*.safetensors"))
            elif depth >= 0:
                for child in sorted(path.iterdir()):
                    if not child.name.startswith("."):
                        yield from _walk(child, depth - 1)
    except PermissionError:
        # A folder among many that is not ours to see: what can be read is enough.
        return


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError:
        raise BadWeights(f"{path} may not be read by this user.", hint="Change its permissions or its owner.") from None


def _is_whole(folder: Path) -> bool:
    """Whether a folder with an index has a transformer: the hub's cache may hold the companions alone."""
    return (folder / INDEX).is_file() and any((folder / "transformer").glob("*.safetensors"))


def _folder_format(folder: Path) -> str:
    try:
        return storage(Header.read(next((folder / "transformer").glob("*.safetensors"))))
    except BadWeights:
        return FULL


def _only_transformer(folder: Path) -> Path | None:
    found = list(_files(folder, "transformer"))
    return found[0] if len(found) == 1 else None


def _from_hub(snapshot: Path) -> Variant | None:
    """The variant of a snapshot in the hub's cache: models--owner--name/snapshots/revision."""
    if snapshot.parent.name != "snapshots":
        return None
    repo = snapshot.parent.parent.name.removeprefix("models--").replace("--", "/", 1).lower()
    rows = VARIANTS.values()
    return next(
        (row for row in rows if repo in {row.repo.lower(), *(known.repo.lower() for known in row.files)} - {""}), None
    )


def _snapshots(hub: Path) -> Iterator[Path]:
    """What the hub's cache holds of klein: folders with an index, and the files of flat repositories."""
    for repo in sorted(hub.glob("models--*")):
        if "klein" in repo.name.lower() or "flux" in repo.name.lower():
            for snapshot in sorted((repo / "snapshots").glob("*")):
                yield from _walk(snapshot, 1)


def _json(file: Path) -> dict[str, Any]:
    try:
        said = json.loads(file.read_text())
    except FileNotFoundError:
        raise BadWeights(f"{file} is not there.", hint="Download it again.") from None
    except PermissionError:
        raise BadWeights(f"{file} may not be read by this user.", hint="Change its permissions or its owner.") from None
    except ValueError as error:
        raise BadWeights(f"{file} is not JSON: {error}.", hint="Download it again.") from None
    if not isinstance(said, dict):
        raise BadWeights(f"{file} is not a JSON object.", hint="Download it again.")
    return said
