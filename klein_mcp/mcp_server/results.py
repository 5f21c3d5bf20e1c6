"""Tool results with images: a JSON line, one preview, links.

No structuredContent: several clients drop the image where there is any.
"""

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mcp_types import Annotations, CallToolResult, ContentBlock, ImageContent, ResourceLink, TextContent

from klein_mcp.images.library import Record, Store
from klein_mcp.jobs.context import CallContext

if TYPE_CHECKING:
    from klein_mcp.jobs.results import JobResult, PendingJob

MIME = "image/png"


def tool_result(result: "JobResult", store: Store, show: str, call: CallContext) -> CallToolResult:
    """Return the result of generate, edit and compose. Blocking."""
    first = result.images[0]
    records = [store.get(image.handle) for image in result.images]
    locations = [location(store, record, call) for record in records]
    common = {
        "width": first.width,
        "height": first.height,
        "model": first.model,
        "steps": first.steps,
        "parents": records[0].parents,
        **({} if first.changed is None else {"changed": first.changed}),
        "ms": result.ms,
        "cache": dict(first.cache),
        "warnings": result.warnings,
    }
    seeds = [str(image.seed) for image in result.images]
    if len(locations) == 1:
        line = {**locations[0], "seed": seeds[0], **common}
    else:
        cells = zip("ABCD", locations, seeds, strict=False)
        line = {"images": [{"label": label, **where, "seed": seed} for label, where, seed in cells], **common}
    blocks: list[ContentBlock] = [text(line)]
    if show == "inline" and result.preview:
        blocks.append(ImageContent(type="image", data=result.preview.base64, mime_type=result.preview.mime))
    if show != "none":
        blocks += [resource_link(record) for record in records]
    return CallToolResult(content=blocks)


def pending_result(pending: "PendingJob") -> CallToolResult:
    """Return the state of a job that goes on without this call."""
    return CallToolResult(content=[text({**asdict(pending), "next": f'wait_for_job with job "{pending.job}"'})])


def location(store: Store, record: Record, call: CallContext) -> dict[str, str]:
    """Return an image's handle with its path, or URL for remote clients."""
    at = {"path": str(store.path(record))} if call.link is None else {"url": call.link(record.handle)}
    return {"image": record.handle, "uri": uri(record.handle), **at}


def uri(handle: str) -> str:
    return f"klein://images/{handle}"


def text(metadata: Mapping[str, Any]) -> TextContent:
    """Return one line of compact JSON."""
    return TextContent(type="text", text=json.dumps(metadata, ensure_ascii=False, separators=(",", ":")))


def image_block(data: bytes, mime: str) -> ImageContent:
    return ImageContent(type="image", data=base64.b64encode(data).decode(), mime_type=mime)


def resource_link(record: Record) -> ResourceLink:
    """Return a link whose audience is the user alone.

    VS Code would otherwise fetch the full image for the model.
    """
    return ResourceLink(
        type="resource_link",
        uri=uri(record.handle),
        name=f"{record.handle}.png",
        mime_type=MIME,
        size=record.bytes,
        annotations=Annotations(audience=["user"]),
    )
