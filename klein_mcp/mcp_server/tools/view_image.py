"""view_image: shows an image again, or a part of it enlarged."""

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


async def run(service: Service, call: CallContext, arguments: ViewImage) -> CallToolResult:
    opened = await service.open(arguments.image, call)

    def render() -> CallToolResult:
        from klein_mcp.images import codec, preview, region

        record = opened.record
        part = service.sources.pixels(record)
        metadata = {**results.location(service.store, record, call), "width": record.width, "height": record.height}
        if arguments.region:
            left, top, right, bottom = region.check(arguments.region, record.width, record.height)
            # A small part is shown enlarged: a model sees nothing in 40 pixels.
            part = codec.fitted(part[top:bottom, left:right], arguments.max_size)
            metadata["region"] = arguments.region
        data, mime = preview.preview(part, longest=arguments.max_size)
        metadata |= {"parents": record.parents, "prompt": record.prompt, "source": record.source}
        metadata["warnings"] = opened.warnings
        blocks = [results.text(metadata), results.image_block(data, mime), results.resource_link(record)]
        return CallToolResult(content=blocks)

    return await anyio.to_thread.run_sync(render)


TOOL = Tool(
    name="view_image",
    title="View an image",
    description="Look at an image again, or at one region of it enlarged. Any image: a handle, last, or a path.",
    arguments=ViewImage,
    run=run,
    read_only=True,
    idempotent=True,
)
