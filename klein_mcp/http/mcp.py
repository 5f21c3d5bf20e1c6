"""/mcp and /sse: Streamable HTTP of both eras, and the older transport."""

from mcp.server.transport_security import TransportSecuritySettings

from klein_mcp.http.surface import HttpContext, Surface

CHECKED_BEFORE = TransportSecuritySettings(enable_dns_rebinding_protection=False)
"""AuthMiddleware has checked Host and Origin already."""


def surface(context: HttpContext) -> Surface:
    streamable = context.server.streamable_http_app(transport_security=CHECKED_BEFORE)
    sse = context.server.sse_app(transport_security=CHECKED_BEFORE)
    return Surface("mcp", [*streamable.routes, *sse.routes], "token")
