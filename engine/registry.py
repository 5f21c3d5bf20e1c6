"""ModelRegistry: a model's name or path -> its files."""

import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from engine import diagnose
from engine.checkpoints.files import read_header
from engine.contract import BadWeights, EngineError, Fix, ModelNotFound
from engine.families.klein import companions, components, foreign, identify, signatures
from engine.families.klein.checkpoint import Checkpoint
from engine.families.klein.companions import Companion, Needs
from engine.families.klein.folder import INDEX, forbidden, is_complete, read_variant, weights_files
from engine.families.klein.variants import EMBEDDED, FULL, VARIANTS, Variant
from engine.search import ModelSearch, foreign_folder, walk

NANO = Path(__file__).parent / "nano" / "weights"

_COMFYUI_DEPTH = 1
"""Folders below ComfyUI's own that are searched for companions: people sort them, as in vae/flux2/x.safetensors."""


@dataclass(frozen=True, slots=True)
class InstalledModel:
    """A model that can be called by name.

    path: its diffusers folder or single file. bits: that a weight is stored in.
    """

    name: str
    path: Path
    format: str
    bits: float = 16.0


@dataclass(frozen=True, slots=True)
class UnusableModel:
    """A path that looks like a model but is not usable."""

    path: Path
    error: EngineError


