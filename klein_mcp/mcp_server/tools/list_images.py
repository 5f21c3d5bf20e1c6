"""list_images: lists the library, newest first, as text."""

import time

import anyio.to_thread
from mcp_types import CallToolResult

from klein_mcp.errors import RequestError, one_line
from klein_mcp.images.library import Record
from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.service import Service
from klein_mcp.mcp_server import results
from klein_mcp.mcp_server.tools import fields
from klein_mcp.mcp_server.tools.tool import Tool

PROMPT_LENGTH = 120
"""Characters: enough to recognise an image by."""


class ListImages(fields.Arguments):
    limit: fields.Limit = 20
    search: fields.Search | None = None
    cursor: fields.Cursor | None = None


async def run(service: Service, call: CallContext, arguments: ListImages) -> CallToolResult:
    if arguments.cursor is not None and not (arguments.cursor.isdecimal() and len(arguments.cursor) < 19):
        raise RequestError(
            f"{arguments.cursor!r} is not a cursor.", hint='Give the "next" of the previous page, or nothing.'
        )
    before = int(arguments.cursor) if arguments.cursor else None
    page, following = await anyio.to_thread.run_sync(
        lambda: service.store.search(arguments.search or "", limit=arguments.limit, before=before)
    )
    payload = {"images": [_entry(record) for record in page], "next": None if following is None else str(following)}
    return CallToolResult(content=[results.text(payload)])


def _entry(record: Record) -> dict[str, object]:
    entry = {
        "image": record.handle,
        "tool": record.tool,
        "width": record.width,
        "height": record.height,
        "parents": record.parents,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
    }
    if record.prompt is None:
        return {**entry, "source": record.source}
    made = {"seed": record.recipe.get("seed"), "model": record.recipe.get("model")}
    return {**entry, "prompt": one_line(record.prompt, PROMPT_LENGTH), **made}


TOOL = Tool(
    name="list_images",
    title="List images",
    description="Find earlier images: handles, prompts, seeds and parents, newest first. Text only.",
    arguments=ListImages,
    run=run,
    read_only=True,
    idempotent=True,
)
