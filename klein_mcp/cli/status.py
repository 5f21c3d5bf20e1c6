"""`klein-mcp status`: what this user's engine holds and does."""

import argparse
import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from klein_mcp.cli.daemon import ask_daemon
from klein_mcp.settings import Settings


def configure(parser: argparse.ArgumentParser) -> None:
    """Take no arguments."""


def run(settings: Settings, arguments: argparse.Namespace) -> int:
    state = ask_daemon(settings, "status")
    print(json.dumps(state) if arguments.json else format_status(state))
    return 0


def format_status(state: Mapping[str, Any]) -> str:
    """Format the daemon's status, one line per fact."""
    if state.get("silent"):
        return "starting, ending or hanging: its process runs and does not answer; `klein-mcp stop` says more"
    if not state["running"]:
        return "not running; the first call that needs an image starts it"
    lines = [f"running: version {state['version']}, pid {state['pid']}, since {_local_time(state['started'])}"]
    if state["draining"]:
        lines.append("ending: as soon as its last image is done")
    lines.append(f"queue: {_format_queue(state['queue'])}")
    if engine := state.get("engine"):  # none before the first image
        lines += _format_engine(engine)
    lines += [f"seconds per image, {model}: {_format_seconds(sizes)}" for model, sizes in state["seconds"].items()]
    return "\n".join([*lines, f"log: {state['log']}"])


def _format_queue(queue: Mapping[str, Any]) -> str:
    now = "generating" if queue["running"] else "idle"
    return f"{now}, {queue['waiting']} of {queue['size']} waiting; {queue['done']} done, {queue['failed']} failed"


def _format_engine(engine: Mapping[str, Any]) -> list[str]:
    loaded = f"{engine['loaded']}, {engine['placement']}" if engine["loaded"] else "none is loaded"
    installed = [f"{model['name']} ({model['licence']})" for model in engine["models"] if model["path"]]
    cache = engine["cache"]
    return [
        f"device: {engine['device']}, {engine['dtype']}, {engine['free_bytes'] / 1e9:.1f} GB free",
        f"model: {loaded}",
        f"installed: {', '.join(installed)}",
        f"cache: {cache['entries']} prompts and references, {cache['bytes'] / 1e6:.0f} MB; {cache['hits']} hits",
    ]


def _format_seconds(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{size.replace('x', '×')} {value:g}" for size, value in seconds.items())


def _local_time(moment: str) -> str:
    """Convert 2026-11-24T05:05:51+0000 to this machine's time zone."""
    return f"{datetime.strptime(moment, '%Y-%m-%dT%H:%M:%S%z').astimezone():%Y-%m-%d %H:%M}"
