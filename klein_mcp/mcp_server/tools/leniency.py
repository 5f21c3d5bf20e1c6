"""Understands arguments as clients really send them, before they are validated."""

import ast
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from klein_mcp.errors import one_line

CLIENT_ARGUMENTS = frozenset(
    {
        *("_meta", "meta", "action", "chatInput", "conversationId", "progressToken", "requestId", "request_id"),
        *("sessionId", "session_id", "threadId", "tool", "toolCallId", "tool_call_id", "traceId", "trace_id"),
    }
)
"""Arguments that clients (n8n, Flowise, gateways) add by themselves; a model cannot leave them out."""

PLACEHOLDERS = ("", "null", "None", "undefined", "[]", "{}")
"""Text for "nothing" in an optional argument, by models that must fill in all of them."""

LONGEST_LITERAL = 40_000
"""Characters that are read as Python, more than eight of the longest prompts."""

_NO_LITERAL = (ValueError, TypeError, SyntaxError, OverflowError, RecursionError, MemoryError)
"""Raised by the parsers: TypeError for `{{}}`, OverflowError for an endless number plus 1j."""

MOST_ITEMS = 100
"""Items that are looked at in a list; the longest list of any tool has ten."""

_MOST_COMMAS = 10 * MOST_ITEMS
"""In text that stands for a list. Splitting and comparing a megabyte of them took three seconds."""

_REFERENCE = re.compile(r"last(?:~\d+|\.[A-D])?|[A-D]|[a-z0-9]{6}", re.IGNORECASE)


def is_placeholder(value: Any) -> bool:
    """True for a value that stands for nothing."""
    if isinstance(value, str):
        return value.strip() in PLACEHOLDERS
    if isinstance(value, list):
        return len(value) <= MOST_ITEMS and all(map(is_placeholder, value))
    return value is None or value == {}


def split_client_arguments(
    arguments: Mapping[str, Any], known: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Split off the arguments that a client added."""
    added = tuple(name for name in CLIENT_ARGUMENTS - known.keys() if name in arguments)
    return {name: value for name, value in arguments.items() if name not in added}, tuple(sorted(added))


def as_list(value: Any) -> Any:
    """Read a list from JSON, text with commas, or a box."""
    if isinstance(value, Mapping) and {"x", "y", "width", "height"} <= value.keys():
        return [value[side] for side in ("x", "y", "width", "height")]
    if not isinstance(value, str):
        return value
    if value.count(",") > _MOST_COMMAS:
        return [value]
    if value.lstrip().startswith(("[", "{")):
        read = _literal(value)
        return value if read is None else as_list(read) if value.lstrip()[0] == "{" else read
    parts = [part.strip() for part in value.split(",")]
    # A path may hold a comma; numbers and references do not.
    if all(re.fullmatch(r"-?\d+", part) or _REFERENCE.fullmatch(part) for part in parts):
        return parts
    return [value]


def _literal(text: str) -> Any:
    """Read a list or dict of JSON, or of Python.

    Small models write Python.
    """
    for read in (json.loads, ast.literal_eval) if len(text) <= LONGEST_LITERAL else (json.loads,):
        with suppress(*_NO_LITERAL):
            value = read(text.strip())
            return value if isinstance(value, list | dict) else None  # a set would come in any order
    return None


def as_reference(value: Any) -> Any:
    """Read an image from a list of one, or an earlier result."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, Mapping):
        value = next((value[name] for name in ("image", "handle", "uri") if isinstance(value.get(name), str)), value)
    return value


def as_references(value: Any) -> Any:
    """Read a list of images."""
    value = as_list(value)
    return [*map(as_reference, value)] if isinstance(value, list) and len(value) <= MOST_ITEMS else value


def from_json_list(value: Any) -> Any:
    """Read a list from JSON text alone, as prompts hold commas."""
    return as_list(value) if isinstance(value, str) and value.lstrip().startswith("[") else value


def as_number(value: Any) -> Any:
    """Read a whole number from text, also with a unit."""
    match = re.fullmatch(r"\s*(-?\d{1,20})\s*(?:px|pixels?)?\s*", value) if isinstance(value, str) else None
    return int(match[1]) if match else value


def as_choice(value: Any, choices: tuple[str, ...]) -> Any:
    """Read one of `choices` in any letter case or common spelling."""
    if not isinstance(value, str) or len(value) > 40:
        return value
    word = value.strip().strip("\"'").lower()
    word = {"jpg": "jpeg"}.get(word, word)
    ratio = re.fullmatch(r"(\d+)\s*[x×/:]\s*(\d+)", word)
    word = f"{ratio[1]}:{ratio[2]}" if ratio else word
    return word if word in choices else value


def ignored_warning(names: tuple[str, ...]) -> str:
    return one_line(f"ignored: {', '.join(names)}, which your client adds")
