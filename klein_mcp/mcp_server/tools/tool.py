"""A tool: name, description, arguments, and the function it runs."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mcp_types import CallToolResult, ToolAnnotations
from mcp_types import Tool as Listed
from pydantic import ValidationError

from klein_mcp.errors import RequestError, argument_errors, describe
from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.service import Service
from klein_mcp.mcp_server.tools.fields import Arguments
from klein_mcp.mcp_server.tools.leniency import MOST_ITEMS
from klein_mcp.mcp_server.tools.other_names import unknown_arguments


@dataclass(frozen=True, slots=True)
class Tool:
    """One entry of tools/list.

    read_only, destructive, idempotent: the protocol's annotations. meta: `_meta`, for extensions such as MCP Apps.
    """

    name: str
    title: str
    description: str
    arguments: type[Arguments]
    run: Callable[[Service, CallContext, Any], Awaitable[CallToolResult]]
    read_only: bool = False
    destructive: bool = False
    idempotent: bool = False
    meta: Mapping[str, Any] | None = None

    def listed(self) -> Listed:
        """Return the entry of tools/list, without an output schema (see results.py)."""
        return Listed(
            name=self.name,
            title=self.title,
            description=self.description,
            input_schema=self.schema(),
            annotations=ToolAnnotations(
                read_only_hint=self.read_only,
                destructive_hint=self.destructive,
                idempotent_hint=self.idempotent,
                open_world_hint=False,
            ),
            _meta=None if self.meta is None else dict(self.meta),
        )

    def schema(self) -> dict[str, Any]:
        return _flat(self.arguments.model_json_schema())

    def parse(self, arguments: dict[str, Any]) -> Arguments:
        """Validate. Raises RequestError that quotes the published schema."""
        known = self.arguments.model_fields
        if unknown := [name for name in arguments if name not in known]:
            # Before pydantic, which makes an error of each: a client once sent 350,000.
            raise RequestError(unknown_arguments(self.name, unknown, known))
        if (error := self._too_many(arguments)) is not None:
            raise error
        try:
            return self.arguments.model_validate(arguments)
        except ValidationError as exc:
            errors = exc.errors(include_url=False)
            properties = self.schema()["properties"]
            raise RequestError(argument_errors(self.name, errors, properties, arguments)) from None

    def _too_many(self, arguments: dict[str, Any]) -> RequestError | None:
        """Return the error for a list that is far too long."""
        for name, value in arguments.items():
            if not isinstance(value, list) or len(value) <= MOST_ITEMS:
                continue
            schema = self.schema()["properties"][name]
            if schema.get("type") == "array":  # edit_image's prompt, text or a list, is checked where it is used
                return RequestError(f"{name} has {len(value):,} entries; it must be {describe(schema)}.")
        return None


def _flat(schema: Any) -> Any:
    """Drop what costs tokens without informing the model.

    These are titles, null branches, null defaults, and docstrings of classes.
    """
    if isinstance(schema, list):
        return [_flat(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "anyOf" in schema:
        (branch,) = (branch for branch in schema["anyOf"] if branch != {"type": "null"})
        schema = {**branch, **{key: value for key, value in schema.items() if key != "anyOf"}}
    if "properties" in schema:
        properties = {name: _flat(value) for name, value in schema["properties"].items()}
        schema = {key: value for key, value in schema.items() if key != "description"} | {"properties": properties}
        return {key: value for key, value in schema.items() if key != "title"}
    dropped = {"title"} | ({"default"} if schema.get("default", 0) is None else set())
    return {key: _flat(value) for key, value in schema.items() if key not in dropped}
