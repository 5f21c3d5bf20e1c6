"""The HTTP door: Streamable HTTP of both protocol eras at /mcp, legacy SSE at /sse, pictures, and who is let in.

TLS is the business of a reverse proxy in front of it.
"""

import hmac
import logging
import os
import secrets
import signal
import socket
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import uvicorn
from mcp.server.transport_security import TransportSecurityMiddleware, TransportSecuritySettings
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from klein_mcp import __version__, atomic
from klein_mcp.errors import RequestError
from klein_mcp.exit import leave
from klein_mcp.http import downloads
from klein_mcp.jobs.service import Service
from klein_mcp.mcp_server.server import KleinServer, create_server, http_client
from klein_mcp.settings import Settings, warn_of_misspelt

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SHORTEST_TOKEN = 16
"""Characters; what `serve` makes itself has 43."""

GRACE = 1
"""Seconds for open streams to end after a signal."""


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """What was typed. allowed_hosts: names by which clients reach us, each with or without a port."""

    host: str = "127.0.0.1"
    port: int = 8765
    token_file: Path | None = None
    allowed_hosts: tuple[str, ...] = ()

    @classmethod
    def of(cls, arguments: Namespace) -> "HttpOptions":
        """Raises ValueError for what could let strangers in."""
        options = cls(arguments.host, arguments.port, arguments.token_file, tuple(arguments.allowed_host))
        if not options.local and not options.allowed_hosts:
            raise ValueError(
                f"--host {options.host} can be reached from other machines: name with --allowed-host H"
                " how clients call this one."
            )
        return options

    @property
    def local(self) -> bool:
        return self.host in LOOPBACK


def run(settings: Settings, options: HttpOptions) -> NoReturn:
    """Serve until a signal, then end the process. Raises RequestError or OSError where it cannot begin."""
    from klein_mcp.daemon.client import DaemonBackend

    logging.basicConfig(
        level=settings.log_level.upper(), stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s"
    )
    warn_of_misspelt()
    token = _token(settings, options)
    listener = _bind(options)
    service = Service(settings, DaemonBackend(settings))
    links = downloads.SignedUrls()
    app = application(create_server(service, link=links.of), service, links, token=token, hosts=options.allowed_hosts)
    host = f"[{options.host}]" if ":" in options.host else options.host
    print(f"klein-mcp {__version__} serves http://{host}:{listener.getsockname()[1]}/mcp", file=sys.stderr, flush=True)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, timeout_graceful_shutdown=GRACE, server_header=False
    )
    # uvicorn raises the signal once more when it is done; by default that would end us before the library is closed.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    code: int = 0
    try:
        uvicorn.Server(config).run([listener])
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        service.close()
    leave(code)


def application(
    server: KleinServer,
    service: Service,
    links: downloads.SignedUrls,
    *,
    token: str | None = None,
    hosts: Sequence[str] = (),
) -> Starlette:
    """The ASGI application; without a token whoever reaches it is let in."""
    security = _security(hosts)
    streamable = server.streamable_http_app(transport_security=security)
    sse = server.sse_app(transport_security=security)
    routes = [
        *streamable.routes,
        *sse.routes,
        Route("/healthz", _healthz, methods=["GET"]),
        downloads.download(service, links),
        downloads.upload(service, http_client, server.listeners.painted),
    ]
    gate = Middleware(AuthMiddleware, security=security, token=token)
    return Starlette(routes=routes, middleware=[gate], lifespan=lambda app: server.session_manager.run())


class AuthMiddleware:
    """Nobody comes in by a name that is not ours, from a page that is not ours, or without the token."""

    def __init__(self, app: ASGIApp, security: TransportSecuritySettings, token: str | None) -> None:
        self._app = app
        self._names = TransportSecurityMiddleware(security)
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = await self._refusal(Request(scope)) if scope["type"] == "http" else None
        await (refusal or self._app)(scope, receive, send)

    async def _refusal(self, request: Request) -> Response | None:
        # Not request.url, part of which is what the Host header says it is.
        path = request.scope["path"]
        if path == "/healthz":
            return None  # a probe knows neither name nor token, and learns nothing
        if wrong := await self._names.validate_request(request):
            return wrong
        # A download link carries its own signature.
        if self._token is None or path.startswith("/images/"):
            return None
        scheme, _, shown = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(shown.strip().encode(), self._token.encode()):
            return None
        # No resource_metadata: it would send clients to look for an authorization server that does not exist.
        return JSONResponse({"error": "Wrong or missing token."}, 401, {"WWW-Authenticate": "Bearer"})


async def _healthz(request: Request) -> Response:
    return JSONResponse({"status": "ok", "version": __version__})


def _security(hosts: Sequence[str]) -> TransportSecuritySettings:
    """Host and Origin headers that may come in: a page on another site must not reach us through its visitor."""
    names = [*LOOPBACK[:2], "[::1]", *hosts]
    known = [*names, *(f"{name}:*" for name in names)]
    origins = [f"{scheme}://{name}" for scheme in ("http", "https") for name in known]
    return TransportSecuritySettings(allowed_hosts=known, allowed_origins=origins)


def _token(settings: Settings, options: HttpOptions) -> str | None:
    """What clients must send; None where only this machine can knock, unless a file says otherwise."""
    if options.token_file:
        return _read_token(options.token_file, "Without --token-file one is made for you.")
    # A name to be served under means a reverse proxy, and so strangers, even where we listen on loopback alone.
    if options.local and not set(options.allowed_hosts) - set(LOOPBACK):
        return None
    path = settings.home / "http-token"
    settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists():
        # Whole or not at all: an empty file would be a token that everybody has.
        atomic.write(path, secrets.token_urlsafe(32) + "\n")
    print(f"clients must send the token in {path}", file=sys.stderr)
    return _read_token(path, "Delete it, and a new one is made.")


def _read_token(path: Path, hint: str) -> str:
    try:
        token = path.read_text(encoding="utf-8").strip()
    except OSError as problem:
        raise RequestError(f"The token file {path} cannot be read: {problem.strerror}.", hint=hint) from None
    if len(token) < SHORTEST_TOKEN or not token.isascii() or len(token.split()) != 1:
        raise RequestError(f"{path} must hold one word of at least {SHORTEST_TOKEN} ASCII characters.", hint=hint)
    return token


def _bind(options: HttpOptions) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        options.host, options.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
    )[0]
    # The protocol is named so that asyncio switches Nagle's algorithm off.
    listener = socket.socket(family, kind, protocol)
    if os.name == "posix":
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as problem:
        listener.close()
        raise RequestError(
            f"Cannot listen on {options.host} port {options.port}: {problem.strerror}.", hint="Choose another --port."
        ) from None
    listener.listen(128)
    return listener
