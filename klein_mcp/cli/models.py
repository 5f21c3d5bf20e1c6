"""`klein-mcp models`: installed models, their size, place and fit."""

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.contract import ModelInfo
from engine.families.klein.variants import EMBEDDED, VARIANTS, File
from klein_mcp.cli.status import format_node
from klein_mcp.cli.terminal import ProgressBar, strip_control_chars
from klein_mcp.daemon.executors.local import make_engine
from klein_mcp.errors import explain, fix_words
from klein_mcp.settings import Settings

if TYPE_CHECKING:
    from klein_mcp.daemon.executors.local import Engine


def configure(parser: argparse.ArgumentParser) -> None:
    """Take no arguments."""


def run(settings: Settings, arguments: argparse.Namespace) -> int:
    """Raises EngineError."""
    if settings.engine:
        return _elsewhere(settings, json_wanted=arguments.json)
    # Most of the wait is the libraries that know the device.
    with ProgressBar("looking at this machine"):
        engine = make_engine(settings)
        installed = engine.models()
    unusable = [(model.path, explain(model.error)) for model in engine.registry.unusable_models()]
    others = unusable + list(useless_places(settings, engine))
    missing = [row for row in VARIANTS.values() if row.name not in {model.name for model in installed}]
    if arguments.json:
        rows = [{"name": row.name, "licence": row.licence, "gated": row.gated} for row in missing]
        not_used = [{"path": str(path), "why": why} for path, why in others]
        there = [_as_json(model) for model in installed]
        print(json.dumps({"installed": there, "available": rows, "not_used": not_used}))
        return 0
    print(strip_control_chars("\n\n".join(map(_in_words, installed))))
    if others:
        print("\nNot usable as they are:")
    for path, why in others:
        print(strip_control_chars(f"  {path}\n    {why}"))
    if missing:
        print("\nTo be had with klein-mcp pull NAME:")
    for row in missing:
        print(
            f"  {row.name:14} {row.title}, {row.licence}{', gated' if row.gated else ''}, {_sizes(row.files)};"
            f" all in memory in bf16: {row.memory_gb:g} GB"
        )
    return 0


def _elsewhere(settings: Settings, *, json_wanted: bool) -> int:
    """List the models of the engines that KLEIN_ENGINE names."""
    from klein_mcp.daemon.executors.remote import RemoteExecutor

    with ProgressBar("asking the engines"):
        status = RemoteExecutor.from_settings(settings).status()
    installed = [model for model in status.models if model.path is not None]
    silent = [node for node in status.nodes if node.error]
    if json_wanted:
        rows = [{"name": model.name, "licence": model.licence, "path": model.path} for model in installed]
        not_used = [{"path": node.url, "why": node.error} for node in silent]
        print(json.dumps({"installed": rows, "available": [], "not_used": not_used}))
    else:
        for node in status.nodes:
            print(strip_control_chars(format_node(node)))
        for model in installed:
            print(strip_control_chars(f"{model.name}: {model.licence}\n  {model.path}, on the engines' side"))
        if not installed and len(silent) < len(status.nodes):
            print("They tell their models once one of them has made an image.")
    return 1 if len(silent) == len(status.nodes) else 0


def useless_places(settings: Settings, engine: "Engine") -> Iterator[tuple[Path, str]]:
    """Yield the paths of KLEIN_MODELS that do not exist or hold nothing."""
    for path in settings.models:
        if not path.exists():
            several = f" Separate several paths with {os.pathsep!r}, not ','." if "," in str(path) else ""
            yield path, f"KLEIN_MODELS names it, and it is not there.{several}"
        elif engine.registry.is_empty(path):
            yield path, "KLEIN_MODELS names it, and nothing usable is in it."


def _memory(model: ModelInfo) -> str:
    """Return its place in memory, or why it does not load."""
    return model.placement or f"{model.error} {fix_words(model.fix)}".strip()


def _as_json(model: ModelInfo) -> dict[str, Any]:
    names = ("name", "format", "path", "licence", "bytes", "text_encoder", "vae", "fits")
    return {name: getattr(model, name) for name in names} | {"memory": _memory(model)}


def _in_words(model: ModelInfo) -> str:
    name = model.name if model.name == EMBEDDED else f"{model.name} ({model.format})"
    size = "" if model.bytes is None else f", {_amount(model.bytes)} read"
    fits = "fits" if model.fits else "does not load"
    return f"{name}: {model.licence}{size}\n  {model.path}{_companions(model)}\n  {fits}: {_memory(model)}"


def _amount(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _companions(model: ModelInfo) -> str:
    """Return a line that names what is taken from elsewhere, or ""."""
    others = [part for part in (model.text_encoder, model.vae) if part and not Path(part).is_relative_to(model.path)]
    return f"\n  with {' and '.join(others)}" if others else ""


def _sizes(files: Sequence[File]) -> str:
    return ", ".join(f"{file.format} {file.bytes / 1e9:.1f} GB" if file.bytes else file.format for file in files)
