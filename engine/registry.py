"""A model's name to its files: which variant a folder or a single file is, and where its companions lie."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine import diagnose
from engine.checkpoints.files.safetensors import Header, Shape, expect, kind_of, storage
from engine.contract import BadWeights, Fix, ModelNotFound
from engine.families.klein import identify
from engine.families.klein.key_maps import bfl_name, encoder_name
from engine.families.klein.variants import EMBEDDED, FP8, FULL, NVFP4, VARIANTS, Variant

NANO = Path(__file__).parent / "nano" / "weights"
INDEX = "model_index.json"
EXTRAS = "klein.json"
"""Beside model_index.json: what a klein that is not one of the published ones was made for."""

_WHOLE, _WHOLES, _WORDS = "a whole number above 0", "a list of whole numbers above 0", "a list of words"
_WORDS_OF_WORDS = "words with a list of words each"
_EXTRA_KEYS = {
    "text_length": _WHOLE, "text_layers": _WHOLES, "native_size": _WHOLE, "max_references": _WHOLE, "words": _WORDS,
    "nouns": _WORDS_OF_WORDS, "shapes": _WORDS, "colours": _WORDS,
}  # fmt: skip
"""What it may say, and of what kind, for it is written by hand."""
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
class InstalledModel:
    """An installed model. path: its diffusers folder or single file. format: how its transformer is stored."""

    name: str
    path: Path
    format: str


@dataclass(frozen=True, slots=True)
class UnusableModel:
    """What a person may miss among the sources. why: it is none, and what to do."""

    path: Path
    why: str


@dataclass(frozen=True, slots=True)
class ModelRegistry:
    """Where models may lie.

    paths: folders that are models or hold models (ComfyUI's `models` among them), and single files.
    hub: the hub's cache folder. small_decoder: take the distilled autoencoder where one is found.
    """

    paths: tuple[Path, ...] = ()
    hub: Path | None = None
    small_decoder: bool = False

    def sources(self) -> list[InstalledModel]:
        """Every model that is there and whose name is known, full precision first."""
        found = [InstalledModel(EMBEDDED, NANO, FULL)]
        for place in self._places():
            row = identify.by_place(place)
            if row and place.is_dir() and _is_whole(place):
                found.append(InstalledModel(row.name, place, _folder_format(place)))
            elif row and place.suffix == _SUFFIX and kind_of(place) == "transformer":
                found.append(InstalledModel(row.name, place, storage(Header.read(place))))
        return sorted(found, key=lambda source: (FULL, FP8, NVFP4).index(source.format))

    def strangers(self) -> list[UnusableModel]:
        """What lies here, looks like a klein, and cannot be called by a name: under another one, broken, not read."""
        found = ((place, _strange(place)) for place in self._places())
        return [UnusableModel(place, why) for place, why in found if why]

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
        row = identify.named(variant) if variant else None
        if model in VARIANTS:
            return self._checkpoint(self._source(model, quant), VARIANTS[model])
        if path.is_absolute() or os.sep in model:
            if not _exists(path):
                raise ModelNotFound(f"No model at {model}.", fix=Fix("list"))
            return self._checkpoint(path, row)
        raise identify.unknown(model, "or give the path of a folder or file.")

    def checkpoint(self, source: InstalledModel) -> Checkpoint:
        """Of an installed model. Raises BadWeights."""
        return self._checkpoint(source.path, VARIANTS[source.name])

    def _source(self, name: str, quant: str | None) -> Path:
        there = self.sources()
        ours = [source for source in there if source.name == name]
        if not ours:
            if broken := next((s for s in self.strangers() if identify.by_place(s.path) is VARIANTS[name]), None):
                raise BadWeights(broken.why)
            known = dict.fromkeys(source.name for source in there)
            raise ModelNotFound(
                f"Model {name} is not installed; installed: {', '.join(known)}.", fix=Fix("pull", model=name)
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
            if not os.access(path, os.R_OK | os.X_OK):
                raise _forbidden(path)
            if (path / INDEX).is_file() or not (alone := _only_transformer(path)):
                return self._folder(path, variant)
            path = alone
        return self._single_file(path, variant)

    def _folder(self, folder: Path, variant: Variant | None) -> Checkpoint:
        if not (folder / INDEX).is_file():
            raise diagnose.in_place_of_a_model(folder, list(_files(folder, "transformer")), INDEX)
        for part in ("transformer", "vae", "text_encoder", "tokenizer"):
            if not (folder / part).is_dir():
                raise BadWeights(f"{folder} has no {part} folder.", hint="Download it again.")
        vae = folder / "vae"
        if self.small_decoder:
            vae = self._companion([folder], "vae", _autoencoders, _is_small, "small-decoder")
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
        expect(header, "transformer")
        if not (width := identify.width(header)):
            raise BadWeights(f"{file.name} is not a FLUX.2 [klein] transformer: it has no img_in.weight.")
        row = variant or _of_file(file, width)
        identify.check_width(file, width, row)
        shapes = {bfl_name(name): entry.shape for name, entry in header.entries.items()}
        context = next((shapes[name][1] for name in ("txt_in.weight", "context_embedder.weight") if name in shapes), 0)
        near = [file.parent, *(file.parent.parent / name for name in _COMFYUI)]
        small, least = self.small_decoder, f"{row.name if row.repo else 'klein-4b'}-companions"

        def reads(encoder: Path) -> bool:
            return len(row.text_layers) * _encoder_width(encoder) == context

        return Checkpoint(
            variant=row,
            transformer=file,
            vae=self._companion(near, "vae", _autoencoders, lambda path: _is_small(path) == small, least),
            text_encoder=self._companion(near, "text_encoder", _encoders, reads, least),
            tokenizer=self._companion(near, "tokenizer", _tokenizers, lambda path: True, "tokenizer"),
        )

    def _companion(
        self,
        near: list[Path],
        part: str,
        inside: "Callable[[Path], Iterator[Path]]",
        suits: Callable[[Path], bool],
        least: str,
    ) -> Path:
        """The first that suits; else the first at all, so that the error says what does not fit together.

        least: what to pull where there is none.
        """
        first: Path | None = None
        for home in (*near, *self._places()):
            for found in inside(home):
                if suits(found):
                    return found
                first = first or found
        if first is None:
            raise BadWeights(
                f"No {part} beside the file, nor in an installed model.",
                hint=f"Put the model's {part} folder next to it.",
                fix=Fix("pull", model=least),
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
        variant = identify.by_place(folder)
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
    for key, value in extras.items():
        if not _is(value, _EXTRA_KEYS[key]):
            raise BadWeights(f"{folder / EXTRAS}: {key} is {str(value)[:40]!r}; it must be {_EXTRA_KEYS[key]}.")
    if "text_layers" in extras:
        extras["text_layers"] = tuple(extras["text_layers"])
    extras |= {key: frozenset(extras[key]) for key in ("words", "shapes", "colours") if key in extras}
    if "nouns" in extras:
        extras["nouns"] = {noun: tuple(colours) for noun, colours in extras["nouns"].items()}
    if "native_size" in extras:
        # A small klein was made for one area: it neither paints nor sees more than that.
        extras |= {"max_size": extras["native_size"], "reference_size": min(1024, extras["native_size"])}
    return replace(variant, **extras)


def _is(value: Any, kind: str) -> bool:
    if kind == _WORDS_OF_WORDS:
        return isinstance(value, dict) and all(each == [] or _is(each, _WORDS) for each in value.values())
    each = [value] if kind == _WHOLE else value if isinstance(value, list) else []
    return bool(each) and all(isinstance(one, str) if kind == _WORDS else type(one) is int and one > 0 for one in each)


def _of_file(file: Path, width: int) -> Variant:
    """Which klein a single file is: by the index beside it, by its name, by its hash. Raises BadWeights to ask."""
    if (file.parent / INDEX).is_file():
        return read_variant(file.parent)
    if row := identify.by_place(file) or identify.by_hash(file):
        return row
    if file.parent.name == "transformer" and (file.parent.parent / INDEX).is_file():
        raise BadWeights(f"{file.name} is a part of the model in {file.parent.parent}.", hint="Give that folder.")
    raise identify.ask(file, width)


def _strange(place: Path) -> str:
    """Why a folder with an index or a file is not among the sources, if it looks like a klein."""
    if place.is_file():
        return diagnose.why(place)
    if identify.by_place(place) or not _is_whole(place):
        return ""
    try:
        read_variant(place)
    except BadWeights:
        return ""
    return "It is a klein, under a name of its own: give its path as the model."


_SUFFIX = ".safetensors"


def _walk(path: Path, depth: int) -> Iterator[Path]:
    try:
        if path.suffix in (_SUFFIX, *diagnose.UNREAD) and path.is_file():
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
        raise _forbidden(path) from None


def _forbidden(path: Path) -> BadWeights:
    return BadWeights(f"{path} may not be read by this user.", hint="Change its permissions or its owner.")


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
        raise _forbidden(file) from None
    except ValueError as error:
        raise BadWeights(f"{file} is not JSON: {error}.", hint="Download it again.") from None
    if not isinstance(said, dict):
        raise BadWeights(f"{file} is not a JSON object.", hint="Download it again.")
    return said
