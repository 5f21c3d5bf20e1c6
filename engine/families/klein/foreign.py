"""Name kleins in other programs' formats, before anything else is asked."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.checkpoints.files import Header
from engine.contract import BadWeights

_METHODS = {
    "bitsandbytes": "bitsandbytes", "bnb": "bitsandbytes", "sdnq": "SDNQ", "quanto": "quanto", "torchao": "torchao",
    "awq": "AWQ", "gptq": "GPTQ", "svdquant": "Nunchaku (SVDQuant)", "nunchaku": "Nunchaku (SVDQuant)",
}  # fmt: skip
"""What `quant_method` says, and what people call it."""

# All of these suffixes must occur. Sources: diffusers' quantisers, mflux, Nunchaku.
_SUFFIXES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Nunchaku (SVDQuant)", (".qweight", ".wscales")),
    ("AWQ", (".qweight", ".qzeros", ".scales")),
    ("bitsandbytes", (".weight.absmax",)),
    ("bitsandbytes", (".weight.SCB",)),
    ("MLX", (".scales", ".biases")),
    ("SDNQ", (".zero_point", ".scale")),
    ("SDNQ", (".svd_up",)),
    ("quanto", (".weight._data",)),
)


def refuse(header: Header) -> None:
    """Raise BadWeights for a file in another program's format."""
    if name := format_of(header):
        raise _not_read(header.file.name, name)


def refuse_config(config: Mapping[str, Any], folder: Path) -> None:
    """Raise BadWeights for a folder whose config names another program's quantisation."""
    if name := _method(config.get("quantization_config") or config.get("quantization")):
        raise _not_read(str(folder), name)


def format_of(header: Header) -> str:
    """Return whose format a file is in, "" for a readable one."""
    metadata = header.metadata
    if "nunchaku" in metadata.get("model_class", "").lower():
        return "Nunchaku (SVDQuant)"
    if "mflux_version" in metadata or "quantization_level" in metadata:
        return "MLX"
    if name := _method(_parsed(metadata.get("quantization_config", ""))):
        return name
    names = header.entries.keys()
    for program, suffixes in _SUFFIXES:
        if all(any(name.endswith(suffix) for name in names) for suffix in suffixes):
            return program
    return ""


def _method(config: Any) -> str:
    if not isinstance(config, Mapping):
        return ""
    method = str(config.get("quant_method") or config.get("method") or "").lower()
    named = next((name for key, name in _METHODS.items() if key in method), "")
    return named or method[:40] or ("MLX" if {"bits", "group_size"} <= config.keys() else "")


def _parsed(text: str) -> Any:
    try:
        return json.loads(text) if text else None
    except (ValueError, RecursionError):
        return None


def _not_read(where: str, name: str) -> BadWeights:
    return BadWeights(
        f"{where} is quantised by {name}, which is not read.",
        hint="Get the model in bf16, fp8, nvfp4 or as GGUF.",
    )
