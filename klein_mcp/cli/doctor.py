"""`klein-mcp doctor`: check everything image generation needs."""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from engine.contract import EngineError, Exact, Job, ModelInfo, Result
from engine.families.klein.variants import EMBEDDED, VARIANTS
from klein_mcp.cli.daemon import daemon_status
from klein_mcp.cli.doctor_clients import check_clients
from klein_mcp.cli.doctor_files import Check, check_daemon_files, check_disk, check_library, check_roots, check_signer
from klein_mcp.cli.status import format_node
from klein_mcp.cli.terminal import ProgressBar, program, shell_line, strip_control_chars
from klein_mcp.errors import explain, fix_words
from klein_mcp.settings import Settings, misspelled, user_home

if TYPE_CHECKING:
    from klein_mcp.daemon.executors.local import Engine

OLDEST_PYTHON = (3, 11)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repair", action="store_true", help="first rebuild the library's index from its files")


def run(settings: Settings, arguments: argparse.Namespace) -> int:
    """Return 0 if generation works, else 1."""
    if arguments.repair:
        print(_repair(settings), file=sys.stderr)
    findings = []
    for finding in checks(settings):
        findings.append(finding)
        if not arguments.json:
            mark = "todo" if finding.todo else "ok  "
            todo = f" → {finding.todo}" if finding.todo else ""
            print(strip_control_chars(f"{mark}  {finding.subject}: {finding.found}{todo}"), flush=True)
    if arguments.json:
        print(json.dumps([{"what": f.subject, "ok": not f.todo, "found": f.found, "todo": f.todo} for f in findings]))
    return 1 if any(finding.todo and not finding.optional for finding in findings) else 0


def checks(settings: Settings) -> Iterator[Check]:
    """Yield each finding as soon as it is known, cheap ones first."""
    yield _python()
    if not settings.engine:
        yield _torch()
    yield check_disk(settings)
    yield from check_daemon_files(settings)
    for name, meant in misspelled():
        yield Check("settings", f"{name} is no setting and has no effect", f"Did you mean {meant}?", optional=True)
    yield check_library(settings)
    yield from check_roots(settings)
    yield from check_signer(settings)
    if (home := user_home()) is not None:
        yield check_clients(home)
    yield _daemon(settings)
    if settings.engine:
        with ProgressBar("asking the engines"):
            findings = _engines(settings)
        yield from findings
        return
    yield from _engine_here(settings)


def _engine_here(settings: Settings) -> Iterator[Check]:
    """Check this machine's device, its models, and that one paints."""
    try:
        from klein_mcp.daemon.executors.local import make_engine

        with ProgressBar("starting the engine"):
            engine = make_engine(settings)
            findings = [_device(settings, engine), _compiling(engine)]
            findings += [*_models(settings, engine), *_default_model(settings, engine)]
    except (EngineError, ImportError, OSError) as error:
        yield Check("engine", "cannot be created", explain(error) if isinstance(error, EngineError) else str(error))
        return
    yield from findings
    with ProgressBar("generating a test image"):
        finding = _test_image(engine)
    yield finding


def _python() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    old = sys.version_info[:2] < OLDEST_PYTHON
    return Check("Python", found, "Install Python 3.11 or newer." if old else "")


def _torch() -> Check:
    try:
        return Check("torch", version("torch"))
    except PackageNotFoundError:
        return Check("torch", "not installed", "Install klein-mcp again; torch comes with it.")


def _repair(settings: Settings) -> str:
    from klein_mcp.images.rebuild import repair

    result = repair(settings.library)
    moved = f"; the damaged index is kept as {result.moved.name}" if result.moved else ""
    unreadable = "".join(f"\ndamaged: {path}" for path in result.unreadable)
    return f"library: {result.added} of {result.found} files were taken in{moved}{unreadable}"


def _daemon(settings: Settings) -> Check:
    from klein_mcp import __version__

    try:
        status = daemon_status(settings)
    except Exception as error:
        return Check("daemon", f"does not answer ({error})", f"Run: {shell_line([*program(), 'stop'])}")
    if status.silent:
        # Where it starts or ends this moment, nothing is to be done.
        stop = shell_line([*program(), "stop"])
        todo = f"If that stays so, run: {stop}; it says which process to end, or on which machine."
        return Check("daemon", "starting, ending or hanging: its process runs and does not answer", todo, optional=True)
    if not status.pid:
        return Check("daemon", "not running; the first call starts it")
    if status.version not in ("", __version__):
        todo = f"Run: {shell_line([*program(), 'stop'])}; the next call starts the new one."
        return Check("daemon", f"runs version {status.version}, this is {__version__}", todo)
    return Check("daemon", f"runs, pid {status.pid}")


