"""The engine as a person wants to see it."""

from engine.families.klein.variants import EMBEDDED, VARIANTS
from klein_mcp import __version__
from klein_mcp.jobs.installed import models_of
from klein_mcp.jobs.service import Service
from klein_mcp.jobs.status import DaemonStatus
from klein_mcp.studio.contract import EngineView, ModelView

NANO_EXAMPLES = (
    "a red apple on a blue background",
    "a rocket on an orange background",
    "a cat in the snow",
)
"""In the few words that the embedded model knows."""

EXAMPLES = (
    "a red fox asleep in deep snow, soft morning light",
    "a lighthouse on a cliff at dusk, long exposure",
    "a product photo of a ceramic teapot on white linen",
)


async def engine_view(service: Service) -> EngineView:
    """Describe model, memory, queue and speed, without starting an engine."""
    status = await service.jobs.status()
    engine = status.engine
    installed = await models_of(service)
    models = [
        _model(model.name, model.licence, model.path is not None) for model in (engine.models if engine else ())
    ] or [_model(name, row.licence, name in installed.names) for name, row in VARIANTS.items()]
    loaded = engine.loaded if engine else None
    auto = loaded or installed.default or EMBEDDED
    return {
        "words": _words(status),
        "version": __version__,
        "loaded": loaded,
        "auto": auto,
        "licence": next((model["licence"] for model in models if model["name"] == auto), None),
        "device": engine.device if engine else None,
        "dtype": engine.dtype if engine else None,
        "placement": engine.placement if engine else None,
        "free_bytes": engine.free_bytes if engine else None,
        "seconds": status.seconds_per_image(auto),
        "tuning": (engine.tuning or None) if engine else None,
        "models": models,
        "max_references": _max_references(auto),
        "examples": _examples(auto),
    }


def _model(name: str, licence: str, installed: bool) -> ModelView:
    return {
        "name": name,
        "licence": licence,
        "installed": installed,
        "max_references": _max_references(name),
        "examples": _examples(name),
    }


def _max_references(name: str) -> int:
    return (VARIANTS.get(name) or VARIANTS[EMBEDDED]).max_references


def _examples(name: str) -> list[str]:
    return list(NANO_EXAMPLES if name == EMBEDDED else EXAMPLES)


def _words(status: DaemonStatus) -> str:
    """Say in a sentence what the engine does."""
    if status.silent:
        return "Starting or ending"
    if not status.running or status.queue is None:
        return "Not running; the first image starts it"
    if not status.queue.running:
        return "Ready"
    waiting = status.queue.waiting
    return f"Working, {waiting} waiting" if waiting else "Working"
