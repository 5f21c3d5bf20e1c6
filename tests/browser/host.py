"""A chat client that shows MCP Apps, as tests drive it."""

import base64
import io
import json
from collections.abc import Callable
from typing import Any

import anyio
import numpy as np
from mcp import Client
from PIL import Image

from tests.tool_calls import line

Mount = Callable[..., Any]
"""mount(tool=…, policy=…, …): a `Host` with the page mounted for a call of that tool."""


class Host:
    """A chat client that shows MCP Apps: the real bridge in a real browser, over a real client session."""

    def __init__(self, page: Any, client: Client) -> None:
        self.page = page
        self.client = client
        self.reads: list[str] = []
        self.calls: list[dict[str, Any]] = []
        self._running: dict[int, anyio.CancelScope] = {}

    @property
    def frame(self) -> Any:
        return self.page.frame_locator("iframe")

    async def request(self, number: int, method: str, params: dict[str, Any]) -> dict[str, Any]:
        """Answer what the view asks of the server."""
        with anyio.CancelScope() as self._running[number]:
            try:
                if method == "resources/read":
                    self.reads.append(params["uri"])
                    result = await self.client.read_resource(params["uri"])
                else:
                    self.calls.append(params)
                    result = await self.client.call_tool(params["name"], params["arguments"], meta=params.get("_meta"))
            except Exception as exc:
                return {"error": str(exc)}
            return {"result": result.model_dump(mode="json", by_alias=True, exclude_none=True)}
        return {"error": "cancelled"}

    def cancel(self, number: int) -> None:
        self._running[number].cancel()

    async def agent_calls(self, tool: str, **arguments: Any) -> dict[str, Any]:
        """Call a tool as the agent does, and tell the view before and after."""
        await self.page.evaluate("(params) => bridge.sendToolInput(params)", {"arguments": arguments})
        result = await self.client.call_tool(tool, arguments)
        content = result.model_dump(mode="json", by_alias=True, exclude_none=True)
        await self.page.evaluate("(result) => bridge.sendToolResult(result)", content)
        return line(result)

    async def image(self) -> np.ndarray:
        """Wait for the image on the stage and return its pixels as the frame has them."""
        picture = self.frame.locator(".frame:not(.working) .picture").first
        await picture.wait_for()
        data = await picture.evaluate(
            "async (node) => { while (!node.naturalWidth) await new Promise((done) => setTimeout(done, 50));"
            " const canvas = document.createElement('canvas');"
            " [canvas.width, canvas.height] = [node.naturalWidth, node.naturalHeight];"
            " canvas.getContext('2d').drawImage(node, 0, 0); return canvas.toDataURL('image/png'); }"
        )
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data.split(",")[1]))).convert("RGB"))

    async def jobs(self) -> list[dict[str, Any]]:
        """Return the jobs that the page would show as running."""
        (content,) = (await self.client.read_resource("klein://now?after=0")).contents
        return json.loads(content.text)["jobs"]  # type: ignore[union-attr] - a page of JSON is text