@dataclass(frozen=True, slots=True)
class ModelRegistry(ModelSearch):
    """Resolves models and the files they are made of.

    small_decoder: take the distilled autoencoder where one is found.
    text_encoder, vae: a file's name or path that is taken before any other.
    """

    small_decoder: bool = False
    text_encoder: str | None = None
    vae: str | None = None

    def installed_models(self) -> list[InstalledModel]:
        """Return every model whose variant is known, the finest first."""
        found = [InstalledModel(EMBEDDED, NANO, FULL)]
        for path, row in self.models():
            stored = _folder_format(path) if path.is_dir() else companions.stored_format(read_header(path))
            found.append(InstalledModel(row.name, path, *stored))
        return sorted(dict.fromkeys(found), key=lambda model: (not _is_published(model.path), -model.bits))

    def unusable_models(self) -> list[UnusableModel]:
        """Return what looks like a klein and cannot be called by name."""
        found = ((path, self._reason(path)) for path in self.places())
        return [UnusableModel(path, error) for path, error in dict(found).items() if error is not None]

    def is_empty(self, path: Path) -> bool:
        """Return whether a place holds neither models nor parts of them."""
        return not any(ModelSearch((path,)).places()) and not any(companions.tokenizers(path))

    def installed(self) -> dict[str, Path]:
        """Return the path of every published variant that is installed."""
        found: dict[str, Path] = {}
        for model in self.installed_models():
            found.setdefault(model.name, model.path)
        return {name: found[name] for name in VARIANTS if name in found}

    def resolve(
        self,
        model: str,
        variant: str | None = None,
        quant: str | None = None,
        prefer: Callable[[Checkpoint], bool] | None = None,
        damaged: Collection[Path] = (),
    ) -> Checkpoint:
        """Resolve a variant's name, a diffusers folder, or a single file.

        A folder or file among the installed models may be given by its own name, a file also without its ending.
        variant: the klein that the user says this single file is, whatever its name says. quant: the format that is
        preferred where a variant is installed in several. prefer: tells which of several should be taken, such as one
        that fits. damaged: transformers that are taken last.
        Of a variant's files the first that is complete is taken. Raises ModelNotFound or BadWeights.
        """
        path = Path(model).expanduser()
        setting = identify.named(variant) if variant else None
        if self.variant:
            identify.named(self.variant)  # a wrong one is an error whatever model is meant
        if model in VARIANTS:
            return self._resolve_name(model, quant, prefer, damaged)
        if path.is_absolute() or os.sep in model:
            if not _exists(path):
                raise ModelNotFound(f"No model at {model}.", fix=Fix("list"))
            # Absolute, for the folders above it; not resolved, as the folder of a link has the companions.
            checkpoint = self._checkpoint(path.absolute(), setting=setting)
            if checkpoint.variant.name in (variant, self.variant) and checkpoint.transformer.is_file():
                self.answers.remember(checkpoint.transformer, variant=checkpoint.variant.name)
            return checkpoint
        return self._checkpoint(self._path_of(model), setting=setting)

    def _path_of(self, name: str) -> Path:
        """Return the file or folder of this name. Raises ModelNotFound or BadWeights."""

        def is_meant(path: Path) -> bool:
            return name == path.name or (name == path.stem and path.is_file())

        found = list(dict.fromkeys(model.path for model in self.installed_models() if is_meant(model.path)))
        if len(found) > 1:
            places = ", ".join(str(path) for path in found)
            raise ModelNotFound(f"There are {len(found)} models {name!r}: {places}.", hint="Give the path of one.")
        if found:
            return found[0]
        for unusable in self.unusable_models():
            if is_meant(unusable.path):
                raise unusable.error
        raise identify.unknown_name(name, "or give a folder or file: its path, or its name where models lists it.")

    def checkpoint(self, model: InstalledModel) -> Checkpoint:
        """Return the files of an installed model. Raises BadWeights."""
        return self._checkpoint(model.path, VARIANTS[model.name])

    def _resolve_name(
        self, name: str, quant: str | None, prefer: Callable[[Checkpoint], bool] | None, damaged: Collection[Path]
    ) -> Checkpoint:
        installed = self.installed_models()
        models = [model for model in installed if model.name == name]
        models.sort(key=lambda model: model.format != quant)
        if not models:
            raise self._not_installed(name, installed)
        complete: list[Checkpoint] = []
        last: list[Checkpoint] = []
        errors: list[EngineError] = []
        for model in models:
            try:
                checkpoint = self.checkpoint(model)
                components.verify(checkpoint)
            except BadWeights as error:
                errors.append(error)
                continue
            if checkpoint.transformer in damaged:
                last.append(checkpoint)
                continue
            if prefer is None or len(models) == 1 or model.format == quant or prefer(checkpoint):
                return checkpoint
            complete.append(checkpoint)
        if not complete and not last:
            raise errors[0]
        return (complete or last)[0]

    def _not_installed(self, name: str, installed: list[InstalledModel]) -> EngineError:
        for model in self.unusable_models():
            if identify.by_path(model.path) is VARIANTS[name]:
                return model.error
        known = dict.fromkeys(model.name for model in installed)
        return ModelNotFound(
            f"Model {name} is not installed; installed: {', '.join(known)}.", fix=Fix("pull", model=name)
        )

    def _reason(self, path: Path) -> EngineError | None:
        """Return why a klein is not among the installed models."""
        if path.is_file():
            return None if self.known_variant(path) else diagnose.reason(path)
        if error := foreign_folder(path):
            return error
        if identify.by_path(path) or not is_complete(path):
            return None
        try:
            read_variant(path)
        except BadWeights:
            return None
        return BadWeights("It is a klein, under a name of its own: give its path as the model.")

    def _checkpoint(self, path: Path, variant: Variant | None = None, setting: Variant | None = None) -> Checkpoint:
        """Return the files of a model.

        variant: what it is known to be. setting: what the user says that it is.
        """
        if path.name == INDEX:
            path = path.parent
        if path.is_dir():
            if not os.access(path, os.R_OK | os.X_OK):
                raise forbidden(path)
            if (path / INDEX).is_file() or not (single := _only_transformer(path)):
                return self._folder(path, variant)
            path = single
        return self._single_file(path, variant, setting)

    def _folder(self, folder: Path, variant: Variant | None) -> Checkpoint:
        if not (folder / INDEX).is_file():
            raise diagnose.not_a_model(folder, list(_transformers(folder)), INDEX)
        for part in ("transformer", "vae", "text_encoder", "tokenizer"):
            if not (folder / part).is_dir():
                raise BadWeights(f"{folder} has no {part} folder.", hint="Download it again.")
        variant = read_variant(folder, variant)
        return Checkpoint(
            variant=variant,
            transformer=folder / "transformer",
            vae=self._small_autoencoder(folder, variant) if self.small_decoder else folder / "vae",
            text_encoder=folder / "text_encoder",
            tokenizer=folder / "tokenizer",
        )

    def _single_file(self, file: Path, variant: Variant | None, setting: Variant | None) -> Checkpoint:
        """Resolve the companions of a single file."""
        header = read_header(file)
        signatures.expect(header, signatures.TRANSFORMER)
        foreign.refuse(header)
        if not (width := identify.width(header)):
            raise BadWeights(f"{file.name} is not a FLUX.2 [klein] transformer: it has no img_in.weight.")
        if variant is None and setting is not None:
            variant = self._variant_given(file, width, setting)
        row = variant or self._variant_of_file(file, width)
        identify.check_width(file, width, row)
        needs = Needs.of(file, row)
        vae, text_encoder = self._autoencoder(needs), self._text_encoder(needs)
        tokenizer = self._tokenizer(file, text_encoder)
        return Checkpoint(row, transformer=file, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)

    def _variant_given(self, file: Path, width: int, setting: Variant) -> Variant:
        """Return what the user says a file is, unless its tensors contradict."""
        named = identify.by_path(file)
        if named is setting:
            return setting
        if published := identify.by_hash(file, self.answers):
            return published
        if named is not None and identify.has_width(named, width) and not identify.has_width(setting, width):
            return named
        return setting

    def _variant_of_file(self, file: Path, width: int) -> Variant:
        """Identify a single file. Raises BadWeights to ask."""
        if (file.parent / INDEX).is_file():
            return read_variant(file.parent)
        named = identify.by_path(file)
        fits = named is not None and identify.has_width(named, width)
        # A setting is meant for some file, an earlier answer for this one, which need not be hashed then.
        by_hash = identify.by_hash if self.variant else identify.by_known_hash
        found = (named if fits else None) or by_hash(file, self.answers)
        found = found or self._named_by_user(file, width) or named
        if found is None and file.parent.name == "transformer" and (file.parent.parent / INDEX).is_file():
            raise BadWeights(f"{file.name} is a part of the model in {file.parent.parent}.", hint="Give that folder.")
        found = found or identify.by_hash(file, self.answers)
        if found is None:
            raise identify.ambiguous_variant(file, width)
        return found

    def _homes(self, file: Path) -> Iterator[Path]:
        """Yield the places of companions, the nearest first."""
        yield file
        yield file.parent
        for folder in list(file.parents)[1:3]:
            for name in companions.COMFYUI_FOLDERS:
                yield folder / name
                yield from walk(folder / name, _COMFYUI_DEPTH)
        yield from self.paths
        yield from self.places()

    def _companions(self, needs: Needs, component: str) -> list[Companion]:
        found = (companion for home in self._homes(needs.file) for companion in companions.candidates(home, component))
        return sorted(dict.fromkeys(found), key=needs.rank)

    def _text_encoder(self, needs: Needs) -> Path:
        found = self._companions(needs, signatures.TEXT_ENCODER)
        if self.text_encoder is not None:
            return _named(self.text_encoder, found, "text encoder")
        return _first(found, needs.suits_encoder, "text_encoder", _companions_of(needs.variant))

    def _autoencoder(self, needs: Needs) -> Path:
        found = self._companions(needs, signatures.AUTOENCODER)
        if self.vae is not None:
            return _named(self.vae, found, "autoencoder")

        def suits(path: Path) -> bool:
            return needs.suits_autoencoder(path) and companions.has_small_decoder(path) == self.small_decoder

        pull = "small-decoder" if self.small_decoder and found else _companions_of(needs.variant)
        return _first(found, suits, "vae", pull)

    def _small_autoencoder(self, folder: Path, variant: Variant) -> Path:
        homes = (folder, *self.places())
        found = [c for home in homes for c in companions.candidates(home, signatures.AUTOENCODER)]

        def suits(path: Path) -> bool:
            pixels = companions.pixels_per_token(companions.autoencoder_shapes(path))
            return companions.has_small_decoder(path) and pixels == variant.pixels_per_token

        return _first(found, suits, "vae", "small-decoder")

    def _tokenizer(self, file: Path, text_encoder: Path) -> Path:
        # The one beside an encoder is the encoder's own, whatever pipeline their folder's index names.
        if (own := text_encoder.with_name("tokenizer")).is_dir():
            return own
        for home in self._homes(file):
            for found in companions.tokenizers(home):
                return found
        raise _missing("tokenizer", "tokenizer")


