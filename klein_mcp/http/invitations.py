"""A new studio link from a `serve` that runs already.

`serve` leaves its address and a key in its data folder, where only this user can read them.
"""

import contextlib
import hmac
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from klein_mcp.atomic import atomic_write
from klein_mcp.http.surface import HttpContext, Surface, json_error
from klein_mcp.private import read_private_text

FILE = "studio-server.json"
"""In the data folder: `url` for this machine, `public` for browsers, and `key`."""

PATH = "/studio/invite"
PATIENCE = 5.0
"""Seconds: making a link takes a millisecond, so a server that takes longer hangs."""


def surface(context: HttpContext) -> Surface:
    """The one route that the holder of the key may call."""

    async def invite(request: Request) -> Response:
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {context.sessions.invite_key}".encode()):
            return json_error(401, "This needs the key in the data folder.")
        return JSONResponse({"code": context.sessions.invite()}, headers={"Cache-Control": "no-store"})

    return Surface("studio invitations", [Route(PATH, invite, methods=["POST"])], "none")


@contextlib.contextmanager
def announced(home: Path, context: HttpContext, url: str, public: str) -> Iterator[None]:
    """Let `fresh_link` find this server while it runs."""
    file = home / FILE
    key = context.sessions.invite_key
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    atomic_write(file, json.dumps({"url": url, "public": public, "key": key}))
    try:
        yield
    finally:
        # Another `serve` of the same folder may have taken the place.
        if _read(home).get("key") == key:
            file.unlink(missing_ok=True)


def fresh_link(home: Path, entry: str) -> str | None:
    """Return a new link to the running `serve`, None without one.

    entry: the path before a link's code.
    """
    found = _read(home)
    if not all(isinstance(found.get(name), str) for name in ("url", "public", "key")):
        return None
    request = urllib.request.Request(
        found["url"] + PATH, method="POST", headers={"Authorization": f"Bearer {found['key']}"}
    )
    # No proxy: the address is this machine's own.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=PATIENCE) as answer:
            code = json.load(answer)["code"]
    except (OSError, ValueError, LookupError, TypeError):
        return None  # it ended without tidying up, or its port is another program's now
    return f"{found['public']}{entry}{code}"


def _read(home: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_private_text(home / FILE))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
