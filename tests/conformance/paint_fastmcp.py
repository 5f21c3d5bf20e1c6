"""Generate, edit and compose through the fastmcp client: one line of JSON per image. Argument: the Python to use."""

import asyncio
import json
import os
import sys
from typing import Any

from fastmcp import Client  # type: ignore[import-not-found]
from fastmcp.client.transports import StdioTransport  # type: ignore[import-not-found]


async def paint(client: Client, tool: str, **arguments: Any) -> str:
    result = await client.call_tool(tool, arguments)
    payload = json.loads(result.content[0].text)
    preview = next(block.data for block in result.content if block.type == "image")
    print(json.dumps({"payload": payload, "preview": preview}))
    return payload["image"]


async def main() -> None:
    transport = StdioTransport(sys.argv[1], ["-m", "klein_mcp"], env=dict(os.environ))
    async with Client(transport) as client:
        first = await paint(client, "generate_image", prompt="an apple on a yellow background", seed=7)
        second = await paint(client, "edit_image", image=first, prompt="make the background green", seed=8)
        prompt = "image 1 with the background from image 2"
        await paint(client, "compose_references", images=[first, second], prompt=prompt)


asyncio.run(main())
