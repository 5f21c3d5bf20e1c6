"""Sources of models on the hub, by variant and format."""

import difflib
import re
from dataclasses import dataclass, replace

from engine.families.klein.variants import EMBEDDED, FULL, SMALL_DECODER, VARIANTS, Variant
from klein_mcp.errors import RequestError

SMALL = "small-decoder"
TOKENIZER = "tokenizer"
"""The one part that neither a single file nor ComfyUI's folders have; the same for every klein."""
COMPANIONS = "companions"
"""Everything of a model but its transformer, for a user who has that as a single file."""

COMPANION_FILES = (
    "model_index.json",
    "vae/config.json",
    "vae/*.safetensors",
    "text_encoder/config.json",
    "text_encoder/*.safetensors*",
    "tokenizer/*",
)
TRANSFORMER_FILES = ("transformer/config.json", "transformer/*.safetensors*")


@dataclass(frozen=True, slots=True)
class FileSelection:
    """The files wanted of a repository: names, or patterns.

    which: the block type, where a pattern matches several files of which one is wanted.
    """

    repo: str
    patterns: tuple[str, ...]
    which: str = ""


@dataclass(frozen=True, slots=True)
class Repack:
    """Repositories of others: GGUF files, and ComfyUI's single files."""

    variant: str
    gguf: str
    comfyui: str
    encoder_gguf: str
    encoder_file: str
    """The encoder in the format that loses least; read from GGUF it is half of bf16."""


REPACKS = {
    row.variant: row
    for row in (
        Repack("klein-4b", "unsloth/FLUX.2-klein-4B-GGUF", "Comfy-Org/Flux-2-Klein-4B",
               "Qwen/Qwen3-4B-GGUF", "Qwen3-4B-Q8_0.gguf"),
        Repack("klein-base-4b", "unsloth/FLUX.2-klein-base-4B-GGUF", "Comfy-Org/Flux-2-Klein-4B",
               "Qwen/Qwen3-4B-GGUF", "Qwen3-4B-Q8_0.gguf"),
        Repack("klein-9b", "unsloth/FLUX.2-klein-9B-GGUF", "", "Qwen/Qwen3-8B-GGUF", "Qwen3-8B-Q8_0.gguf"),
        Repack("klein-base-9b", "unsloth/FLUX.2-klein-base-9B-GGUF", "", "Qwen/Qwen3-8B-GGUF", "Qwen3-8B-Q8_0.gguf"),
    )
}  # fmt: skip
"""Source: the hub's pages. The autoencoder is the same for all of them, and free."""
_OTHER_NAMES = {
    "comfy-org/vae-text-encorder-for-flux-klein-4b": "comfy-org/flux-2-klein-4b",
    "comfy-org/flux2-klein": "comfy-org/flux-2-klein-4b",
}
"""Repositories by their older names, in lower case."""
_LEEJET = re.compile(r"leejet/flux\.2-(klein-(?:base-)?[49]b)-gguf")
"""GGUF files as Q4_0 and Q8_0."""
_COMFYUI = "split_files"
_FREE = VARIANTS["klein-4b"].repo


def names() -> list[str]:
    """Return everything that can be pulled."""
    quantised = [f"{row.name}-{file.format}" for row in VARIANTS.values() for file in row.files if file.format != FULL]
    models = [row.name for row in VARIANTS.values() if row.repo]
    return [*models, *quantised, *(f"{name}-{COMPANIONS}" for name in models), SMALL, TOKENIZER]


def formats(row: Variant) -> list[str]:
    """Return the formats in which a variant can be pulled."""
    repack = REPACKS.get(row.name)
    others = ["gguf:TYPE"] if repack else []
    return [*(file.format for file in row.files), *others, *(["comfyui"] if repack and repack.comfyui else [])]


