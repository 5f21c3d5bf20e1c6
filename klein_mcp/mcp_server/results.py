"""Tool results with images: a JSON line, one preview, links.

No structuredContent: several clients drop the image where there is any.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mcp_types import Annotations, CallToolResult, ContentBlock, ImageContent, ResourceLink, TextContent

from klein_mcp.images.library import Record, Store
from klein_mcp.jobs.context import CallContext

if TYPE_CHECKING:
    from klein_mcp.jobs.outcome import JobResult, PendingJob

MIME = "image/png"


def tool_result(outcome: "JobResult", store: Store, show: str, call: CallContext) -> CallToolResult:
    """Return the result of generate, edit and compose. Blocking."""
    first = outcome.made[0]
    locations = [location(store, made.record, call) for made in outcome.made]
    common = {
        "width": first.record.width,
        "height": first.record.height,
        "model": first.painting.model,
        "steps": first.painting.steps,
        "parents": first.record.parents,
        **({} if first.changed is None else {"changed": first.changed}),
        "ms": outcome.ms,
        "cache": dict(first.painting.cache),
        "warnings": outcome.warnings,
    }
    seeds = [str(made.painting.seed) for made in outcome.made]
    if len(locations) == 1:
        line = {**locations[0], "seed": seeds[0], **common}
    else:
        cells = zip("ABCD", locations, seeds, strict=False)
        line = {"images": [{"label": label, **where, "seed": seed} for label, where, seed in cells], **common}
    blocks: list[ContentBlock] = [text(line)]
    if show == "inline":
        blocks.append(_preview([made.image for made in outcome.made]))
    if show != "none":
        blocks += [resource_link(made.record) for made in outcome.made]
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


def _preview(images: Sequence[Any]) -> ImageContent:
    from klein_mcp.images.preview import contact_sheet, preview

    return image_block(*preview(images[0] if len(images) == 1 else contact_sheet(images)))
