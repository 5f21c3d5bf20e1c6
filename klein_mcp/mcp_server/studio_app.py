"""The studio as an MCP App: a ui:// resource and one tool.

Clients that do not declare the extension are shown neither.
"""

from contextvars import ContextVar
from importlib import resources
from typing import Any

import anyio.to_thread
from mcp.server.apps import APP_MIME_TYPE, EXTENSION_ID, client_supports_apps
from mcp.server.extension import Extension
from mcp.server.lowlevel.helper_types import ReadResourceContents
from mcp_types import CallToolResult, Resource
from mcp_types import Tool as Listed

from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.service import Service
from klein_mcp.mcp_server import results
from klein_mcp.mcp_server.tools import fields
from klein_mcp.mcp_server.tools.tool import Tool
from klein_mcp.studio import picks

URI = "ui://klein/studio.html"

SHOWN_BY = frozenset(
    {"generate_image", "edit_image", "compose_references", "view_image", "list_images", "wait_for_job"}
)
"""Tools whose result the page shows."""

NAME_IMAGES = SHOWN_BY | {"save_image"}
"""Tools whose call may mean a picked image by `last`."""

FROM_VIEW = "klein-mcp/view"
"""Key in the `_meta` of the page's own calls: the person knows their choice, the agent has yet to hear of it.

Its value is true where the person asked, "agent" where the page goes on with a call of the agent's.
"""

# No domains: the page loads nothing. The field is written out, as a host may treat a missing one in its own way.
_UI: dict[str, Any] = {"csp": {}, "prefersBorder": False}

_supported: ContextVar[bool] = ContextVar("client_supports_apps", default=False)


class StudioApp(Extension):
    """Declares the extension, and notes of each request whether its client does."""

    identifier = EXTENSION_ID


async def note_support(ctx: Any, call_next: Any) -> Any:
    """Middleware: remember for this request whether its client shows MCP Apps."""
    token = _supported.set(client_supports_apps(ctx))
    try:
        return await call_next(ctx)
    finally:
        _supported.reset(token)


def supported() -> bool:
    """Return whether the client of this request shows MCP Apps."""
    return _supported.get()


def with_page(tool: Listed) -> Listed:
    """Bind a tool to the page, in both spellings of the metadata."""
    if tool.name not in SHOWN_BY:
        return tool
    meta = {**(tool.meta or {}), "ui": {"resourceUri": URI}, "ui/resourceUri": URI}
    return tool.model_copy(update={"meta": meta})


def listed() -> Resource:
    return Resource(
        uri=URI,
        name="studio",
        title="Studio",
        description="Shows images, their family and the work in progress.",
        mime_type=APP_MIME_TYPE,
        _meta={"ui": _UI},
    )


async def read() -> list[ReadResourceContents]:
    """Return the page."""
    html = await anyio.to_thread.run_sync(page)
    # Hosts look for the policy on the content item first.
    return [ReadResourceContents(html, APP_MIME_TYPE, {"ui": _UI})]


def page() -> str:
    return (resources.files("klein_mcp.studio") / "studio.html").read_text(encoding="utf-8")


class PickImage(fields.Arguments):
    """Arguments without descriptions, since no model reads them."""

    image: str
    mask: str | None = None


async def _run(service: Service, call: CallContext, asked: PickImage) -> CallToolResult:
    image = (await service.open(asked.image, call)).record
    mask = (await service.open(asked.mask, call, reading="mask")).record if asked.mask else None

    def work() -> None:
        client = picks.agent_for(service.store, image, call.client)
        service.store.picks.choose(client, image.handle, mask.handle if mask else None)

    await anyio.to_thread.run_sync(work)
    picked = {"image": image.handle, **({"mask": mask.handle} if mask else {})}
    return CallToolResult(content=[results.text({"picked": picked})])


PICK = Tool(
    name="pick",
    title="Pick an image",
    description="For the studio page.",
    arguments=PickImage,
    run=_run,
    idempotent=True,
    meta={"ui": {"resourceUri": URI, "visibility": ["app"]}},
)