def _companions_of(variant: Variant) -> str:
    return f"{variant.name if variant.repo else 'klein-4b'}-companions"


def _first(found: list[Companion], suits: Callable[[Path], bool], part: str, pull: str) -> Path:
    """Return the first that suits.

    Else the first at all, so that the error says what does not fit together.
    """
    if not found:
        raise _missing(part, pull)
    return next((companion.path for companion in found if suits(companion.path)), found[0].path)


def _missing(part: str, pull: str) -> BadWeights:
    return BadWeights(
        f"No {part} beside the file, nor in an installed model.",
        hint=f"Put the model's {part} folder next to it, or pull it.",
        fix=Fix("pull", model=pull),
    )


def _named(wanted: str, found: list[Companion], what: str) -> Path:
    """Return the companion that a setting names."""
    path = Path(wanted).expanduser()
    if path.is_absolute() and path.exists():
        return path
    for companion in found:
        if wanted in (companion.path.name, companion.path.stem):
            return companion.path
    names = ", ".join(companion.path.name for companion in found) or "none"
    raise ModelNotFound(f"There is no {what} {wanted!r}; found: {names}.", hint="Give its absolute path.")


def _transformers(folder: Path) -> Iterator[Path]:
    for file in weights_files(folder):
        if signatures.TRANSFORMER in signatures.components_of(file):
            yield file


def _only_transformer(folder: Path) -> Path | None:
    found = list(_transformers(folder))
    return found[0] if len(found) == 1 else None


def _is_published(path: Path) -> bool:
    return path.is_dir() or identify.is_published_name(path.stem)


def _folder_format(folder: Path) -> tuple[str, float]:
    try:
        return companions.stored_format(read_header(next((folder / "transformer").glob("*.safetensors"))))
    except BadWeights:
        return FULL, 16.0


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError:
        raise forbidden(path) from None
