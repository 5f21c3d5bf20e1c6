"""Pictures over plain HTTP: signed, expiring download links, and the upload that gives a client's file a handle."""

import hashlib
import hmac
import ipaddress
import secrets
import time
from collections.abc import Awaitable, Callable

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from klein_mcp.errors import RequestError
from klein_mcp.jobs.service import Service
from klein_mcp.mcp_server.results import MIME, uri

LIFETIME = 3600
"""Seconds a download link works; the next result or view_image gives a fresh one."""

MAX_BYTES = 64 * 2**20
"""As images/codec.MAX_BYTES, which would bring Pillow in."""


class SignedUrls:
    """Makes and checks download addresses: whoever has one may fetch that one picture for a while, without a token."""

    def __init__(self, secret: bytes | None = None) -> None:
        self._secret = secret or secrets.token_bytes(32)

    def of(self, request: Request) -> Callable[[str], str] | None:
        """For create_server: what makes addresses for the sender of `request`; None if it shares our disk."""
        if _is_local(request):
            return None
        base = str(request.base_url).rstrip("/")
        return lambda handle: base + self.path(handle)

    def path(self, handle: str, now: float | None = None) -> str:
        until = int((time.time() if now is None else now) + LIFETIME)
        return f"/images/{handle}.png?until={until}&signature={self._signature(handle, until)}"

    def allows(self, request: Request, handle: str) -> bool:
        until = request.query_params.get("until", "")
        shown = request.query_params.get("signature", "")
        if not (until.isascii() and until.isdecimal() and len(until) < 20):
            return False
        right = self._signature(handle, int(until))
        return hmac.compare_digest(shown.encode(), right.encode()) and time.time() < int(until)

    def _signature(self, handle: str, until: int) -> str:
        return hmac.new(self._secret, f"{handle} {until}".encode(), hashlib.sha256).hexdigest()


def download(service: Service, links: SignedUrls) -> Route:
    """GET /images/{handle}.png: asks for no token, as the link itself is the permission."""

    async def endpoint(request: Request) -> Response:
        handle = request.path_params["handle"]
        if not links.allows(request, handle):
            return _failed("This link is not valid, or no longer; view_image gives a new one.", 403)
        try:
            path = await anyio.to_thread.run_sync(lambda: service.store.path(service.store.get(handle)))
        except RequestError as problem:
            return _failed(str(problem), 404)
        headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private, max-age=3600"}
        return FileResponse(path, media_type=MIME, headers=headers)

    return Route("/images/{handle:str}.png", endpoint, methods=["GET"])


def upload(service: Service, client: Callable[[Request], str], painted: Callable[[str], Awaitable[None]]) -> Route:
    """POST /upload, the file as the body: {"image": handle, …}. Mount it behind the token.

    client: whose picture it is, as the MCP server names it. painted: as of a Call.
    """

    async def endpoint(request: Request) -> Response:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BYTES:
                return _failed(f"More than {MAX_BYTES // 2**20} MiB; send a smaller copy.", 413)
        try:
            opened = await anyio.to_thread.run_sync(
                lambda: service.sources.keep(bytes(body), "The upload", client(request))
            )
        except RequestError as problem:
            return _failed(str(problem), 400)
        record = opened.record
        if opened.new:
            await painted(uri(record.handle))
        told = {"image": record.handle, "uri": uri(record.handle), "width": record.width, "height": record.height}
        return JSONResponse({**told, "warnings": opened.warnings})

    return Route("/upload", endpoint, methods=["POST"])


def _is_local(request: Request) -> bool:
    """A sender on this machine that came straight to us; through a proxy, everybody seems to be here."""
    if request.client is None or "x-forwarded-for" in request.headers or "forwarded" in request.headers:
        return False
    try:
        return ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return False


def _failed(message: str, status: int) -> JSONResponse:
    return JSONResponse({"error": message}, status)
