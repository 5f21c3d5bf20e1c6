"""A scripted agent: reads tool calls out of a prompt's Markdown and makes them, knowing nothing else of it."""

import json
import re
from dataclasses import dataclass, field
from typing import Any

from mcp.client import Client

_BLOCK = re.compile(r"```json\n(.*?)```", re.DOTALL)
_PLACE = re.compile(r"<(\w+)(?:\.([A-D]))?>")


def steps(markdown: str) -> list[dict[str, Any]]:
    """The tool calls in the order in which they are written."""
    return [json.loads(block) for block in _BLOCK.findall(markdown)]


@dataclass
class Agent:
    """calls: (tool, arguments, payload) of each call made."""

    client: Client
    calls: list[tuple[str, dict[str, Any], dict[str, Any]]] = field(default_factory=list)
    _named: dict[str, dict[str, Any]] = field(default_factory=dict)

    async def follow(self, markdown: str) -> list[str]:
        """Make every call and return the paths of saved images."""
        saved = []
        for step in steps(markdown):
            payload = await self.call(step["tool"], self._filled(step["arguments"]))
            if "as" in step:
                self._named[step["as"]] = payload
            if step["tool"] == "save_image":
                saved.append(payload["saved"])
        return saved

    async def call(self, tool: str, arguments: dict[str, Any]) -> dict[str, Any]:
        result = await self.client.call_tool(tool, arguments)
        text = result.content[0].text  # type: ignore[union-attr]
        assert not result.is_error, f"{tool} {arguments}: {text}"
        payload = json.loads(text)
        while "job" in payload:
            payload = await self.call("wait_for_job", {"job": payload["job"]})
        self.calls.append((tool, arguments, payload))
        return payload

    def _filled(self, value: Any) -> Any:
        """With the handles of earlier results where a step says <name> or <name.B>."""
        if isinstance(value, dict):
            return {key: self._filled(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._filled(item) for item in value]
        place = _PLACE.fullmatch(value) if isinstance(value, str) else None
        return self._handle(*place.groups()) if place else value

    def _handle(self, name: str, label: str | None) -> str:
        payload = self._named[name]
        if label is None:
            return payload["image"]
        return next(one["image"] for one in payload["images"] if one["label"] == label)