def selections(name: str, wanted: str = "") -> tuple[Variant | None, list[FileSelection]]:
    """Return a model's row and the files to fetch. Raises RequestError.

    name: one of `names`, or a repository that is known. wanted: a format, such as fp8 or gguf:Q4_K_M.
    """
    name, wanted, repack = _by_repository(name, wanted)
    if wanted and name in (SMALL, TOKENIZER, *(f"{row.name}-{COMPANIONS}" for row in VARIANTS.values())):
        raise RequestError(f"{name} has no formats to choose from.", hint="Leave out --format.")
    if name == SMALL:
        return None, [FileSelection(SMALL_DECODER.repo, (SMALL_DECODER.name,))]
    if name == TOKENIZER:
        return None, [_tokenizer()]
    if name == EMBEDDED:
        raise RequestError(f"{name} is in the package; there is nothing to pull.")
    for row in VARIANTS.values():
        if row.repo and name == row.name:
            return row, _in_format(row, wanted, repack)
        if row.repo and name == f"{row.name}-{COMPANIONS}":
            return row, [FileSelection(row.repo, COMPANION_FILES)]
        for file in row.files:
            if file.format != FULL and name == f"{row.name}-{file.format}":
                if wanted not in ("", file.format):
                    raise _other_format(name, file.format, wanted, row)
                return row, _in_format(row, file.format)
    near = difflib.get_close_matches(name, names(), 1)
    meant = f" Did you mean {near[0]}?" if near else ""
    raise RequestError(f"There is no model {name!r} to pull.{meant}", hint=f"There are: {', '.join(names())}.")


def _in_format(row: Variant, wanted: str, repack: Repack | None = None) -> list[FileSelection]:
    if wanted in ("", FULL):
        return [FileSelection(row.repo, COMPANION_FILES + TRANSFORMER_FILES)]
    for file in row.files:
        if file.format == wanted:
            return [FileSelection(file.repo, (file.name,)), FileSelection(row.repo, COMPANION_FILES)]
    repack = repack or REPACKS.get(row.name)
    kind, _, which = wanted.partition(":")
    if repack is not None and kind == "gguf":
        return [
            FileSelection(repack.gguf, ("*.gguf",), which or "?"),
            FileSelection(repack.encoder_gguf, (repack.encoder_file,)),
            FileSelection(_FREE, ("vae/config.json", "vae/*.safetensors", "model_index.json", "tokenizer/*")),
        ]
    if repack is not None and repack.comfyui and wanted == "comfyui":
        stem = f"flux-2-{row.name}.safetensors"
        files = (f"diffusion_models/{stem}", "text_encoders/qwen_3_4b.safetensors", "vae/flux2-vae.safetensors")
        return [FileSelection(repack.comfyui, tuple(f"{_COMFYUI}/{file}" for file in files)), _tokenizer()]
    raise RequestError(f"{row.name} is not published as {wanted!r}.", hint=f"There are: {', '.join(formats(row))}.")


def _other_format(name: str, own: str, wanted: str, row: Variant) -> RequestError:
    return RequestError(f"{name} is {own}, not {wanted}.", hint=f"Say klein-mcp pull {row.name} --format {wanted}.")


def _tokenizer() -> FileSelection:
    return FileSelection(_FREE, ("model_index.json", "tokenizer/*"))


def _by_repository(name: str, wanted: str) -> tuple[str, str, Repack | None]:
    """Return the name and format that a repository stands for.

    The third is the repack to take where it is not the usual one.
    """
    lower = _OTHER_NAMES.get(name.lower(), name.lower())
    if lower == SMALL_DECODER.repo.lower():
        return SMALL, wanted, None
    for row in VARIANTS.values():
        for file in row.files:
            if lower == file.repo.lower():
                return (row.name if file.format == FULL else f"{row.name}-{file.format}"), wanted, None
    for repack in REPACKS.values():
        if lower == repack.gguf.lower():
            return repack.variant, _gguf(wanted), None
        if repack.comfyui and lower == repack.comfyui.lower():
            if wanted not in ("", "comfyui"):
                raise _other_format(name, "comfyui", wanted, VARIANTS[repack.variant])
            return repack.variant, wanted or "comfyui", None
    if found := _LEEJET.fullmatch(lower):
        return found[1], _gguf(wanted), replace(REPACKS[found[1]], gguf=name)
    return name, wanted, None


def _gguf(wanted: str) -> str:
    return f"gguf:{wanted.removeprefix('gguf').removeprefix(':')}" if wanted else "gguf"
