"""`klein-mcp doctor`: is everything there that painting needs? Each line says ok, or what to do."""

import argparse
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from engine.contract import EngineError, Job, ModelInfo, Result
from engine.families.klein.variants import EMBEDDED, VARIANTS
from klein_mcp.cli.terminal import ProgressBar, harmless, program
from klein_mcp.errors import explain, fix_words
from klein_mcp.settings import Settings, misspelt

OLDEST_PYTHON = (3, 11)
ROOM = 5 * 10**9
"""Bytes of disk under which pictures and a download get into each other's way."""


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at, what was found, and what to do about it; `todo` is empty where nothing is.

    works: painting works without it; it is advice.
    """

    what: str
    found: str
    todo: str = ""
    works: bool = False


def run(settings: Settings, arguments: argparse.Namespace) -> int:
    """0 if painting works, else 1."""
    findings = []
    for finding in look(settings):
        findings.append(finding)
        if not arguments.json:
            mark = "todo" if finding.todo else "ok  "
            todo = f" → {finding.todo}" if finding.todo else ""
            print(harmless(f"{mark}  {finding.what}: {finding.found}{todo}"), flush=True)
    if arguments.json:
        print(json.dumps([{"what": f.what, "ok": not f.todo, "found": f.found, "todo": f.todo} for f in findings]))
    return 1 if any(finding.todo and not finding.works for finding in findings) else 0


def look(settings: Settings) -> Iterator[Check]:
    """Cheap things first; each as soon as it is known."""
    yield _python()
    yield _torch()
    yield _disk(settings)
    for name, meant in misspelt():
        yield Check("settings", f"{name} is no setting and changes nothing", f"Did you mean {meant}?", works=True)
    yield _clients(Path.home())
    yield _daemon(settings)
    try:
        from klein_mcp.cli.paint import engine

        with ProgressBar("starting the engine"):
            made = engine(settings)
            inside = [_device(made), *_models(settings, made), *_asked(settings, made)]
    except (EngineError, ImportError, OSError) as problem:
        yield Check("engine", "cannot be made", explain(problem) if isinstance(problem, EngineError) else str(problem))
        return
    yield from inside
    with ProgressBar("painting"):
        painting = _painting(made)
    yield painting


def _python() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    old = sys.version_info[:2] < OLDEST_PYTHON
    return Check("Python", found, "Install Python 3.11 or newer." if old else "")


def _torch() -> Check:
    try:
        return Check("torch", version("torch"))
    except PackageNotFoundError:
        return Check("torch", "not installed", "Install klein-mcp again; torch comes with it.")


def _disk(settings: Settings) -> Check:
    said = []
    for place in dict.fromkeys((settings.home, settings.hub)):
        there = next(folder for folder in (place, *place.parents) if folder.exists())
        if not os.access(there, os.W_OK):
            return Check("disk", f"{there} cannot be written", "Change its owner, or set KLEIN_HOME and KLEIN_HUB.")
        free = shutil.disk_usage(there).free
        said.append(f"{free / 1e9:.0f} GB free for {place}")
        if free < ROOM:
            return Check("disk", said[-1], "Make room: klein-mcp prune deletes old pictures.")
    return Check("disk", ", ".join(said))


CONFIGURATIONS = {
    "Claude Code": ".claude.json",
    "Claude Desktop": "Library/Application Support/Claude/claude_desktop_config.json",
    "Claude Desktop (Windows)": "AppData/Roaming/Claude/claude_desktop_config.json",
    "Codex": ".codex/config.toml",
    "Cursor": ".cursor/mcp.json",
    "Gemini CLI": ".gemini/settings.json",
    "Zed": ".config/zed/settings.json",
    "VS Code": ".config/Code/User/mcp.json",
    "LM Studio": ".lmstudio/mcp.json",
}
"""Clients' files under the home folder. What is configured per project is not looked for."""


def _clients(home: Path) -> Check:
    there = {name: home / path for name, path in CONFIGURATIONS.items() if (home / path).is_file()}
    know = [name for name, path in there.items() if "klein" in _text(path)]
    if know:
        return Check("clients", f"{', '.join(know)} start klein-mcp")
    found = f"none of {', '.join(there)} starts klein-mcp" if there else "no client's configuration found"
    return Check("clients", found, f"Add it, for example: claude mcp add klein -- {shlex.join(program())}", works=True)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _daemon(settings: Settings) -> Check:
    import anyio

    from klein_mcp import __version__
    from klein_mcp.daemon.client import DaemonBackend

    async def ask() -> dict[str, Any]:
        backend = DaemonBackend(settings)
        try:
            return await backend.status()
        finally:
            await backend.aclose()

    try:
        state = anyio.run(ask)
    except Exception as problem:
        return Check("daemon", f"does not answer ({problem})", f"Run: {shlex.join([*program(), 'stop'])}")
    if not state.get("pid"):
        return Check("daemon", "not running; the first call starts it")
    if state.get("version") not in (None, __version__):
        todo = f"Run: {shlex.join([*program(), 'stop'])}; the next call starts the new one."
        return Check("daemon", f"runs version {state['version']}, this is {__version__}", todo)
    return Check("daemon", f"runs, pid {state['pid']}")


def _device(made: Any) -> Check:
    state = made.status()
    return Check("device", f"{state.device}, {state.dtype}, {state.free_bytes / 1e9:.1f} GB free")


def _models(settings: Settings, made: Any) -> Iterator[Check]:
    from klein_mcp.cli.models import missing_places

    there = made.models()
    for model in there:
        about = model.name if model.name == EMBEDDED else f"{model.name} ({model.format}), {model.licence}"
        yield Check("model", f"{about}: {model.placement}" if model.fits else about, _todo(model))
    for stranger in made.registry.strangers():
        yield Check("model", f"{stranger.path} cannot be called by a name", stranger.why, works=True)
    for path, why in missing_places(settings):
        yield Check("model", str(path), why, works=True)
    if len(there) == 1 and settings.model in ("auto", EMBEDDED):
        yield Check("model", "only the embedded demo model is installed", "Run: klein-mcp pull klein-4b", works=True)


def _asked(settings: Settings, made: Any) -> Iterator[Check]:
    """The model that every call takes which names none."""
    if settings.model == "auto":
        return
    try:
        config = settings.engine_config()
        made.registry.find(settings.model, config.variant, config.quant)
        yield Check("model", f"KLEIN_MODEL is {settings.model}")
    except EngineError as problem:
        yield Check("model", f"KLEIN_MODEL is {settings.model}", explain(problem))


def _todo(model: ModelInfo) -> str:
    return f"{model.error} {fix_words(model.fix)}".strip()


def _painting(made: Any, clock: Callable[[], float] = time.perf_counter) -> Check:
    """With the embedded model: whether painting works at all, not how well."""
    start = clock()
    size = VARIANTS[EMBEDDED].native_size
    try:
        *_, painting = made.run(Job("a red ball", width=size, height=size, model=EMBEDDED))
    except EngineError as problem:
        return Check("test painting", "failed", explain(problem))
    assert isinstance(painting, Result)
    if int(painting.image.max()) == int(painting.image.min()):
        return Check("test painting", "came out empty", "Install klein-mcp again: its embedded model is damaged.")
    return Check("test painting", f"{size}×{size} with {EMBEDDED} in {clock() - start:.1f} s, loading included")
