"""What a tool is: a name, words for the model, arguments, and a function from a call to a result."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from mcp_types import CallToolResult, ToolAnnotations
from mcp_types import Tool as Listed
from pydantic import ValidationError

from klein_mcp.errors import RequestError, argument_errors
from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.service import Service
from klein_mcp.mcp_server.tools.fields import Arguments


@dataclass(frozen=True, slots=True)
class Tool:
    """read_only, destructive, idempotent: said to the client in the annotations of the protocol."""

    name: str
    title: str
    description: str
    arguments: type[Arguments]
    run: Callable[[Service, CallContext, Any], Awaitable[CallToolResult]]
    read_only: bool = False
    destructive: bool = False
    idempotent: bool = False

    def listed(self) -> Listed:
        """As tools/list tells it; no output schema, see results.py."""
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
        )

    def schema(self) -> dict[str, Any]:
        return _flat(self.arguments.model_json_schema())

    def parse(self, arguments: dict[str, Any]) -> Arguments:
        """Raises RequestError in the model's own words."""
        try:
            return self.arguments.model_validate(arguments)
        except ValidationError as problem:
            errors = problem.errors(include_url=False)
            raise RequestError(argument_errors(self.name, errors, self.schema()["properties"])) from None


def _flat(schema: Any) -> Any:
    """Without what costs tokens and tells nothing: titles, null branches, null defaults, docstrings of classes."""
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
