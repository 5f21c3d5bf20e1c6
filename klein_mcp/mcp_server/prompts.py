"""The Markdown of prompts/ as MCP prompts with completions, and klein://guide.

A file is TOML front matter between two lines of +++, then a Jinja template, then, behind a line of `+++ small`, another
one for the embedded model, in its few words. The user's values go into the text as
they are, and into ```json blocks escaped, so that each block stays one tool call whatever was typed.
"""

import json
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import TYPE_CHECKING, Any

import anyio.to_thread
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.prompts import Prompt
from mcp.server.mcpserver.prompts.base import PromptArgument, UserMessage
from mcp.server.mcpserver.resources import TextResource
from mcp.shared.exceptions import MCPError
from mcp_types import INVALID_PARAMS, Completion, PromptReference

from klein_mcp.errors import did_you_mean, one_line, quote

if TYPE_CHECKING:
    import jinja2

MAX_VALUE = 2000
"""Characters of one argument; a whole prompt of klein is about as long."""
MAX_ITEMS = 12
"""Entries of a list argument: each is an image to make."""
IMAGES = "images"
"""As completions: the images of the library."""

GUIDE = "klein://guide"


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of a prompt.

    default: None for a required one. complete: values to offer, or IMAGES.
    separators: of a text that is a list, "" for one that is none. Lines separate in any list.
    pattern: regular expression for a value that becomes a number or a list in a tool call.
    """

    name: str
    description: str
    default: str | None
    complete: tuple[str, ...] | str
    separators: str
    pattern: str

    @classmethod
    def parse(cls, name: str, raw: Mapping[str, Any]) -> "Argument":
        complete = raw.get("complete", ())
        return cls(
            name,
            raw["description"],
            raw.get("default"),
            complete if complete == IMAGES else tuple(complete),
            raw.get("separators", ""),
            raw.get("pattern", ""),
        )

    def value(self, given: str | None) -> str | list[str]:
        """Validate `given`. Raises ValueError with a message for the user."""
        text = (given or "").strip() or self.default
        if text is None:
            raise ValueError(f"{self.name} is missing: {self.description.lower()}.")
        if len(text) > MAX_VALUE:
            raise ValueError(f"{self.name} has {len(text)} characters; at most {MAX_VALUE}.")
        if self.pattern and text != self.default and not re.fullmatch(self.pattern, text):
            raise ValueError(f"{self.name} is {quote(text)}; it must look like {self.complete[0]}.")
        if not self.separators:
            return one_line(text, MAX_VALUE)
        # Entries that are sentences have commas of their own, so that only semicolons separate them.
        between = ";" if re.search("[;\n]", text) else self.separators
        items = [one_line(item, MAX_VALUE) for item in re.split(f"[{between}\n]", text)]
        items = [item for item in items if item]
        if not 1 <= len(items) <= MAX_ITEMS:
            raise ValueError(f"{self.name} has {len(items)} entries; 1 to {MAX_ITEMS} are possible.")
        return items


class PromptFile:
    """One file of prompts/."""

    def __init__(self, name: str, text: str) -> None:
        front, body = text.removeprefix("+++\n").split("\n+++\n", 1)
        self._body, _, self._small_body = body.partition("\n+++ small\n")
        header = tomllib.loads(front)
        self.name = name
        self.title: str = header["title"]
        self.description: str = header["description"]
        self.arguments = {key: Argument.parse(key, value) for key, value in header.get("arguments", {}).items()}

    @cached_property
    def _template(self) -> "jinja2.Template":
        return _environment().from_string(_escaped_in_blocks(self._body))

    @cached_property
    def _small_template(self) -> "jinja2.Template":
        return _environment().from_string(_escaped_in_blocks(self._small_body))

    def render(self, given: Mapping[str, str], *, small: bool = False) -> str:
        """Return the prompt's text. Raises ValueError with one line for the user.

        small: for the embedded model.
        """
        for name in given:
            if name not in self.arguments:
                takes = ", ".join(self.arguments)
                nearest = did_you_mean(name, self.arguments)
                raise ValueError(one_line(f"{self.name} has no argument {quote(name)}. {nearest} It takes {takes}."))
        values = {name: argument.value(given.get(name)) for name, argument in self.arguments.items()}
        template = self._small_template if small else self._template
        text = re.sub(r"\n{3,}", "\n\n", template.render(values))  # a loop leaves its own line ends behind
        return "\n\n".join([text.strip(), *([_common("_small.md").strip()] if small else []), _common("_steps.md")])


def prompt_files() -> list[PromptFile]:
    """Return the files of prompts/ by name, except shared parts (`_…`)."""
    found = [file for file in _folder().iterdir() if file.name.endswith(".md") and not file.name.startswith("_")]
    named = sorted(found, key=lambda file: file.name)
    return [PromptFile(file.name.removesuffix(".md"), file.read_text(encoding="utf-8")) for file in named]


def guide() -> str:
    """Return the text of klein://guide."""
    return files("klein_mcp.mcp_server").joinpath("guide.md").read_text(encoding="utf-8")


