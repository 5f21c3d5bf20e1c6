"""/mcp/server-card describes this server to clients before they connect (SEP-2127)."""

import json

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from klein_mcp import __version__
from klein_mcp.http.surface import HttpContext, Surface
from klein_mcp.mcp_server import icon

MEDIA_TYPE = "application/mcp-server-card+json"
_HEADERS = {
    "Access-Control-Allow-Origin": "*",
    "Cache-Control": "public, max-age=3600",
    "X-Content-Type-Options": "nosniff",
}


def surface(context: HttpContext) -> Surface:
    # It tells nothing that the package index does not, so it needs no token.
    return Surface("card", [Route("/mcp/server-card", _card, methods=["GET"])], "none")


async def _card(request: Request) -> Response:
    card = {
        "$schema": "https://static.modelcontextprotocol.io/schemas/v1/server-card.schema.json",
        "name": "io.github.klein-mcp/klein-mcp",
        "title": "klein-mcp",
        "version": __version__,
        "description": "Generate, edit and compose images with FLUX.2 [klein] on your own machine.",
        "icons": [{"src": icon.DATA_URI, "mimeType": icon.MEDIA_TYPE, "sizes": ["any"]}],
        "repository": {"url": "https://github.com/klein-mcp/klein-mcp", "source": "github"},
        "remotes": [{"type": "streamable-http", "url": f"{request.url.scheme}://{request.headers['host']}/mcp"}],
    }
    return Response(json.dumps(card), media_type=MEDIA_TYPE, headers=_HEADERS)
