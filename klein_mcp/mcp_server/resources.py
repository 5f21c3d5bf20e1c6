"""Pictures as MCP resources: the list, each picture, its preview, its recipe; and who is told when one is new."""

import json
from typing import Any
from weakref import WeakKeyDictionary

import anyio
import anyio.to_thread
from mcp.server.lowlevel.helper_types import ReadResourceContents
from mcp.server.mcpserver.exceptions import ResourceNotFoundError
from mcp.server.subscriptions import ResourcesListChanged, ResourceUpdated, SubscriptionBus
from mcp_types import Annotations, EmptyResult, Resource, ResourceTemplate

from klein_mcp.errors import RequestError, one_line
from klein_mcp.images.library import Record
from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.service import Service
from klein_mcp.mcp_server import results

LISTED = 50
"""Newest pictures that resources/list and klein://images name; list_images pages through all."""

FITS = 730_000
"""Bytes: as base64, with its envelope, below the 1,000,000 that a message may have."""

TOLD_WITHIN = 1.0
"""Seconds a legacy connection has to take a notification."""

ALL = "klein://images"
_TEMPLATES = (
    ("{handle}", "image", "image/png", "The full picture, or the largest rendition that fits into a message."),
    ("{handle}/preview", "preview", "image/jpeg", "A small rendition."),
    ("{handle}/recipe", "recipe", "application/json", "How it was made: prompt, seed, model, parents."),
)


def listed(service: Service) -> list[Resource]:
    """Blocking."""
    page, _ = service.store.search(limit=LISTED)
    everything = Resource(
        uri=ALL, name="images", title="All images", description="The newest pictures.", mime_type="application/json"
    )
    return [everything, *(_entry(record) for record in page)]


def templates() -> list[ResourceTemplate]:
    return [
        ResourceTemplate(uri_template=f"{ALL}/{path}", name=name, mime_type=mime, description=description)
        for path, name, mime, description in _TEMPLATES
    ]


async def read(service: Service, uri: str, call: CallContext) -> list[ReadResourceContents]:
    """Raises ResourceNotFoundError."""

    def work() -> list[ReadResourceContents]:
        if uri == ALL:
            page, _ = service.store.search(limit=LISTED)
            return [_json([{"image": record.handle, **_facts(record)} for record in page])]
        handle, _, part = uri.removeprefix(f"{ALL}/").partition("/")
        record = service.store.get(handle)
        if part == "":
            return _picture(service, record, call)
        if part == "preview":
            return [_preview(service, record)]
        if part == "recipe":
            return [_json({**record.recipe, **_facts(record)})]
        raise RequestError(f"{uri} is no resource.", hint="There are image, image/preview and image/recipe.")

    try:
        return await anyio.to_thread.run_sync(work)
    except RequestError as problem:
        raise ResourceNotFoundError(str(problem)) from None


def _entry(record: Record) -> Resource:
    return Resource(
        uri=results.uri(record.handle),
        name=f"{record.handle}.png",
        title=one_line(record.prompt or record.source or record.handle, 80),
        mime_type=results.MIME,
        size=record.bytes,
        annotations=Annotations(audience=["user"]),
    )


def _facts(record: Record) -> dict[str, Any]:
    return {
        "prompt": record.prompt,
        "source": record.source,
        "width": record.width,
        "height": record.height,
        "parents": record.parents,
        "seed": record.recipe.get("seed"),
    }


def _picture(service: Service, record: Record, call: CallContext) -> list[ReadResourceContents]:
    data = service.store.read(record)
    if len(data) <= FITS:
        return [ReadResourceContents(data, results.MIME)]
    from klein_mcp.images import codec, preview

    image = codec.decode(data, record.handle).image
    longest = max(record.width, record.height)
    smaller, mime = preview.preview(image, longest=longest, aim=FITS, most=FITS)
    place = results.place(service.store, record, call)
    exact = {"note": f"A rendition of {len(data)} bytes; the exact picture is elsewhere.", **place}
    return [ReadResourceContents(smaller, mime), _json(exact)]


def _preview(service: Service, record: Record) -> ReadResourceContents:
    from klein_mcp.images import codec, preview

    return ReadResourceContents(*preview.preview(codec.decode(service.store.read(record), record.handle).image))


def _json(value: Any) -> ReadResourceContents:
    return ReadResourceContents(json.dumps(value, ensure_ascii=False, separators=(",", ":")), "application/json")


class ResourceSubscriptions:
    """Whoever wants to hear of new pictures, in both eras of the protocol.

    Modern clients listen on the bus. Of legacy ones the SDK keeps no list, so we do: every connection that ever asked
    something hears that the list changed, and of the addresses it subscribed to.
    """

    def __init__(self, bus: SubscriptionBus) -> None:
        self._bus = bus
        self._legacy: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()

    async def remember(self, ctx: Any, call_next: Any) -> Any:
        """Middleware."""
        # Connection is what a legacy notification goes to outside a request; the session has no public name for it.
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

    async def painted(self, uri: str) -> None:
        """A picture is new under `uri`, so the list is another."""
        await self._bus.publish(ResourcesListChanged())
        for changed in (ALL, uri):
            await self._bus.publish(ResourceUpdated(uri=changed))
        for connection, subscribed in list(self._legacy.items()):
            # Whoever does not read any more must not hold up the one who painted.
            with anyio.move_on_after(TOLD_WITHIN):
                await connection.send_resource_list_changed()
                for changed in subscribed & {ALL, uri}:
                    await connection.send_resource_updated(changed)
