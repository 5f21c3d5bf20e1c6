"""/mcp and /sse: Streamable HTTP of both eras, and the older transport."""

import re

from mcp.server.transport_security import TransportSecuritySettings
from starlette.routing import BaseRoute, Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from klein_mcp.http.surface import HttpContext, Surface
from klein_mcp.mcp_server.stdin_messages import read_message

CHECKED_BEFORE = TransportSecuritySettings(enable_dns_rebinding_protection=False)
"""AuthMiddleware has checked Host and Origin already."""

MOST_REPAIRED = 4 * 2**20
"""Bytes of a message: the SDK refuses longer ones."""

_HALF = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)
"""Half an emoji, as JSON.stringify writes one that was cut. The SDK's parser refuses the whole message."""


def surface(context: HttpContext) -> Surface:
    streamable = context.server.streamable_http_app(transport_security=CHECKED_BEFORE)
    sse = context.server.sse_app(transport_security=CHECKED_BEFORE)
    return Surface("mcp", [_repairing(route) for route in (*streamable.routes, *sse.routes)], "token")


def _repairing(route: BaseRoute) -> BaseRoute:
    """Let a route repair the messages that are posted to it."""
    if isinstance(route, Route | Mount):
        route.app = _Repairing(route.app)
    return route


class _Repairing:
    """Repairs messages as the stdio server does."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, _repaired(receive) if scope.get("method") == "POST" else receive, send)


def _repaired(receive: Receive) -> Receive:
    """Return `receive` with the whole body as its first message."""
    began = False

    async def receive_repaired() -> Message:
        nonlocal began
        if began:
            return await receive()
        began, body, more = True, bytearray(), True
        while more and len(body) <= MOST_REPAIRED:
            message = await receive()
            if message["type"] != "http.request":
                return message
            body += message.get("body", b"")
            more = message.get("more_body", False)
        repaired = read_message(bytes(body)) if not more and _HALF.search(body) else None
        return {
            "type": "http.request",
            "body": repaired.encode() if isinstance(repaired, str) else bytes(body),
            "more_body": more,
        }

    return receive_repaired