def _engines(settings: Settings) -> list[Check]:
    """Ask each engine of KLEIN_ENGINE for its state.

    One that fails is advice where another answers. Its models are its own machine's to check.
    """
    findings = [finding for url in settings.engine for finding in _engine_at(settings, url)]
    some = any(not finding.todo for finding in findings)
    return [replace(finding, optional=some and finding.optional) for finding in findings]


def _engine_at(settings: Settings, url: str) -> list[Check]:
    """Ask one address, which may be that of a cluster."""
    from klein_mcp.daemon.executors.node import sentence
    from klein_mcp.daemon.executors.remote import RemoteExecutor

    try:
        executor = RemoteExecutor.from_settings(replace(settings, engine=(url,)))
    except EngineError as error:  # with which no image starts, whatever the other addresses are
        return [Check("engine", url, explain(error))]
    return [
        Check("engine", node.url, sentence(node.error), optional=True)
        if node.error
        else Check("engine", format_node(node).removeprefix("engine "))
        for node in executor.status().nodes
    ]


def _device(settings: Settings, engine: "Engine") -> Check:
    state = engine.status()
    found = f"{state.device}, {state.dtype}, {state.free_bytes / 1e9:.1f} GB free"
    if engine.device.passed_over:
        found += f"; {engine.device.passed_over}"
    if not (engine.device.is_cpu and settings.device == "auto" and (gpu := _first_gpu())):
        return Check("device", found)
    todo = (
        f"This torch ({version('torch')}) cannot use the {gpu}. Install klein-mcp again with one that can, in its "
        "checkout: uv tool install --reinstall --torch-backend auto . "
        "Where a client starts it by uvx, its env needs UV_TORCH_BACKEND=auto."
    )
    return Check("device", found, todo, optional=True)


def _first_gpu() -> str:
    """Return the first NVIDIA GPU that may be used, "" without one."""
    from klein_mcp.cluster.machine import gpus_here, nvidia_gpus

    return next(iter(nvidia_gpus()), "") if gpus_here() else ""


def _compiling(engine: "Engine") -> Check:
    obstacle = engine.compile_obstacle()
    return Check("compiling", f"not used: {obstacle}" if obstacle else "in idle time, once a model is loaded")


def _models(settings: Settings, engine: "Engine") -> Iterator[Check]:
    from klein_mcp.cli.models import useless_places

    installed = engine.models()
    for model in installed:
        about = model.name if model.name == EMBEDDED else f"{model.name} ({model.format}), {model.licence}"
        yield Check("model", f"{about}: {model.placement}" if model.fits else about, _todo(model))
    for model in engine.registry.unusable_models():
        yield Check("model", f"{model.path} is not usable as it is", explain(model.error), optional=True)
    for path, why in useless_places(settings, engine):
        yield Check("model", str(path), why, optional=True)
    if len(installed) == 1 and settings.model in ("auto", EMBEDDED):
        todo = "Run: klein-mcp pull klein-4b"
        if engine.device.is_cpu:
            todo += " (16 GB). It needs a GPU to be of use, and the device here is the CPU."
        yield Check("model", "only the embedded demo model is installed", todo, optional=True)


def _default_model(settings: Settings, engine: "Engine") -> Iterator[Check]:
    """Check the model that is used when a call names none."""
    if settings.model == "auto":
        return
    try:
        config = settings.engine_config()
        engine.registry.resolve(settings.model, config.variant, config.quant)
        yield Check("model", f"KLEIN_MODEL is {settings.model}")
    except EngineError as error:
        yield Check("model", f"KLEIN_MODEL is {settings.model}", explain(error))


def _todo(model: ModelInfo) -> str:
    return f"{model.error} {fix_words(model.fix)}".strip()


def _test_image(engine: "Engine") -> Check:
    """Generate one image with the embedded model."""
    start = time.perf_counter()
    size = VARIANTS[EMBEDDED].native_size
    try:
        *_, result = engine.run(Job("a red ball", size=Exact(size, size), model=EMBEDDED))
    except EngineError as error:
        return Check("test image", "failed", explain(error))
    assert isinstance(result, Result)
    if int(result.image.max()) == int(result.image.min()):
        return Check("test image", "is empty", "Install klein-mcp again: its embedded model is damaged.")
    seconds = time.perf_counter() - start
    return Check("test image", f"{size}×{size} with {EMBEDDED} in {seconds:.1f} s, loading included")
