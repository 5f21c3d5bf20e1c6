"""What went wrong with a request, in one line that a model can mend its call by."""

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.contract import EngineError, Fix


class RequestError(Exception):
    """The caller can mend this: what happened, the limit, and (hint) the next step, in one line."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return one_line(f"{self.message} {self.hint}")


class BadImage(RequestError):
    """These bytes are no picture that can be used."""


class UnknownImage(RequestError):
    """This reference leads to no picture."""


class Refused(RequestError):
    """The settings of this server do not allow it."""


def explain(exc: "EngineError") -> str:
    """Return an engine error in one line, its fix worded as settings and commands of ours."""
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
    """Whatever strangers put into a message, it stays one line of bounded length."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def shown(value: Any, limit: int = 60) -> str:
    """A value as the caller wrote it, shortened: a data URL is no help in a message."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), 1)
    return f"Did you mean {near[0]}?" if near else ""


def argument_errors(tool: str, problems: Iterable[Mapping[str, Any]], properties: Mapping[str, Any]) -> str:
    """pydantic's findings in the model's words: which argument, what was said, what is allowed, the nearest match.

    properties: the tool's own schema, so that message and schema cannot disagree.
    """
    # A union finds fault once per branch; the first word about an argument is enough.
    first: dict[str, Mapping[str, Any]] = {}
    for problem in problems:
        first.setdefault(str(problem["loc"][0]) if problem["loc"] else "", problem)
    return one_line(" ".join(_argument_error(tool, name, problem, properties) for name, problem in first.items()))


def _argument_error(tool: str, name: str, problem: Mapping[str, Any], properties: Mapping[str, Any]) -> str:
    if problem["type"] == "extra_forbidden":
        meant = did_you_mean(name, properties)
        return f"{tool} has no argument {shown(name)}. {meant} It takes {', '.join(properties)}."
    if not name:
        return problem["ctx"]["error"].args[0] if problem["type"] == "value_error" else f"{tool}: {problem['msg']}."
    allowed = describe(properties[name])
    if problem["type"] == "missing":
        return f"{name} is missing; it must be {allowed}."
    value = problem["input"]
    meant = did_you_mean(value, properties[name].get("enum", ())) if isinstance(value, str) else ""
    return f"{name} is {shown(value)}; it must be {allowed}. {meant}"


_KINDS = {"string": "text", "integer": "a whole number", "number": "a number", "boolean": "true or false"}
_MANY = {"string": "image references", "integer": "whole numbers"}
"""What the tools take lists of."""


def describe(schema: Mapping[str, Any]) -> str:
    """What a property of a flat JSON schema allows, in words."""
    if "enum" in schema:
        return "one of " + ", ".join(map(str, schema["enum"]))
    if schema.get("type") == "array":
        low, high = schema.get("minItems", 0), schema.get("maxItems")
        many = f"{low}" if low == high else f"{low} to {high}" if high else f"{low} or more"
        return f"a list of {many} {_MANY.get(schema.get('items', {}).get('type', ''), 'values')}"
    kind = _KINDS.get(schema.get("type", ""), "a value")
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        return f"{kind}, {low} to {high}"
    if schema.get("type") == "string":
        least, most = schema.get("minLength", 0), schema.get("maxLength")
        return kind + (f" of {least} to {most} characters" if most else "" if not least else ", not empty")
    return kind
