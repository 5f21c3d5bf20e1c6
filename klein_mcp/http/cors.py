"""Cross-origin requests, from the origins that the settings name."""

from collections.abc import Sequence

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Send

MAX_AGE = 600
"""Seconds a browser may remember the answer to a preflight."""


def is_allowed(request: Request, origins: Sequence[str]) -> bool:
    """Return whether a page may call.

    origins: in lower case, as the settings have them.
    """
    return request.headers.get("origin", "").lower() in origins


def preflight(request: Request) -> Response | None:
    """Return the answer to a preflight request, None for any other."""
    if request.method != "OPTIONS" or "access-control-request-method" not in request.headers:
        return None
    headers = {
        "access-control-allow-methods": "GET, POST, OPTIONS",
        "access-control-allow-headers": request.headers.get("access-control-request-headers", ""),
        "access-control-max-age": str(MAX_AGE),
    }
    return Response(status_code=204, headers={**headers, **_allow(request)})


def exposing(send: Send, request: Request) -> Send:
    """Return `send` with the headers that let the page read the response."""

    async def with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=message["headers"])
            headers.update({**_allow(request), "access-control-expose-headers": "*"})
            headers.add_vary_header("origin")
        await send(message)

    return with_headers


def _allow(request: Request) -> dict[str, str]:
    # Never with credentials: a page of another origin must not use the studio's cookie.
    return {"access-control-allow-origin": request.headers["origin"]}
