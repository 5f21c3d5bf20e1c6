"""list_images: lists the library, newest first, as text."""

import time

import anyio.to_thread
from mcp_types import CallToolResult

from klein_mcp.errors import RequestError, one_line, quote
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
    image: fields.HistoryOf | None = None


async def run(service: Service, call: CallContext, arguments: ListImages) -> CallToolResult:
    if arguments.image is not None:
        record = (await service.open(arguments.image, call)).record
        return await anyio.to_thread.run_sync(lambda: CallToolResult(content=[results.text(_history(service, record))]))
    if arguments.cursor is not None and not (arguments.cursor.isdecimal() and len(arguments.cursor) < 19):
        raise RequestError(
            f"{quote(arguments.cursor)} is not a cursor.", hint='Give the "next" of the previous page, or nothing.'
        )
    before = int(arguments.cursor) if arguments.cursor else None
    page, following = await anyio.to_thread.run_sync(
        lambda: service.store.search(arguments.search or "", limit=arguments.limit, before=before)
    )
    payload = {"images": [_entry(record) for record in page], "next": None if following is None else str(following)}
    return CallToolResult(content=[results.text(payload)])


def _history(service: Service, record: Record) -> dict[str, object]:
    """Return the line of first parents, oldest first, with branches.

    An image made of several names all of them, each with a history of its own.
    """
    line = [record]
    while line[0].parents and (parent := service.store.find(line[0].parents[0])) is not None and parent not in line:
        line.insert(0, parent)
    on_line = {handle for each in line for handle in (each.handle, *each.parents)}
    steps = []
    for each in line:
        branches = [
            child.handle for child in service.store.lineage.children(each.handle) if child.handle not in on_line
        ]
        words = one_line(each.prompt or each.source or "", PROMPT_LENGTH)
        step: dict[str, object] = {"image": each.handle, "made_by": each.tool, "prompt": words}
        if len(each.parents) > 1:
            step["parents"] = each.parents
        if branches:
            step["branches"] = branches
        if saved := service.store.saved_files(each.handle):
            step["saved"] = saved
        steps.append(step)
    return {"image": record.handle, "history": steps}


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
