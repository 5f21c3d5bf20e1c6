"""view_image: look at a picture again, or closer."""

import anyio.to_thread
from mcp_types import CallToolResult

from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.service import Service
from klein_mcp.mcp_server import results
from klein_mcp.mcp_server.tools import fields
from klein_mcp.mcp_server.tools.tool import Tool


class ViewImage(fields.Arguments):
    image: fields.ImageRef
    region: fields.Region | None = None
    max_size: fields.ViewSize = 1024


async def run(service: Service, call: CallContext, asked: ViewImage) -> CallToolResult:
    opened = await service.open(asked.image, call)

    def look() -> CallToolResult:
        from klein_mcp.images import codec, preview, region

        record, part = opened.record, opened.image
        facts = {**results.place(service.store, record, call), "width": record.width, "height": record.height}
        if asked.region:
            left, top, right, bottom = region.check(asked.region, record.width, record.height)
            # A small part is shown enlarged: nothing can be told from 40 pixels.
            part = codec.fitted(part[top:bottom, left:right], asked.max_size)
            facts["region"] = asked.region
        data, mime = preview.preview(part, longest=asked.max_size)
        facts |= {"parents": record.parents, "prompt": record.prompt, "source": record.source}
        facts["warnings"] = opened.warnings
        return CallToolResult(content=[results.text(facts), results.picture(data, mime), results.link(record)])

    return await anyio.to_thread.run_sync(look)


TOOL = Tool(
    name="view_image",
    title="View an image",
    description="Look at a picture again, or at one region of it enlarged. Any picture: a handle, last, or a path.",
    arguments=ViewImage,
    run=run,
    read_only=True,
    idempotent=True,
)
