"""Request errors, each one line to correct a call by."""

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from engine.contract import EngineError, Fix


RequestAction = Literal["", "list", "view", "wait", "make", "repaint"]
"""A next step that each front end calls by its own name.

make: generate an image, or name another. repaint: remove a background by an edit.
"""


class RequestError(Exception):
    """An error the caller can correct, with the next step as hint.

    action: a further step, for which each front end has its sentence. shows: what the caller sees by it.
    """

    saved = ""
    """A sentence with the images that the failed call had saved, the last of its line. The daemon never sets it."""

    def __init__(self, message: str, *, hint: str = "", action: RequestAction = "", shows: str = "all") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.action: RequestAction = action
        self.shows = shows

    def __str__(self) -> str:
        line = one_line(f"{self.message} {self.hint}").rstrip(";:")  # an action would go on after these
        return one_line(f"{line} {self.saved}")


class BadImage(RequestError):
    """Bytes that are no usable image."""


class NotEnoughMemory(RequestError):
    """This machine's memory does not suffice for an image at the moment."""


class ServerFault(RequestError):
    """An error that no other call avoids, only the server's owner."""


class UnknownImage(RequestError):
    """A reference that leads to no image."""


class Refused(RequestError):
    """A request that the settings of this server do not allow."""


def install_extra(name: str) -> str:
    """Return the sentence that tells how to install an optional extra."""
    # klein-mcp is in no registry yet, so its name leads pip nowhere.
    return f"Install it in klein-mcp's checkout: pip install '.[{name}]', or uv tool install '.[{name}]'."


def request_error_line(error: RequestError, sentences: Mapping[RequestAction, str]) -> str:
    """Return a request error in one line.

    sentences: those of a front end for each action.
    """
    following = sentences[error.action].format(shows=error.shows) if error.action else ""
    return one_line(f"{error.message} {error.hint} {following} {error.saved}")


def explain(exc: "EngineError") -> str:
    """Return an engine error and its fix in one line."""
    return one_line(" ".join(filter(None, (exc.message, exc.hint, fix_words(exc.fix)))))


def fix_words(fix: "Fix | None") -> str:
    """Return the sentence that tells a person how to apply `fix`."""
    if fix is None:
        return ""
    if fix.action == "pull":
        return f"Run: klein-mcp pull {fix.model}"
    if fix.action == "list":
        return "Run klein-mcp models to see what is there."
    option = f"--{fix.setting}" if fix.setting in _OPTIONS else ""
    names = " or ".join(filter(None, (option, f"KLEIN_{fix.setting.upper()}")))
    choices = " or ".join(fix.choices) if len(fix.choices) < 3 else ", ".join(fix.choices)
    if fix.effect:
        return f"Set {names} to {choices}: {fix.effect}." if choices else f"Set {names}: {fix.effect}."
    return f"Set {names}: {choices}." if choices else f"Set {names}."


_OPTIONS = ("device", "dtype", "quant", "variant")
"""Settings that commands take as an option, too."""


def one_line(text: str, limit: int = 600) -> str:
    """Collapse whitespace and shorten to `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def quote(value: Any, limit: int = 60) -> str:
    """Return a value as the caller wrote it, shortened for a message."""
    if isinstance(value, str):
        value = value[: limit + 1]  # before it is encoded: it may be megabytes
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else text[: limit - 1] + "…"


LONGEST_NAME = 100
"""Characters; the longest name that is looked for is a model's."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a sentence that names the nearest match, or ""."""
    names = list(known)
    if shape := _nearest_shape(word, names):
        return f"Did you mean {shape}?"
    # difflib takes seconds for a megabyte, and nothing is near to it.
    near = difflib.get_close_matches(word.lower(), names, 1) if len(word) <= LONGEST_NAME else []
    return f"Did you mean {near[0]}?" if near else ""


def _nearest_shape(word: str, names: Sequence[str]) -> str:
    """Return the aspect ratio nearest to one that is not offered."""
    asked, shapes = _ratio(word), {name: ratio for name in names if (ratio := _ratio(name))}
    return min(shapes, key=lambda name: abs(math.log(shapes[name] / asked))) if asked and shapes else ""


def _ratio(text: str) -> float:
    """Return width by height of a shape such as 4:3, else 0."""
    match = re.fullmatch(r"\s*(\d{1,5}(?:\.\d+)?)\s*[:x×/]\s*(\d{1,5}(?:\.\d+)?)\s*", text)
    across, along = (float(side) for side in match.groups()) if match else (0.0, 0.0)
    return across / along if along else 0.0


DESCRIBED = "described"
"""Type of a validation error whose message says it all."""


def argument_errors(
    tool: str, errors: Iterable[Mapping[str, Any]], properties: Mapping[str, Any], given: Mapping[str, Any]
) -> str:
    """Describe pydantic's validation errors in the words of the tool's schema.

    properties: the tool's own schema, so that message and schema cannot disagree. given: the arguments as they came.
    """
    # A union reports one error per branch; the first error of an argument is enough.
    first: dict[str, Mapping[str, Any]] = {}
    for error in errors:
        first.setdefault(str(error["loc"][0]) if error["loc"] else "", error)
    return one_line(" ".join(_argument_error(tool, name, error, properties, given) for name, error in first.items()))


def _argument_error(
    tool: str, name: str, error: Mapping[str, Any], properties: Mapping[str, Any], given: Mapping[str, Any]
) -> str:
    if not name:
        return error["ctx"]["error"].args[0] if error["type"] == "value_error" else f"{tool}: {error['msg']}."
    if error["type"] == DESCRIBED:
        return f"{name} {error['msg']}."
    allowed = describe(properties[name])
    is_free = not {"enum", "const"} & properties[name].keys() and properties[name].get("type") in ("string", "array")
    meaning = f" {properties[name]['description']}" if is_free and "description" in properties[name] else ""
    if error["type"] == "missing":
        return f"{name} is missing; it must be {allowed}.{meaning}"
    value = given.get(name, error["input"])  # the whole list, where an item of it is wrong
    choices = properties[name].get("enum", (properties[name].get("const", ""),))
    suggestion = did_you_mean(value, filter(None, choices)) if isinstance(value, str) else ""
    return f"{name} is {quote(value)}; it must be {allowed}.{meaning} {suggestion}"


_TYPE_NAMES = {"string": "text", "integer": "a whole number", "number": "a number", "boolean": "true or false"}
_ITEM_NAMES = {"string": "image references", "integer": "whole numbers"}
"""Names for the items of list arguments."""


def describe(schema: Mapping[str, Any]) -> str:
    """Describe in words what a property of a flat JSON schema allows."""
    if "const" in schema:
        return quote(schema["const"])
    if "enum" in schema:
        return "one of " + ", ".join(map(str, schema["enum"]))
    if schema.get("type") == "array":
        low, high = schema.get("minItems", 0), schema.get("maxItems")
        count = f"{low}" if low == high else f"{low} to {high}" if high else f"{low} or more"
        return f"a list of {count} {_ITEM_NAMES.get(schema.get('items', {}).get('type', ''), 'values')}"
    if isinstance(kinds := schema.get("type", ""), list):
        return " or ".join("a list of them" if kind == "array" else _TYPE_NAMES.get(kind, "a value") for kind in kinds)
    type_name = _TYPE_NAMES.get(kinds, "a value")
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        return f"{type_name}, {low} to {high}"
    if schema.get("type") == "string":
        least, most = schema.get("minLength", 0), schema.get("maxLength")
        return type_name + (f" of {least} to {most} characters" if most else "" if not least else ", not empty")
    return type_name
