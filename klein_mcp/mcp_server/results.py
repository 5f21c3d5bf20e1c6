"""Tool results with images: a JSON line, one preview, links.

No structuredContent: several clients drop the image where there is any.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mcp_types import Annotations, CallToolResult, ContentBlock, ImageContent, ResourceLink, TextContent

from engine.contract import EngineError
from klein_mcp.errors import RequestAction, RequestError, explain, one_line, request_error_line
from klein_mcp.images.library import Record, Store
from klein_mcp.jobs.context import CallContext

if TYPE_CHECKING:
    from klein_mcp.jobs.results import JobResult, PendingJob, SavedImage

MIME = "image/png"


def transparent(viewed_on: str) -> str:
    """Name the colour on which a preview shows a transparent image.

    An agent would take a white behind it for the image's own.
    """
    return f"transparent; the preview shows it on plain {viewed_on or 'colour'}"


def tool_result(result: "JobResult", store: Store, show: str, call: CallContext) -> CallToolResult:
    """Return the result of generate, edit and compose. Blocking."""
    records = [store.get(image.handle) for image in result.images]
    entries = [
        _entry(image, location(store, record, call)) for image, record in zip(result.images, records, strict=True)
    ]
    warnings = {"warnings": shortened(result.warnings)} if result.warnings else {}
    if len(entries) == 1:
        image, *rest = entries[0].items()
        line = dict([image]) | warnings | dict(rest)
    else:
        # All images of a sheet have one prompt, which is read in one way.
        read_as = {"read_as": one_line(result.images[0].read_as)} if result.images[0].read_as else {}
        cells = [
            {"label": label, **{name: value for name, value in entry.items() if name != "read_as"}}
            for label, entry in zip("ABCD", entries, strict=False)
        ]
        # Clients that look alike are refused `last`, and so it is not offered to them.
        last = {} if call.shared else {"last": records[-1].handle}
        line = {"images": cells, **warnings, **read_as, **last}
    blocks: list[ContentBlock] = [text(line)]
    if show == "inline" and result.preview:
        blocks.append(ImageContent(type="image", data=result.preview.base64, mime_type=result.preview.mime))
    if show != "none":
        blocks += [resource_link(record) for record in records]
    return CallToolResult(content=blocks)


def _entry(image: "SavedImage", where: Mapping[str, str]) -> dict[str, Any]:
    """Return what an agent acts on, the most important first.

    The rest is in the recipe resource.
    """
    return {
        "image": image.handle,
        **({"background": transparent(image.viewed_on), "alpha": image.alpha} if image.alpha else {}),
        **({"changed": image.changed} if image.changed else {}),
        **({"read_as": one_line(image.read_as)} if image.read_as else {}),
        "seed": str(image.seed),
        "size": [image.width, image.height],
        **{name: value for name, value in where.items() if name != "image"},
    }


def shortened(warnings: Sequence[str]) -> list[str]:
    """Return the warnings, each of the length that an error may have."""
    return [one_line(warning) for warning in warnings]


SENTENCES: Mapping[RequestAction, str] = {
    "list": "list_images shows {shows}.",
    "view": "view_image shows {shows}.",
    "wait": "wait_for_job returns {shows}.",
    "make": "Generate one, wait_for_job for one that is being made, or name a handle; list_images shows them.",
    "repaint": 'edit_image with prompt "remove the background" and background "transparent" does it by painting.',
}
"""The next step after an error, as a tool."""


def error_line(error: EngineError | RequestError) -> str:
    """Return an error in one line, its next step as a tool."""
    return explain(error) if isinstance(error, EngineError) else request_error_line(error, SENTENCES)


def pending_result(pending: "PendingJob") -> CallToolResult:
    """Return the state of a job that goes on without this call."""
    following = {"warnings": shortened(pending.warnings), "next": f'wait_for_job with job "{pending.job}"'}
    return CallToolResult(content=[text({**asdict(pending), **following})])


def location(store: Store, record: Record, call: CallContext) -> dict[str, str]:
    """Return an image's handle with its path, or URL for remote clients."""
    at = {"path": str(store.readable_path(record))} if call.link is None else {"url": call.link(record.handle)}
    return {"image": record.handle, **at}


def uri(handle: str) -> str:
    return f"klein://images/{handle}"


def text(metadata: Mapping[str, Any]) -> TextContent:
    """Return one line of compact JSON."""
    return TextContent(type="text", text=json.dumps(metadata, ensure_ascii=False, separators=(",", ":")))


def with_warning(result: CallToolResult, warning: str) -> CallToolResult:
    """Add a warning to the JSON line of a result."""
    first, *others = result.content
    if not isinstance(first, TextContent):
        return result
    metadata = json.loads(first.text)
    metadata["warnings"] = [*metadata.get("warnings", ()), one_line(warning)]
    return result.model_copy(update={"content": [text(metadata), *others]})


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
