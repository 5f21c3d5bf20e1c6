"""/images/{handle}.png: the full image behind a signed, expiring link."""

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from klein_mcp.errors import RequestError
from klein_mcp.http.surface import HttpContext, Surface, json_error
from klein_mcp.mcp_server.results import MIME


def surface(context: HttpContext) -> Surface:
    service = context.service

    async def download(request: Request) -> Response:
        handle = request.path_params["handle"]
        try:
            path = await anyio.to_thread.run_sync(lambda: service.store.path(service.store.get(handle)))
        except RequestError as exc:
            return json_error(404, str(exc))
        headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private, max-age=3600"}
        return FileResponse(path, media_type=MIME, headers=headers)

    return Surface("downloads", [Route("/images/{handle:str}.png", download, methods=["GET"])], "signed")
