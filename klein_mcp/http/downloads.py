"""/images/{handle}.png: the full image behind a signed, expiring link.

Also .jpeg and .webp, for callers of the OpenAI API that asked for these.
"""

from collections.abc import Awaitable, Callable

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from klein_mcp.errors import RequestError, UnknownImage
from klein_mcp.http import render
from klein_mcp.http.surface import HttpContext, Surface, error_line, json_error, status_of
from klein_mcp.images.outputs import FORMATS, Format
from klein_mcp.jobs.service import Service

OPAQUE_LINK = "&background=opaque"
"""Added to a link that leads to the image on white. Not signed: whoever has the link may see the image as it is."""

HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private, max-age=3600", "Vary": "Origin"}
"""Vary: what a page shows may be fetched by its script next, and a cached answer would lack the headers for that."""


def surface(context: HttpContext) -> Surface:
    routes = [Route(f"/images/{{handle:str}}.{kind}", download_handler(context.service, kind)) for kind in FORMATS]
    return Surface("downloads", routes, "signed", cross_origin=True)


def download_handler(service: Service, kind: Format) -> Callable[[Request], Awaitable[Response]]:
    """Return the handler of one format. It signs where settings say so."""

    async def download(request: Request) -> Response:
        handle, opaque = request.path_params["handle"], request.query_params.get("background") == "opaque"
        try:
            if kind == "png" and service.settings.credentials == "off" and not opaque:
                path = await anyio.to_thread.run_sync(lambda: service.store.path(service.store.get(handle)))
                return FileResponse(path, media_type="image/png", headers=HEADERS)
            data = await anyio.to_thread.run_sync(lambda: render.outgoing(service, handle, kind, opaque=opaque))
        except UnknownImage as exc:
            return json_error(404, error_line(exc))
        except RequestError as exc:  # the link is good, and the library or a setting is not
            return json_error(status_of(exc), error_line(exc))
        return Response(data, media_type=f"image/{kind}", headers=HEADERS)

    return download
