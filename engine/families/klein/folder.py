"""Read a diffusers folder's index, and klein.json beside it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.checkpoints.files import SUFFIXES, read_regular
from engine.contract import BadWeights
from engine.families.klein import identify
from engine.families.klein.variants import VARIANTS, Variant

INDEX = "model_index.json"
EXTRAS = "klein.json"
"""Beside model_index.json: what a klein that is not one of the published ones was made for."""

_PIPELINES = ("Flux2KleinPipeline", "Flux2KleinKVPipeline", "Flux2KleinInpaintPipeline")


def _is_positive(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _list_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and bool(value) and all(map(check, value))


def _are_words(value: Any) -> bool:
    return _list_of(lambda word: isinstance(word, str))(value)


def _are_words_of_words(value: Any) -> bool:
    return isinstance(value, dict) and all(words == [] or _are_words(words) for words in value.values())


_EXTRA_KEYS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "text_length": ("a positive integer", _is_positive),
    "text_layers": ("a list of positive integers", _list_of(_is_positive)),
    "native_size": ("a positive integer", _is_positive),
    "least_size": ("a positive integer", _is_positive),
    "max_references": ("a positive integer", _is_positive),
    "words": ("a list of strings", _are_words),
    "nouns": ("words with a list of words each", _are_words_of_words),
    "shapes": ("a list of strings", _are_words),
    "colours": ("a list of strings", _are_words),
}
"""Its keys, each with what the value must be: the file is written by hand."""


def read_variant(folder: Path, variant: Variant | None = None) -> Variant:
    """Return what a diffusers folder was made for. Raises BadWeights.

    Its index, its autoencoder's config and klein.json overrule the row it starts from.
    """
    index = read_json(folder / INDEX)
    kind = index.get("_class_name", "")
    if kind not in _PIPELINES:
        raise BadWeights(
            f"{folder / INDEX} names {str(kind)[:60] or 'no pipeline'}; klein is one of {', '.join(_PIPELINES)}."
        )
    kv = kind == "Flux2KleinKVPipeline"
    # diffusers' default for is_distilled is False in the plain pipeline, True in the KV one.
    distilled = bool(index.get("is_distilled", kv))
    if variant is None:
        variant = identify.by_path(folder)
    if variant is None or (variant.kv, variant.distilled) != (kv, distilled):
        like = VARIANTS["klein-4b"] if distilled else VARIANTS["klein-base-4b"]
        variant = replace(
            like, name=folder.name, title=folder.name, repo="", licence="unknown", kv=kv, memory_gb=0.0, files=()
        )
    variant = replace(variant, pixels_per_token=_pixels_per_token(folder) or variant.pixels_per_token)
    return _with_extras(variant, folder)


_MOST_LEVELS = 8
"""More levels than any autoencoder of tokens has: one of its tokens would be 256 pixels wide."""


def _pixels_per_token(folder: Path) -> int:
    """Return what the autoencoder's config says, 0 where it says nothing.

    A broken one is no error here: loading the autoencoder names what is wrong.
    """
    try:
        levels = read_json(folder / "vae" / "config.json").get("block_out_channels")
    except BadWeights:
        return 0
    # Every level but the last halves the size, and a token is 2 × 2 latent pixels.
    return 2 ** len(levels) if isinstance(levels, list) and 0 < len(levels) <= _MOST_LEVELS else 0


def _with_extras(variant: Variant, folder: Path) -> Variant:
    if not (folder / EXTRAS).is_file():
        return variant
    extras = read_json(folder / EXTRAS)
    if unknown := extras.keys() - _EXTRA_KEYS:
        raise BadWeights(f"{folder / EXTRAS} has {min(unknown)!r}; known: {', '.join(sorted(_EXTRA_KEYS))}.")
    for key, value in extras.items():
        wanted, check = _EXTRA_KEYS[key]
        if not check(value):
            raise BadWeights(f"{folder / EXTRAS}: {key} is {str(value)[:40]!r}; it must be {wanted}.")
    if "text_layers" in extras:
        extras["text_layers"] = tuple(extras["text_layers"])
    extras |= {key: frozenset(extras[key]) for key in ("words", "shapes", "colours") if key in extras}
    if "nouns" in extras:
        extras["nouns"] = {noun: tuple(colours) for noun, colours in extras["nouns"].items()}
    if "native_size" in extras:
        # A small klein was made for one area: it neither generates nor sees more than that.
        extras |= {"max_size": extras["native_size"], "reference_size": min(1024, extras["native_size"])}
    return replace(variant, **extras)


def is_complete(folder: Path) -> bool:
    """Return whether a folder with an index has a transformer.

    The hub's cache may hold the companions alone.
    """
    return (folder / INDEX).is_file() and any((folder / "transformer").glob("*.safetensors"))


def is_another_model(folder: Path) -> bool:
    """Return whether a folder's index names a pipeline that is not klein's."""
    try:
        return (folder / INDEX).is_file() and read_json(folder / INDEX).get("_class_name") not in _PIPELINES
    except BadWeights:
        return True


def read_json(file: Path) -> dict[str, Any]:
    """Return a JSON object. Raises BadWeights."""
    try:
        data = json.loads(read_regular(file))
    except FileNotFoundError:
        raise BadWeights(f"{file} is not there.", hint="Download it again.") from None
    except PermissionError:
        raise forbidden(file) from None
    except OSError as error:
        raise BadWeights(f"{file} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise BadWeights(f"{file} is not JSON: {str(error)[:100]}.", hint="Download it again.") from None
    if not isinstance(data, dict):
        raise BadWeights(f"{file} is not a JSON object.", hint="Download it again.")
    return data


def forbidden(path: Path) -> BadWeights:
    """Return the error for a path this user may not read."""
    return BadWeights(f"{path} may not be read by this user.", hint="Change its permissions or its owner.")


def weights_files(home: Path) -> list[Path]:
    """Return the weights files in a folder, or `home` itself."""
    if home.is_file():
        return [home]
    try:
        return sorted(file for file in home.iterdir() if file.suffix.lower() in SUFFIXES)
    except OSError:
        return []
