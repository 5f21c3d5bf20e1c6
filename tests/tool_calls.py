"""Tool calls as tests write and read them."""

import base64
import json
from typing import Any

from mcp import Client
from mcp_types import CallToolResult

from engine.contract import Rgb8
from tests.images import pixels


async def call(client: Client, tool: str, **arguments: Any) -> dict[str, Any]:
    """The JSON line of a call that succeeds."""
    return line(await client.call_tool(tool, arguments))


async def refused(client: Client, tool: str, **arguments: Any) -> str:
    """The one line of a call that fails."""
    result = await client.call_tool(tool, arguments)
    assert result.is_error, result.content
    return complaint(result)


def complaint(result: CallToolResult) -> str:
    (block,) = result.content
    text: str = block.text  # type: ignore[union-attr]
    assert "\n" not in text
    assert len(text) <= 600
    assert "pydantic" not in text
    assert "Traceback" not in text
    return text


def line(result: CallToolResult) -> dict[str, Any]:
    assert not result.is_error, result.content[0]
    text: str = result.content[0].text  # type: ignore[union-attr]
    assert "\n" not in text
    return json.loads(text)


def kinds(result: CallToolResult) -> list[str]:
    return [block.type for block in result.content]


def preview(result: CallToolResult) -> Rgb8:
    """The one image in a result."""
    (block,) = (block for block in result.content if block.type == "image")
    return pixels(base64.b64decode(block.data))
