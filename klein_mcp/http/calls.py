"""Imports the images of HTTP calls and follows their jobs."""

import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

import anyio.to_thread
from starlette.requests import Request

from klein_mcp.errors import BadImage, RequestError
from klein_mcp.http.surface import HttpContext
from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.events import Cancelled, Failed, ImageSaved, JobEvent, Listen
from klein_mcp.jobs.request import ImageRequest
from klein_mcp.jobs.service import Service
from klein_mcp.mcp_server.results import uri
from klein_mcp.mcp_server.sender import http_client

if TYPE_CHECKING:
    from klein_mcp.images.resolver import Reading, ResolvedImage

REFERENCE = re.compile(r"data:|https?://|klein://|[a-z0-9]{6}$", re.IGNORECASE)
"""References that a body may name: never a path of this machine, which only MCP clients may read."""


def call_context(http: HttpContext, request: Request, surface: str) -> CallContext:
    """Identify the sender as a client of one surface.

    An agent that sends the same token over MCP keeps its own `last`.
    """
    return CallContext(client=f"{surface}-{http_client(request)}", on_new_image=http.server.subscriptions.image_added)


async def import_image(
    http: HttpContext, image: bytes | str, name: str, call: CallContext, *, mask: bool = False
) -> "ResolvedImage":
    """Import a file or a referenced image. Raises RequestError.

    name: of the image in errors. An image that came from here is recognised by its pixels. mask: transparent pixels
    may change, else white ones.
    """
    if isinstance(image, str):
        image = http.urls.handle_of(image) or image.strip()
        if not REFERENCE.match(image):
            raise RequestError(f"{name} is not a URL.", hint="Send a file, a data: URL, an https: URL or a handle.")
    reading: Reading = "alpha mask" if mask else "image"

    def resolve() -> "ResolvedImage":
        resolver = http.service.sources  # in this thread: opening the library may take seconds
        if isinstance(image, str) and image[:5].lower() != "data:":
            return resolver.open(image, call.client, reading=reading)
        return resolver.add(to_bytes(image, name), name, call.client, reading=reading)

    opened = await anyio.to_thread.run_sync(resolve)
    if opened.new:
        await call.on_new_image(uri(opened.record.handle))
    return opened


def to_bytes(file: bytes | str, name: str) -> bytes:
    """Return a file's bytes, also of a data URL. Raises BadImage."""
    from klein_mcp.images.resolver import decode_data_url

    if isinstance(file, bytes):
        return file
    try:
        return decode_data_url(file)
    except BadImage as exc:  # its hint is for those whose paths are read
        raise BadImage(f"{name} cannot be decoded: {exc.message}") from None


async def follow(
    service: Service, request: ImageRequest, call: CallContext, listen: Listen
) -> AsyncGenerator[JobEvent]:
    """Run a job and yield its events. Closing the iterator cancels it.

    Raises EngineError or RequestError.
    """
    resolved = await service.resolve(request, call)
    async with aclosing(service.jobs.run(resolved, client=call.client, listen=listen)) as events:
        async for event in events:
            match event:
                case Failed(error):
                    raise error
                case Cancelled():
                    raise RequestError("The job was cancelled.", hint="Send it again to start it anew.")
                case ImageSaved(saved=saved):
                    await call.on_new_image(uri(saved.handle))
            yield event
