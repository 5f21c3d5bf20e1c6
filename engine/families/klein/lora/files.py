"""LoRA files and the settings they were trained with."""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.checkpoints.files import Header
from engine.contract import BadWeights, InvalidJob, ModelNotFound

ADAPTER = "adapter_model.safetensors"
"""Name that peft gives the one file of a folder; how it was trained is in the config beside it."""
_CONFIG = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA file and how strongly it is applied."""

    path: Path
    scale: float = 1.0

    def fingerprint(self) -> str:
        """Hash content and scale, which both change the image."""
        with self.path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256")
        if (config := _config_file(self.path)) is not None:
            digest.update(config.read_bytes())
        digest.update(repr(self.scale).encode())
        return digest.hexdigest()


def resolve_lora(text: str, folders: Iterable[Path]) -> Lora:
    """Resolve a path or a name in a `loras` folder, with `:scale`.

    Raises ModelNotFound or InvalidJob.
    """
    try:
        return _find(text, folders)
    except (OSError, RuntimeError) as error:
        # A name too long, a folder that may not be read; the home of a user that does not exist.
        reason = getattr(error, "strerror", None) or error
        raise ModelNotFound(f"No LoRA {text[:100]!r}: {reason}.", hint="Give its absolute path.") from None


def _find(text: str, folders: Iterable[Path]) -> Lora:
    # A file may have a colon in its own name.
    name, scale = (text, 1.0) if Path(text).expanduser().is_file() else _split_scale(text)
    path, stem = Path(name).expanduser(), re.sub(r"\.safetensors$", "", name, flags=re.IGNORECASE)
    if path.is_dir() and (path / ADAPTER).is_file():
        return Lora(path / ADAPTER, scale)
    if path.is_absolute() or path.is_file():
        if not path.is_file():
            raise ModelNotFound(f"No LoRA at {path}.", hint="Check the path.")
        return Lora(path, scale)
    available: dict[str, Path] = {}
    for folder in folders:
        for file in sorted(folder.rglob("loras/**/*.*")):
            if file.suffix.lower() != ".safetensors":
                continue
            available.setdefault(file.parent.name if file.name == ADAPTER else file.stem, file)
    if stem not in available:
        known = f"there are {', '.join(sorted(available))}" if available else "there are none in a loras folder"
        raise ModelNotFound(f"No LoRA {name!r}; {known}.", hint="Give its absolute path, or a name found there.")
    return Lora(available[stem], scale)


def _split_scale(text: str) -> tuple[str, float]:
    name, colon, scale = text.rpartition(":")
    # A single letter before the colon is a drive of Windows.
    if not colon or len(name) == 1:
        return text, 1.0
    try:
        number = float(scale)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InvalidJob(f"The scale of LoRA {text!r} is {scale!r}; it must be a number, as in {name}:0.8.")
    return name, number


@dataclass(frozen=True, slots=True)
class Training:
    """The settings of a LoRA's training. Without them alpha is the rank."""

    settings: Mapping[str, Any]

    @classmethod
    def of(cls, header: Header) -> "Training":
        """Read diffusers' entry in the header, or peft's config beside the file."""
        try:
            if (config := _config_file(header.file)) is not None:
                settings = _object(config.read_bytes())
            else:
                flat = _object(header.metadata.get("lora_adapter_metadata", "{}"))
                settings = _of_transformer(flat)
            _check_alphas(settings)
            return cls(settings)
        except (ValueError, OSError, RecursionError) as error:
            reason = " ".join(str(error).split())[:100]
            raise BadWeights(f"The training settings of LoRA {header.file.name} make no sense: {reason}.") from None

    def scale(self, module: str, rank: int) -> float:
        """Return alpha over rank, or over its root for rsLoRA."""
        alpha = self._pattern("alpha_pattern", module)
        for key in _ALPHAS:
            alpha = self.settings.get(key) if alpha is None else alpha
        if alpha is None or rank == 0:
            return 1.0
        return float(alpha) / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)

    def _pattern(self, key: str, module: str) -> Any:
        patterns = self.settings.get(key)
        if not isinstance(patterns, dict):
            return None
        matching = (value for part, value in patterns.items() if _matches(str(part), module))
        return next(matching, None)


def _check_alphas(settings: Mapping[str, Any]) -> None:
    """Raise ValueError for an invalid alpha or a slow pattern."""
    patterns = settings.get("alpha_pattern")
    patterns = patterns if isinstance(patterns, dict) else {}
    for name, alpha in {**{key: settings.get(key) for key in _ALPHAS}, **patterns}.items():
        if alpha is not None and not (type(alpha) in (int, float) and math.isfinite(alpha)):
            raise ValueError(f"{name[:40]} is {str(alpha)[:40]!r}, not a number")
    if slow := next((pattern for pattern in patterns if _is_slow(pattern)), ""):
        raise ValueError(f"the pattern {slow[:40]!r} repeats too much")


def _is_slow(pattern: str) -> bool:
    """Return whether matching could take hours.

    (x+)+ doubles its time with each letter of a name.
    """
    return re.search(r"\)[*+{]", pattern) is not None or len(re.findall(r"[*+{]", pattern)) > _MOST_REPETITIONS


_MOST_REPETITIONS = 3
"""Of a pattern; peft writes names, or one wildcard."""

_OURS = "transformer."
_PARTS = (_OURS, "text_encoder")
"""Before the settings of a pipeline's parts. An adapter saved by the transformer itself has none before its own."""

_ALPHAS = ("lora_alpha", "alpha")
"""The second is peft's for LoHa and LoKr."""


def _of_transformer(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the transformer's settings among those of all parts."""
    if not any(key.startswith(_PARTS) for key in flat):
        return dict(flat)
    return {key.removeprefix(_OURS): value for key, value in flat.items() if key.startswith(_OURS)}


def _matches(pattern: str, module: str) -> bool:
    """Return whether peft's pattern means a module."""
    try:
        return f".{module}".endswith(f".{pattern}") or re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error:
        return False


def _config_file(file: Path) -> Path | None:
    """Return peft's config if the folder holds this LoRA alone."""
    config = file.with_name(_CONFIG)
    alone = file.name == ADAPTER or len(list(file.parent.glob("*.safetensors"))) == 1
    return config if alone and config.is_file() else None


def _object(text: str | bytes) -> dict[str, Any]:
    data = json.loads(text)
    if not isinstance(data, dict):
        raise ValueError(f"they are a {type(data).__name__}")
    return data
