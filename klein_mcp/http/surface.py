"""A surface: HTTP routes that belong together, and their kind of authorisation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute

from klein_mcp.errors import Refused, RequestAction, RequestError, ServerFault, request_error_line
from klein_mcp.http.sessions import Sessions
from klein_mcp.http.signed_urls import SignedUrls
from klein_mcp.images.schema import LibraryBusy
from klein_mcp.jobs.service import Service
from klein_mcp.mcp_server.server import KleinServer

Auth = Literal["token", "signed", "session", "none"]
"""token: the server's bearer token, where it has one. signed: a URL that SignedUrls made.
session: the cookie of a browser that followed a one-time link, or the token. none: nothing."""


def status_of(error: RequestError) -> int:
    """Return the status of an error, which says whose fault it is."""
    match error:
        case LibraryBusy():
            return 503  # the same call may succeed later
        case ServerFault():
            return 500
        case Refused():
            return 403
    return 400


SENTENCES: Mapping[RequestAction, str] = {
    "list": "klein-mcp studio shows {shows}.",
    "view": "klein-mcp studio shows {shows}.",
    "wait": "klein-mcp studio shows {shows}.",
    "make": "Generate one, or name a handle; klein-mcp studio shows them.",
    "repaint": 'An edit with prompt "remove the background" and background "transparent" does it by painting.',
}
"""The next step after an error, for callers who have neither tools nor a terminal."""


def error_line(error: RequestError) -> str:
    """Return an error in one line, its next step as the studio."""
    return request_error_line(error, SENTENCES)


def json_error(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status)


@dataclass(frozen=True, slots=True)
class Surface:
    """One row of the HTTP server.

    error: makes the response where a request is refused, in the shape that this surface's clients read.
    any_host: also answer requests whose Host header is not one of ours.
    cross_origin: pages of the origins in `KLEIN_CORS` may call it.
    """

    name: str
    routes: Sequence[BaseRoute]
    auth: Auth
    error: Callable[[int, str], Response] = json_error
    any_host: bool = False
    cross_origin: bool = False


@dataclass(frozen=True, slots=True)
class HttpContext:
    """The parts of one HTTP server that surfaces share."""

    service: Service
    server: KleinServer
    urls: SignedUrls
    sessions: Sessions


SurfaceFactory = Callable[[HttpContext], Surface]
