"""`klein-mcp status`: what the engine of this user holds and does, in a few lines for a person."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any


def in_words(state: Mapping[str, Any]) -> str:
    """state: as Backend.status tells it. A line for each thing there is to say."""
    if state.get("silent"):
        return "starting, ending or hanging: its process is there and does not answer; `klein-mcp stop` says more"
    if not state["running"]:
        return "not running; the first call that needs a picture starts it"
    lines = [f"running: version {state['version']}, pid {state['pid']}, since {_local(state['started'])}"]
    if state["draining"]:
        lines.append("ending: as soon as its last picture is painted")
    lines.append(f"queue: {_queue(state['queue'])}")
    if engine := state.get("engine"):  # none before the first picture
        lines += _engine(engine)
    lines += [f"seconds per picture, {model}: {_by_size(sizes)}" for model, sizes in state["seconds"].items()]
    return "\n".join([*lines, f"log: {state['log']}"])


def _queue(queue: Mapping[str, Any]) -> str:
    now = "painting" if queue["running"] else "idle"
    return f"{now}, {queue['waiting']} of {queue['size']} waiting; {queue['done']} done, {queue['failed']} failed"


def _engine(engine: Mapping[str, Any]) -> list[str]:
    loaded = f"{engine['loaded']}, {engine['placement']}" if engine["loaded"] else "none is loaded"
    installed = [f"{model['name']} ({model['licence']})" for model in engine["models"] if model["path"]]
    remembered = engine["cache"]
    return [
        f"device: {engine['device']}, {engine['dtype']}, {engine['free_bytes'] / 1e9:.1f} GB free",
        f"model: {loaded}",
        f"installed: {', '.join(installed)}",
        f"remembered: {remembered['entries']} prompts and references, {remembered['bytes'] / 1e6:.0f} MB; "
        f"used again {remembered['hits']}×",
    ]


def _by_size(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{size.replace('x', '×')} {each:g}" for size, each in seconds.items())


def _local(moment: str) -> str:
    """2026-11-24T05:05:51+0000, as the clock of this machine has it."""
    return f"{datetime.strptime(moment, '%Y-%m-%dT%H:%M:%S%z').astimezone():%Y-%m-%d %H:%M}"
