"""/images/{handle}.png: the full image behind a signed, expiring link."""

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from klein_mcp.errors import RequestError
from klein_mcp.http.surface import HttpContext, Surface, json_error
from klein_mcp.images import credentials
from klein_mcp.images.library import Record
from klein_mcp.mcp_server.results import MIME


def surface(context: HttpContext) -> Surface:
    service = context.service

    async def download(request: Request) -> Response:
        handle = request.path_params["handle"]
        headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private, max-age=3600"}
        try:
            record = await anyio.to_thread.run_sync(service.store.get, handle)
            if service.settings.credentials != "off":
                return Response(await anyio.to_thread.run_sync(signed, record), media_type=MIME, headers=headers)
            path = await anyio.to_thread.run_sync(service.store.path, record)
        except RequestError as exc:
            return json_error(404, str(exc))
        return FileResponse(path, media_type=MIME, headers=headers)

    def signed(record: Record) -> bytes:
        signer = credentials.from_setting(service.settings.credentials, service.settings.home)
        assert signer is not None
        return credentials.sign_record(service.store, record, service.store.read(record), MIME, signer)

    return Surface("downloads", [Route("/images/{handle:str}.png", download, methods=["GET"])], "signed")
