"""A client of the HTTP server: progress while it paints, the exact image fetched as a resource.

    klein-mcp serve --port 8765 &
    python examples/http_client.py [URL] [FOLDER] [--token-file FILE]

The server may stand on the machine with the GPU and the client elsewhere; then start it with --token-file and
--allowed-host, and give the same token here. Without --token-file it makes one: http-token in its data folder.
"""

import argparse
import base64
import json
import sys
from pathlib import Path
from typing import Any

import anyio
import httpx2
from mcp.client import Client
from mcp.client.streamable_http import streamable_http_client


async def tell(progress: float, total: float | None, message: str | None) -> None:
    """Progress of a call, as the server reports it."""
    print(f"  {progress / (total or 100):4.0%}  {message or ''}")


async def main(url: str, folder: Path, token: str | None) -> None:
    """Paint one image and keep the exact one."""
    folder.mkdir(parents=True, exist_ok=True)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with httpx2.AsyncClient(headers=headers, timeout=60) as http:
        # Asked beforehand: the MCP client would only say that there was an error.
        try:
            answer = await http.options(url)
        except (httpx2.TransportError, httpx2.InvalidURL) as problem:
            sys.exit(f"no server answers at {url} ({problem}); start one: klein-mcp serve")
        if answer.status_code == 401:
            sys.exit(f"{url} refuses {'this token' if token else 'calls without a token'}; give its own: --token-file")
        if answer.status_code == 404:
            sys.exit(f"{url} is no MCP server's address; klein-mcp serve has its own at /mcp")
        async with Client(streamable_http_client(url, http_client=http)) as client:
            await paint(client, folder)


async def call(client: Client, tool: str, **arguments: Any) -> dict[str, Any]:
    """The facts of a result, however long it takes."""
    result = await client.call_tool(tool, arguments, progress_callback=tell)
    text = result.content[0].text  # type: ignore[union-attr]
    if result.is_error:
        raise RuntimeError(f"{tool}: {text}")
    facts = json.loads(text)
    # A slow machine: the image is still being painted.
    return await call(client, "wait_for_job", job=facts["job"]) if "job" in facts else facts


async def paint(client: Client, folder: Path) -> None:
    """Hear the progress, and fetch the exact image as a resource."""
    facts = await call(client, "generate_image", prompt="a rocket on an orange background", seed=7)
    image = (await client.read_resource(f"klein://images/{facts['image']}")).contents[0]
    path = folder / f"{facts['image']}.png"
    path.write_bytes(base64.b64decode(image.blob))  # type: ignore[union-attr]
    print(f"{path}  seed {facts['seed']}")


def innermost(problem: BaseException) -> BaseException:
    """The client's task groups wrap whatever goes wrong inside them, each once more."""
    return innermost(problem.exceptions[0]) if isinstance(problem, BaseExceptionGroup) else problem


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8765/mcp")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("klein-example"))
    parser.add_argument("--token-file", type=Path)
    given = parser.parse_args()
    try:
        secret = given.token_file.read_text().strip() if given.token_file else None
    except OSError as problem:
        sys.exit(f"{given.token_file} cannot be read: {problem.strerror}; copy the server's http-token to there")
    try:
        anyio.run(main, given.url, given.folder, secret)
    except Exception as problem:
        sys.exit(f"{type(innermost(problem)).__name__}: {innermost(problem)}")
