"""Authorisation in one middleware: host names, origins, token, signed links, sessions."""

import base64
import contextlib
import hmac
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mcp.server.transport_security import TransportSecurityMiddleware, TransportSecuritySettings
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

from klein_mcp import atomic
from klein_mcp.errors import RequestError, quote
from klein_mcp.http import cors
from klein_mcp.http.sessions import Sessions
from klein_mcp.http.signed_urls import SignedUrls
from klein_mcp.http.surface import Surface
from klein_mcp.private import read_token

UNKNOWN = Surface("unknown", (), "token")
"""Paths that no surface has: without the token, nobody learns which exist."""


class AuthMiddleware:
    """Checks Host and Origin, then what the surface of the path demands."""

    def __init__(
        self,
        app: ASGIApp,
        surfaces: Sequence[Surface],
        security: TransportSecuritySettings,
        token: str | None,
        urls: SignedUrls,
        sessions: Sessions,
        origins: Sequence[str] = (),
    ) -> None:
        """origins: pages that may call surfaces with `cross_origin`."""
        self._app = app
        self._surfaces = surfaces
        self._headers = TransportSecurityMiddleware(security)
        self._token = token
        self._urls = urls
        self._sessions = sessions
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request, surface = Request(scope), self._surface(scope)
        cross_origin = surface.cross_origin and cors.is_allowed(request, self._origins)
        answer = await self._wrong_headers(request, surface, cross_origin)
        if cross_origin and not answer:
            answer, send = cors.preflight(request), cors.exposing(send, request)
        answer = answer or self._refusal(request, surface)
        await (answer or self._app)(scope, receive, send)

    async def _wrong_headers(self, request: Request, surface: Surface, cross_origin: bool) -> Response | None:
        if surface.any_host:
            return None
        scope = _lower_names(request.scope)
        if cross_origin:
            scope["headers"] = [header for header in scope["headers"] if header[0] != b"origin"]
        refused = await self._headers.validate_request(Request(scope))
        return refused and surface.error(refused.status_code, _header_error(request, surface, refused.status_code))

    def _refusal(self, request: Request, surface: Surface) -> Response | None:
        if surface.auth == "signed" and not self._urls.allows(request):
            return surface.error(403, "This link is not valid, or no longer; view_image gives a new one.")
        if surface.auth == "session" and not (self._sessions.allows(request) or self._has_token(request)):
            return surface.error(401, "No session. Open the one-time link that `klein-mcp studio` prints.")
        if surface.auth == "token" and self._token is not None and not self._has_token(request):
            refused = surface.error(401, 'Wrong or missing token. Send the server\'s as "Authorization: Bearer TOKEN".')
            # No resource_metadata: it would send clients to look for an authorization server that does not exist.
            refused.headers["WWW-Authenticate"] = "Bearer"
            return refused
        return None

    def _surface(self, scope: Scope) -> Surface:
        """Return the surface whose route the router will choose.

        That is the first full match, else the first partial one (a wrong method).
        """
        partial = UNKNOWN
        for surface in self._surfaces:
            for route in surface.routes:
                match, _ = route.matches(scope)
                if match == Match.FULL:
                    return surface
                if match == Match.PARTIAL and partial is UNKNOWN:
                    partial = surface
        return partial

    def _has_token(self, request: Request) -> bool:
        given = _given_token(request.headers.get("authorization", ""))
        return self._token is not None and hmac.compare_digest(given.encode(), self._token.encode())


def _header_error(request: Request, surface: Surface, status: int) -> str:
    """Name a refused Host or Origin, and the setting that allows it."""
    if status == 421:
        return f"No server is called {quote(request.headers.get('host', ''))} here; serve --allowed-host adds a name."
    hint = "; KLEIN_CORS names those that may" if surface.cross_origin else ""
    return f"Pages of {quote(request.headers.get('origin', ''))} may not call this server{hint}."


def _given_token(authorization: str) -> str:
    """Return a bearer token, or the password that A1111's clients send."""
    scheme, _, given = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return given.strip()
    if scheme.lower() == "basic":
        with contextlib.suppress(ValueError):
            return base64.b64decode(given).decode().partition(":")[2]
    return ""


def _lower_names(scope: Scope) -> dict[str, Any]:
    """Return the scope with Host and Origin in lower case."""
    headers = [(name, value.lower() if name in (b"host", b"origin") else value) for name, value in scope["headers"]]
    return {**scope, "headers": headers}


def transport_security(hosts: Sequence[str]) -> TransportSecuritySettings:
    """Return the accepted Host and Origin headers.

    A page of another site must not reach us through its visitor's browser.
    """
    names = ["127.0.0.1", "localhost", "[::1]", *map(str.lower, hosts)]
    known = [*names, *(f"{name}:*" for name in names)]
    origins = [f"{scheme}://{name}" for scheme in ("http", "https") for name in known]
    return TransportSecuritySettings(allowed_hosts=known, allowed_origins=origins)


def make_token(path: Path) -> str:
    """Return the token kept in `path`, made on first use."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists():
        # Atomic: an empty file would be a token that everybody has.
        atomic.atomic_write(path, secrets.token_urlsafe(32) + "\n")
    print(f"clients must send the token in {path}", file=sys.stderr)
    return server_token(path, "Delete it, and a new one is made.")


def server_token(path: Path, hint: str) -> str:
    """Return the token in a file. Raises RequestError."""
    try:
        return read_token(path)
    except (OSError, ValueError) as exc:
        reason = getattr(exc, "strerror", None) or ("it is no text" if isinstance(exc, UnicodeError) else exc)
        raise RequestError(f"The token file {path} cannot be used: {reason}.", hint=hint) from None