def register(server: MCPServer, recent: Callable[[str], Sequence[str]], small: Callable[[], bool]) -> None:
    """Add the prompts, their completions and the guide to a server.

    recent: returns handles of the library that begin with the typed text, newest first; may block.
    small: returns whether a call would use the embedded model; may block.
    """
    known = {file.name: file for file in prompt_files()}
    for file in known.values():
        server.add_prompt(_FilePrompt.create(file, small))
    server.add_resource(
        TextResource(
            uri=GUIDE,
            name="guide",
            title="How to prompt klein",
            description="Words that work for generating, editing and composing; what the embedded model nano knows.",
            mime_type="text/markdown",
            text=guide(),
        )
    )

    @server.completion()
    async def complete(ref: Any, argument: Any, context: Any) -> Completion:
        if not isinstance(ref, PromptReference):
            return Completion(values=list(await anyio.to_thread.run_sync(recent, argument.value)))
        file = known.get(ref.name)
        completed = file.arguments.get(argument.name) if file else None
        if completed is None:
            return Completion(values=[])
        if isinstance(completed.complete, str):
            return Completion(values=list(await anyio.to_thread.run_sync(recent, argument.value)))
        return Completion(values=_matching(argument.value, completed.complete))


class _FilePrompt(Prompt):
    """The SDK's prompt, with error messages that name the cause."""

    @classmethod
    def create(cls, file: PromptFile, small: Callable[[], bool]) -> "_FilePrompt":
        return cls(
            name=file.name,
            title=file.title,
            description=file.description,
            arguments=[
                PromptArgument(name=argument.name, description=_described(argument), required=argument.default is None)
                for argument in file.arguments.values()
            ],
            fn=lambda given: file.render(given, small=small()),
        )  # type: ignore[call-arg]

    async def render(self, arguments: dict[str, Any] | None, context: Any) -> list[Any]:
        try:
            text: Any = await anyio.to_thread.run_sync(self.fn, arguments or {})
            return [UserMessage(text)]
        except ValueError as exc:
            raise MCPError(code=INVALID_PARAMS, message=str(exc)) from None


def _described(argument: Argument) -> str:
    return f"{argument.description}. Default: {argument.default}" if argument.default else argument.description


def _matching(typed: str, offered: Sequence[str]) -> list[str]:
    """Return values that start with `typed`, then those that contain it."""
    typed = typed.lower().strip()
    found = (value for value in offered if typed in value.lower())
    return sorted(found, key=lambda value: not value.lower().startswith(typed))


def _folder() -> Traversable:
    return files("prompts")


def _common(name: str) -> str:
    return _folder().joinpath(name).read_text(encoding="utf-8")


def _escaped_in_blocks(text: str) -> str:
    """Pass every value inside a ```json block through the filter `in_json`."""

    def escape(block: re.Match[str]) -> str:
        return re.sub(r"\{\{(.*?)\}\}", r"{{ (\1) | in_json }}", block[0])

    return re.sub(r"```json\n.*?```", escape, text, flags=re.DOTALL)


def _environment() -> "jinja2.Environment":
    import jinja2

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
    environment.filters["in_json"] = lambda value: json.dumps(str(value), ensure_ascii=False)[1:-1]
    environment.filters["sentence"] = lambda text: text[:1].upper() + text[1:]
    environment.filters["head"] = lambda text: text.split()[-1]
    environment.filters["ground"] = _ground
    environment.filters["coloured"] = _coloured
    environment.filters["colour_words"] = lambda text: [part.split()[-1] for part in text.split(",") if part.strip()]
    environment.filters["with_article"] = _with_article
    environment.filters["slug"] = lambda text: re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "image"
    return environment


def _ground(text: str) -> str:
    """Return the colour or place of "a green background" or "the snow"."""
    return re.sub(r"^(?:an?|the) (?=.* background$)| background$", "", text.strip())


def _with_article(text: str) -> str:
    """Put "a" or "an" before a noun that has no article."""
    if re.match(r"(?:an?|the|one)\s", text, re.IGNORECASE):
        return text
    return f"{'an' if text[:1].lower() in 'aeio' else 'a'} {text}"


def _coloured(text: str, colour: str) -> str:
    """Put a colour before the noun: "a star" becomes "a teal star"."""
    return _with_article(f"{colour} {re.sub(r'^(?:an?|the) ', '', text.strip(), flags=re.IGNORECASE)}")
