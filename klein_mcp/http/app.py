"""The HTTP front end: its surfaces, and the process that serves them.

TLS is left to a reverse proxy in front of it.
"""

import errno
import logging
import os
import re
import signal
import socket
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect

from klein_mcp import __version__
from klein_mcp.errors import RequestError
from klein_mcp.exit import exit_now
from klein_mcp.http import a1111, auth, card, disconnect, downloads, health, invitations, mcp, studio, uploads
from klein_mcp.http.openai import surface as openai
from klein_mcp.http.sessions import Sessions
from klein_mcp.http.signed_urls import SignedUrls
from klein_mcp.http.surface import HttpContext, SurfaceFactory
from klein_mcp.jobs.service import Service
from klein_mcp.loopback import is_loopback
from klein_mcp.mcp_server.server import create_server
from klein_mcp.settings import Settings, warn_misspelled
from klein_mcp.web_server import BACKLOG, WebServer

SURFACES: tuple[SurfaceFactory, ...] = (
    mcp.surface,
    openai.surface,
    a1111.surface,
    downloads.surface,
    uploads.surface,
    health.surface,
    card.surface,
    *studio.surfaces(),
    invitations.surface,
)
"""A new surface is one file and one entry here."""

GRACE = 1
"""Seconds for open streams to end after a signal."""

_PORT = re.compile(r":\d+$")


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """The command line's options.

    allowed_hosts: names by which clients reach us, each with or without a port.
    """

    host: str = "127.0.0.1"
    port: int = 8765
    token_file: Path | None = None
    allowed_hosts: tuple[str, ...] = ()

    @classmethod
    def from_arguments(cls, arguments: Namespace) -> "HttpOptions":
        """Raises ValueError for a combination that would let anybody in."""
        options = cls(arguments.host, arguments.port, arguments.token_file, tuple(arguments.allowed_host))
        if not options.local and not options.allowed_hosts:
            raise ValueError(
                f"--host {options.host} can be reached from other machines: name with --allowed-host H"
                " how clients call this one."
            )
        return options

    @property
    def local(self) -> bool:
        return is_loopback(self.host)

    @property
    def known_as(self) -> tuple[str, ...]:
        """Return the names by which clients may call us."""
        if not self.local:
            return self.allowed_hosts
        return (f"[{self.host}]" if ":" in self.host else self.host, *self.allowed_hosts)

    def url(self, port: int) -> str:
        """Return the address that clients use.

        Beyond loopback the first allowed host: one to listen on, such as 0.0.0.0, is not let in.
        """
        if not self.local:
            name = self.allowed_hosts[0]
            return f"http://{name}" if _PORT.search(name) else f"http://{name}:{port}"
        return f"http://[{self.host}]:{port}" if ":" in self.host else f"http://{self.host}:{port}"

    def own_url(self, port: int) -> str:
        """Return the address by which this machine reaches the server."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def announce(context: HttpContext, url: str) -> None:
    """Say where clients and a person's browser find this server."""
    print(f"klein-mcp {__version__} serves {url}/mcp", file=sys.stderr, flush=True)
    print(f"studio, by a link that works once: {studio.link(context, url)}", file=sys.stderr, flush=True)


def run(
    settings: Settings,
    options: HttpOptions,
    ready: Callable[[HttpContext, str], None] = announce,
    *,
    invites: bool = False,
) -> NoReturn:
    """Serve until a signal, then end the process.

    Raises RequestError or OSError if it cannot start. ready: called with the address once connections are accepted.
    invites: let `klein-mcp studio` find this server and get a link to it.
    """
    from klein_mcp.daemon.client import DaemonClient

    logging.basicConfig(
        level=settings.log_level.upper(), stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s"
    )
    warn_misspelled()
    token = token_for(settings, options)
    listener = _bind(options)
    service = Service(settings, DaemonClient(settings))
    context = make_context(service)
    app = application(context, token=token, hosts=options.known_as)
    port = listener.getsockname()[1]
    # A proxy may be anywhere. What a sender claims about itself changes the scheme of the links in its own answers, and
    # never makes it local: see signed_urls.is_local, which alone reads a client's address.
    server = _QuietServer(app, timeout_graceful_shutdown=GRACE, server_header=False, forwarded_allow_ips="*")
    # uvicorn raises the signal once more when it is done; by default that would end us before the library is closed.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    code: int = 0
    own = options.own_url(port)
    found = invitations.announced(settings.home, context, own, options.url(port)) if invites else nullcontext()
    try:
        with found:
            ready(context, options.url(port))
            server.run([listener])
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        service.close()
    exit_now(code)


class _QuietServer(WebServer):
    """A server that logs no traceback for the streams a signal ends."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        super().handle_exit(sig, frame)


def make_context(service: Service) -> HttpContext:
    urls = SignedUrls()
    return HttpContext(service, create_server(service, link=urls.for_client), urls, Sessions())


def application(
    context: HttpContext,
    *,
    token: str | None = None,
    hosts: Sequence[str] = (),
    surfaces: Sequence[SurfaceFactory] = SURFACES,
) -> Starlette:
    """Return the ASGI application. Without a token, every client is let in."""
    served = [make(context) for make in surfaces]
    check = Middleware(
        auth.AuthMiddleware,
        surfaces=served,
        security=auth.transport_security(hosts),
        token=token,
        urls=context.urls,
        sessions=context.sessions,
        origins=context.service.settings.cors,
    )
    return Starlette(
        routes=[route for surface in served for route in surface.routes],
        middleware=[check],
        exception_handlers={ClientDisconnect: disconnect.end_quietly},
        lifespan=lambda app: context.server.session_manager.run(),
    )


def token_for(settings: Settings, options: HttpOptions) -> str | None:
    """Return the token clients must send, None if only this machine connects."""
    if options.token_file:
        return auth.server_token(options.token_file, "Without --token-file one is made for you.")
    # A name to be served under means a reverse proxy, and so other machines, even where we listen on loopback alone.
    if options.local and all(map(is_loopback, options.allowed_hosts)):
        return None
    return auth.make_token(settings.home / "http-token")


def _bind(options: HttpOptions) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
        )[0]
    except (OSError, UnicodeError) as exc:  # a part of a name over 63 letters
        raise _cannot_listen(options, exc) from None
    listener = socket.socket(family, kind, protocol)
    if os.name == "posix":
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as exc:
        listener.close()
        raise _cannot_listen(options, exc) from None
    listener.listen(BACKLOG)
    return listener


def _cannot_listen(options: HttpOptions, exc: OSError | UnicodeError) -> RequestError:
    hint = "Choose another --port."
    number = getattr(exc, "errno", None)
    if isinstance(exc, socket.gaierror | UnicodeError) or number == errno.EADDRNOTAVAIL:
        hint = "--host takes an address of this machine: 127.0.0.1, one of its own, or 0.0.0.0 for all."
    elif number == errno.EACCES:
        hint = "Ports below 1024 need rights: choose a larger --port."
    reason = getattr(exc, "strerror", None) or exc
    return RequestError(f"Cannot listen on {options.host} port {options.port}: {reason}.", hint=hint)
