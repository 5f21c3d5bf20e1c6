"""`klein-mcp info`: how an image was made, and from what."""

import argparse
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from klein_mcp.cli.records import describe_file, describe_record, expect_handle
from klein_mcp.cli.terminal import strip_control_chars
from klein_mcp.errors import one_line
from klein_mcp.images.library import Store
from klein_mcp.images.paths import expanded
from klein_mcp.settings import Settings

_LONGEST = 20_000
"""Characters of one fact that are printed: more than a prompt may have, less than a foreign file may hold."""
_DEEPEST = 8
"""Spaces of indentation; our own recipes take 4."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="FILE or HANDLE", help="an image file, or an image of the library")


def run(settings: Settings, arguments: argparse.Namespace) -> int:
    return info(settings, arguments.target, as_json=arguments.json)


def info(settings: Settings, target: str, *, as_json: bool = False) -> int:
    store = Store(settings.library)
    try:
        path = expanded(target)
        if not os.path.exists(path):
            expect_handle(store, target)
            facts = describe_record(store, store.get(target))
        else:
            facts = describe_file(store, path, settings.home)
    finally:
        store.close()
    print(json.dumps(facts) if as_json else "\n".join(format_facts(facts)))
    return 0


def format_facts(facts: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Yield one line per fact, nested facts indented."""
    for name, value in facts.items():
        label = f"{indent}{one_line(strip_control_chars(name.replace('_', ' ')), 60)}:"
        if isinstance(value, Mapping) and value and len(indent) < _DEEPEST:
            yield label
            yield from format_facts(value, indent + "  ")
        else:
            yield f"{label} {_format_value(value)}"


def _format_value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        value = ", ".join(str(item) if isinstance(item, list) else _format_value(item) for item in value)
    return "none" if value is None or value in ("", {}) else one_line(strip_control_chars(str(value)), _LONGEST)
