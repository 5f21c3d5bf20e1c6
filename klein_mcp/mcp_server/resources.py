"""Images as MCP resources, and subscriptions to new ones."""

import json
from typing import Any
from weakref import WeakKeyDictionary

import anyio
import anyio.to_thread
from mcp.server.lowlevel.helper_types import ReadResourceContents
from mcp.server.subscriptions import ResourcesListChanged, ResourceUpdated, SubscriptionBus
from mcp_types import Annotations, EmptyResult, Resource, ResourceTemplate

from klein_mcp.errors import RequestError, one_line
from klein_mcp.images.library import Record
from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.service import Service
from klein_mcp.mcp_server import results

LISTED = 50
"""Newest images that resources/list and klein://images name; list_images pages through all."""

MAX_BYTES = 730_000
"""As base64, with its envelope, below the 1,000,000 bytes that a message may have."""

NOTIFY_TIMEOUT = 1.0
"""Seconds a legacy connection has to accept a notification."""

ALL = "klein://images"
_TEMPLATES = (
    ("{handle}", "image", "image/png", "The full image, or the largest rendition that fits into a message."),
    ("{handle}/preview", "preview", "image/jpeg", "A small rendition."),
    (
        "{handle}/changes",
        "changes",
        "image/png",
        "Of an edit: white where it was painted, black where nothing changed.",
    ),
    ("{handle}/recipe", "recipe", "application/json", "How it was made: prompt, seed, model, parents."),
)


def listed(service: Service) -> list[Resource]:
    """Return the list and one entry per recent image. Blocking."""
    page, _ = service.store.search(limit=LISTED)
    everything = Resource(
        uri=ALL, name="images", title="All images", description="The newest images.", mime_type="application/json"
    )
    return [everything, *(_entry(record) for record in page)]


def templates() -> list[ResourceTemplate]:
    return [
        ResourceTemplate(uri_template=f"{ALL}/{path}", name=name, mime_type=mime, description=description)
        for path, name, mime, description in _TEMPLATES
    ]


async def read(service: Service, uri: str, call: CallContext) -> list[ReadResourceContents]:
    """Return the contents of a klein://images address. Raises RequestError."""

    def work() -> list[ReadResourceContents]:
        if uri == ALL:
            page, _ = service.store.search(limit=LISTED)
            return [_json([{"image": record.handle, **_metadata(record)} for record in page])]
        handle, _, part = uri.removeprefix(f"{ALL}/").partition("/")
        record = service.store.get(handle)
        if part == "":
            return _full_image(service, record, call)
        if part == "preview":
            return [_preview(service, record)]
        if part == "thumb":
            return [_thumb(service, record)]
        if part == "details":
            from klein_mcp.studio import views

            return [_json(views.image_details(service.store, handle))]
        if part == "recipe":
            return [_json({**record.recipe, **_metadata(record)})]
        if part == "changes":
            return [_changes(service, record)]
        raise RequestError(
            f"{uri} is not a resource.", hint="There are HANDLE, HANDLE/preview, HANDLE/changes and HANDLE/recipe."
        )

    return await anyio.to_thread.run_sync(work)


def _entry(record: Record) -> Resource:
    return Resource(
        uri=results.uri(record.handle),
        name=f"{record.handle}.png",
        title=one_line(record.prompt or record.source or record.handle, 80),
        mime_type=results.MIME,
        size=record.bytes,
        annotations=Annotations(audience=["user"]),
    )


def _metadata(record: Record) -> dict[str, Any]:
    return {
        "prompt": record.prompt,
        "source": record.source,
        "width": record.width,
        "height": record.height,
        "parents": record.parents,
        "seed": record.recipe.get("seed"),
    }


def _full_image(service: Service, record: Record, call: CallContext) -> list[ReadResourceContents]:
    data = service.store.read(record)
    if len(data) <= MAX_BYTES:
        return [ReadResourceContents(data, results.MIME)]
    longest = max(record.width, record.height)
    smaller, mime = _rendition(service, record, longest=longest, aim=MAX_BYTES, most=MAX_BYTES)
    note = f"A smaller rendition: the exact image has {len(data)} bytes."
    return [ReadResourceContents(smaller, mime), _json({"note": note, **results.location(service.store, record, call)})]


def _preview(service: Service, record: Record) -> ReadResourceContents:
    return ReadResourceContents(*_rendition(service, record))


def _rendition(service: Service, record: Record, **limits: int) -> tuple[bytes, str]:
    from klein_mcp.images import preview
    from klein_mcp.images.budget import DECODING

    return DECODING.run(record.area, lambda: preview.preview(service.sources.pixels(record), **limits))


def _thumb(service: Service, record: Record) -> ReadResourceContents:
    """Return a small rendition.

    They are cached, since the same page of them is read again and again.
    """
    from klein_mcp.images import preview
    from klein_mcp.images.budget import DECODING
    from klein_mcp.studio.views import THUMB_SIDE

    if (made := service.thumbs.get(record.file)) is None:
        made = DECODING.run(record.area, lambda: preview.thumbnail(service.sources.pixels(record), THUMB_SIDE))
        service.thumbs.add(record.file, made)
    return ReadResourceContents(*made)


def _changes(service: Service, record: Record) -> ReadResourceContents:
    try:
        return ReadResourceContents(service.store.files.changes_path(record.handle).read_bytes(), results.MIME)
    except OSError:
        raise RequestError(f"{record.handle} has no change mask: nothing of an original was kept in it.") from None


def _json(value: Any) -> ReadResourceContents:
    return ReadResourceContents(json.dumps(value, ensure_ascii=False, separators=(",", ":")), "application/json")


class ResourceSubscriptions:
    """Notifies clients of new images, in both eras of the protocol.

    Modern clients listen on the bus. The SDK keeps no list of legacy ones, so we do: every legacy connection is
    notified that the list changed, and of changes to the addresses it subscribed to.
    """

    def __init__(self, bus: SubscriptionBus) -> None:
        self._bus = bus
        self._legacy: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()

    async def remember(self, ctx: Any, call_next: Any) -> Any:
        """Middleware that registers each legacy connection."""
        # A legacy notification outside a request is sent on the connection; the session has no public name for it.
        connection = ctx.session._connection
        if connection.has_standalone_channel and ctx.method == "notifications/initialized":
            self._legacy.setdefault(connection, set())
        return await call_next(ctx)

    async def subscribe(self, context: Any, params: Any) -> EmptyResult:
        self._legacy.setdefault(context.session._connection, set()).add(str(params.uri))
        return EmptyResult()

    async def unsubscribe(self, context: Any, params: Any) -> EmptyResult:
        self._legacy.get(context.session._connection, set()).discard(str(params.uri))
        return EmptyResult()

    async def image_added(self, uri: str) -> None:
        """Notify subscribers that an image was added."""
        await self._bus.publish(ResourcesListChanged())
        for changed in (ALL, uri):
            await self._bus.publish(ResourceUpdated(uri=changed))
        for connection, subscribed in list(self._legacy.items()):
            # A client that no longer reads must not delay the call that made the image.
            with anyio.move_on_after(NOTIFY_TIMEOUT):
                await connection.send_resource_list_changed()
                for changed in subscribed & {ALL, uri}:
                    await connection.send_resource_updated(changed)
