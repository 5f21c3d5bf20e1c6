"""`klein-mcp status`: what this user's engine holds and does."""

import argparse
import json
from collections.abc import Mapping, Sequence
from datetime import datetime

from engine.contract import EngineStatus, NodeStatus
from klein_mcp.cli.daemon import daemon_status
from klein_mcp.jobs.status import DaemonStatus, QueueStatus, to_json
from klein_mcp.settings import Settings


def configure(parser: argparse.ArgumentParser) -> None:
    """Take no arguments."""


def run(settings: Settings, arguments: argparse.Namespace) -> int:
    status = daemon_status(settings)
    print(json.dumps(to_json(status)) if arguments.json else format_status(status, settings.engine))
    return 0


def format_status(status: DaemonStatus, elsewhere: Sequence[str] = ()) -> str:
    """Format the daemon's status, one line per fact.

    elsewhere: addresses of KLEIN_ENGINE, which are named until the engines there are asked.
    """
    named = [f"engines, asked with the first image: {', '.join(elsewhere)}"] if elsewhere and not status.engine else []
    if status.silent:
        return "starting, ending or hanging: its process runs and does not answer; `klein-mcp stop` says more"
    if not status.running:
        return "\n".join(["not running; the first call that needs an image starts it", *named])
    lines = [f"running: version {status.version}, pid {status.pid}, since {_local_time(status.started)}"]
    if status.draining:
        lines.append("ending: as soon as its last image is done")
    if status.queue:
        lines.append(f"queue: {_format_queue(status.queue)}")
    if status.engine:  # none before the first image
        lines += _format_engine(status.engine)
    lines += named
    lines += [f"seconds per image, {model}: {_format_seconds(sizes)}" for model, sizes in status.seconds.items()]
    return "\n".join([*lines, f"log: {status.log}"])


def _format_queue(queue: QueueStatus) -> str:
    now = "generating" if queue.running else "idle"
    return f"{now}, {queue.waiting} of {queue.size} waiting; {queue.done} done, {queue.failed} failed"


def _format_engine(engine: EngineStatus) -> list[str]:
    loaded = f"{engine.loaded}, {engine.placement}" if engine.loaded else "none is loaded"
    installed = [
        f"{model.name} ({model.licence}{f', {model.obstacle}' if model.obstacle else ''})"
        for model in engine.models
        if model.path
    ]
    free = f"{engine.free_bytes / 1e9:.1f} GB free" if engine.free_bytes or not engine.nodes else ""
    device = filter(None, (engine.device, engine.dtype, free))
    return [
        f"device: {', '.join(device)}",
        f"model: {loaded}",
        *([f"speed: {engine.tuning}"] if engine.tuning else []),
        *([f"installed: {', '.join(installed)}"] if installed else []),
        *(format_node(node) for node in engine.nodes),
        *_format_cache(engine),
    ]


def _format_cache(engine: EngineStatus) -> list[str]:
    """Format the caches.

    A cluster tells only the hits, which are in the lines of its engines.
    """
    cache = engine.cache
    if engine.nodes and not cache.entries:
        return []
    return [f"cache: {cache.entries} prompts and references, {cache.bytes / 1e6:.0f} MB; {cache.hits} hits"]


def format_node(node: NodeStatus) -> str:
    """Format one of several engines."""
    if node.error:
        return f"engine {node.url}: {node.error}"
    where = f"{node.device}, {node.free_bytes / 1e9:.1f} GB free" if node.device else "idle"
    jobs = f"{node.running} running, {node.waiting} waiting"
    return f"engine {node.url}: {where}, {node.loaded or 'no model loaded'}, {jobs}, {node.hits} cache hits"


def _format_seconds(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{size.replace('x', '×')} {value:g}" for size, value in seconds.items())


def _local_time(moment: str) -> str:
    """Convert 2026-11-24T05:05:51+0000 to this machine's time zone."""
    return f"{datetime.strptime(moment, '%Y-%m-%dT%H:%M:%S%z').astimezone():%Y-%m-%d %H:%M}"
