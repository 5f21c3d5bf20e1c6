"""Signed, expiring links: permission to fetch one path without a token."""

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable
from urllib.parse import parse_qsl, urlsplit

from starlette.requests import Request

from klein_mcp.images.paths import MAX_REFERENCE
from klein_mcp.loopback import is_loopback

LIFETIME = 3600
"""Seconds a link works; the next result or view_image gives a fresh one."""

PROXY_HEADERS = ("forwarded", "via", "x-forwarded-", "x-real-ip")
"""Beginnings of names. Any of these headers says that the sender is not who connects."""


class SignedUrls:
    """Makes and checks links, which end with the process."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)

    def for_client(self, request: Request) -> Callable[[str], str] | None:
        """Return a maker of addresses, None if the sender is local."""
        return None if is_local(request) else self.absolute(request)

    def absolute(self, request: Request) -> Callable[..., str]:
        """Return a function from handle and format to an absolute address."""
        base = str(request.base_url).rstrip("/")
        return lambda handle, kind="png": base + self.image(handle, kind)

    def image(self, handle: str, kind: str = "png", now: float | None = None) -> str:
        return self.sign(f"/images/{handle}.{kind}", now)

    def handle_of(self, url: str) -> str | None:
        """Return the handle in a valid address of ours, else None."""
        if len(url) > MAX_REFERENCE or url[:5].lower() == "data:":
            return None  # urlsplit would keep the latest in memory, images of 90 MB included
        try:
            path = urlsplit(url)
        except ValueError:  # half an IPv6 address
            return None
        name = re.fullmatch(r"/images/([a-z0-9]+)\.[a-z]+", path.path)
        query = dict(parse_qsl(path.query))
        valid = name and self._verify(path.path, query.get("until", ""), query.get("signature", ""))
        return name[1] if name and valid else None

    def sign(self, path: str, now: float | None = None) -> str:
        """Return `path` with an expiry and a signature in its query."""
        until = int((time.time() if now is None else now) + LIFETIME)
        return f"{path}?until={until}&signature={self._signature(path, until)}"

    def allows(self, request: Request) -> bool:
        query = request.query_params
        return self._verify(request.scope["path"], query.get("until", ""), query.get("signature", ""))

    def _verify(self, path: str, until: str, given: str) -> bool:
        if not (until.isascii() and until.isdecimal() and len(until) < 20):
            return False
        expected = self._signature(path, int(until))
        return hmac.compare_digest(given.encode(), expected.encode()) and time.time() < int(until)

    def _signature(self, path: str, until: int) -> str:
        return hmac.new(self._secret, f"{path} {until}".encode(), hashlib.sha256).hexdigest()


def is_local(request: Request) -> bool:
    """True for a sender on this machine that connects without a proxy.

    Tunnels and simple proxies add no header, so the name by which we are called counts too.
    """
    if request.client is None or any(name.startswith(PROXY_HEADERS) for name in request.headers):
        return False
    try:
        host = urlsplit(f"//{request.headers.get('host', '')}").hostname
    except ValueError:
        return False
    return is_loopback(request.client.host) and is_loopback(host or "")
