"""Routes that only the holder of a token may call."""

import hmac
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

Handler = Callable[[Request], Awaitable[Response]]


def authorized(token: str, handler: Handler) -> Handler:
    """Return a handler that refuses whoever does not send `token`."""

    async def guarded(request: Request) -> Response:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), token.encode()):
            return JSONResponse({"error": "Wrong or missing token."}, 401)
        return await handler(request)

    return guarded
