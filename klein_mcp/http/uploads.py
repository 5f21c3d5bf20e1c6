"""POST /upload: gives a client's image file a handle."""

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from klein_mcp.errors import RequestError
from klein_mcp.http.surface import HttpContext, Surface, error_line, json_error, status_of
from klein_mcp.limits import MAX_FILE_BYTES
from klein_mcp.mcp_server.results import uri
from klein_mcp.mcp_server.sender import http_client


def surface(context: HttpContext) -> Surface:
    service = context.service

    async def upload(request: Request) -> Response:
        """Import the request's body and respond with {"image": handle, …}."""
        if request.headers.get("content-type", "").startswith("multipart/form-data"):
            return json_error(415, "The upload is a form; send the file itself as the body: curl --data-binary @FILE.")
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_FILE_BYTES:
                return json_error(413, f"More than {MAX_FILE_BYTES // 2**20} MiB; send a smaller copy.")
        client = http_client(request)
        try:
            kept = await anyio.to_thread.run_sync(lambda: service.sources.add(bytes(body), "The upload", client))
        except RequestError as exc:
            return json_error(status_of(exc), error_line(exc))
        record = kept.record
        if kept.new:
            await context.server.subscriptions.image_added(uri(record.handle))
        payload = {"image": record.handle, "uri": uri(record.handle), "width": record.width, "height": record.height}
        return JSONResponse({**payload, "warnings": kept.warnings})

    return Surface("uploads", [Route("/upload", upload, methods=["POST"])], "token")
