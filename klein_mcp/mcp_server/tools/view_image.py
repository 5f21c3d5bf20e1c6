"""view_image: shows an image again, or a part of it enlarged."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import anyio.to_thread
from mcp_types import CallToolResult

from klein_mcp.errors import RequestError
from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.service import Service
from klein_mcp.mcp_server import results
from klein_mcp.mcp_server.tools import fields
from klein_mcp.mcp_server.tools.tool import Tool

if TYPE_CHECKING:
    from klein_mcp.images.resolver import ResolvedImage


class ViewImage(fields.Arguments):
    image: fields.ImageRef
    region: fields.Region | None = None
    compare_with: fields.CompareWith | None = None
    background: fields.CutOut | None = None
    max_size: fields.ViewSize = 1024


async def run(service: Service, call: CallContext, arguments: ViewImage) -> CallToolResult:
    opened = await service.open(arguments.image, call)
    if not arguments.compare_with:
        return await _in_budget([opened], lambda: _viewed(service, opened, arguments, call))
    if arguments.background:
        raise RequestError("compare_with shows both images as they are.", hint="Leave out background.")
    other = await service.open(arguments.compare_with, call)
    return await _in_budget([opened, other], lambda: _compared(service, opened, other, arguments))


async def _in_budget(opened: "list[ResolvedImage]", render: Callable[[], CallToolResult]) -> CallToolResult:
    """Render in a thread, while few other large images are open."""
    from klein_mcp.images.budget import DECODING

    pixels = sum(image.record.area for image in opened)
    return await anyio.to_thread.run_sync(DECODING.run, pixels, render)


def _viewed(service: Service, viewed: "ResolvedImage", arguments: ViewImage, call: CallContext) -> CallToolResult:
    """Show an image, or a region of it."""
    from klein_mcp.images import alpha, codec, cutout, preview, region

    record, warnings = viewed.record, list(viewed.warnings)
    part = service.sources.pixels(record)
    metadata = {**results.location(service.store, record, call), "width": record.width, "height": record.height}
    if arguments.background:
        cut = cutout.of_plain(part, record.handle)
        part, metadata["alpha"] = cut.image, cut.checks.to_json()
        warnings += cut.warnings
    if arguments.region:
        left, top, right, bottom = region.region_box(arguments.region, record.width, record.height)
        # A small part is shown enlarged: a model sees nothing in 40 pixels.
        part = codec.fit(part[top:bottom, left:right], arguments.max_size)
        metadata["region"] = arguments.region
        data, mime = preview.preview(part, longest=arguments.max_size)
    else:
        # An enlarged file shows no more than the pixels it was painted with.
        longest = min(arguments.max_size, int(record.recipe.get("painted", arguments.max_size)))
        data, mime = preview.preview(part, longest=longest)
    if (backing := alpha.viewing_backing(part)) is not None:
        metadata["background"] = results.transparent(alpha.VIEWED_ON[backing])
    metadata |= {"parents": record.parents, "prompt": record.prompt, "source": record.source}
    metadata["warnings"] = warnings
    blocks = [results.text(metadata), results.image_block(data, mime), results.resource_link(record)]
    return CallToolResult(content=blocks)


def _compared(
    service: Service, viewed: "ResolvedImage", compared: "ResolvedImage", arguments: ViewImage
) -> CallToolResult:
    """Show two images, or a region of both, beside their difference."""
    from klein_mcp.images import alpha, codec, preserve, preview, region

    record, other = viewed.record, compared.record
    warnings = [*viewed.warnings, *compared.warnings]
    first, second = (service.sources.pixels(each) for each in (record, other))
    # One colour behind both: two would count as a change of everything that is transparent.
    backing = next((grey for grey in map(alpha.viewing_backing, (first, second)) if grey is not None), None)
    first, second = alpha.for_viewing(first, backing), alpha.for_viewing(second, backing)
    if first.shape != second.shape:
        second = codec.resize(second, record.width, record.height)
        warnings.append(f"{other.handle} is {other.width}×{other.height} and was resized for the comparison")
    part = arguments.region or [0, 0, record.width, record.height]
    left, top, right, bottom = region.region_box(part, record.width, record.height)
    changed = preserve.measure(first, second, region.inside(part, record.width, record.height), kept=False)
    first, second = (image[top:bottom, left:right] for image in (first, second))
    difference = preserve.difference(first, second)
    # Twice the difference, as a change of 24 of 255 is hardly seen. Black is equal: with white for equal, a person read
    # "the apple changed" of a new background.
    cells = [second, first, difference.clip(0, 127) * 2]
    if arguments.region:
        # As wide as a cell: a model sees nothing in 40 pixels.
        cells = [codec.fit(cell, preview.LONG_EDGE // 3) for cell in cells]
    sheet = preview.contact_sheet(cells, [other.handle, record.handle, "changed: bright"], columns=3)
    line = {
        "image": record.handle,
        **({"warnings": warnings} if warnings else {}),
        "compare_with": other.handle,
        **({} if backing is None else {"background": results.transparent(alpha.VIEWED_ON[backing])}),
        **({"region": arguments.region} if arguments.region else {}),
        "changed": {"share": changed.share, "box": changed.box and list(changed.box)},
        "identical": round(float((difference == 0).mean()), 4),
    }
    return CallToolResult(
        content=[results.text(line), results.image_block(*preview.preview(sheet, longest=arguments.max_size))]
    )


TOOL = Tool(
    name="view_image",
    title="View an image",
    description="Look at an image again, at one region of it enlarged, or at two and where they differ (bright).",
    arguments=ViewImage,
    run=run,
    read_only=True,
    idempotent=True,
)
