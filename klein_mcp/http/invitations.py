"""A new studio link from a `serve` that runs already.

`serve` leaves its address and a key in its data folder, where only this user can read them.
"""

import contextlib
import hmac
import json
import logging
import re
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from klein_mcp.atomic import atomic_write
from klein_mcp.http.surface import HttpContext, Surface, json_error
from klein_mcp.private import read_private_text

log = logging.getLogger(__name__)

FILES = "studio-server*.json"
"""In the data folder, one of each server: `url` for this machine, `public` for browsers, and `key`."""

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
    """Let `fresh_link` find this server while it runs.

    A data folder that cannot be written costs those links alone: images can still be listed and read.
    """
    # By its address: two servers of one data folder have two, and one that was killed leaves a single file.
    address = re.sub(r"\W+", "-", urlsplit(url).netloc).strip("-")
    file = home / FILES.replace("*", f"-{address}")
    key = context.sessions.invite_key
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        atomic_write(file, json.dumps({"url": url, "public": public, "key": key}))
    except OSError as error:
        log.warning("klein-mcp studio will not find this server: %s: %s", home, error.strerror or error)
    try:
        yield
    finally:
        # Another `serve` may have taken the place: 127.0.0.1 is the own address of several.
        if _read(file).get("key") == key:
            with contextlib.suppress(OSError):  # the disk has become read-only; the next start replaces the file
                file.unlink()


def fresh_link(home: Path, entry: str) -> str | None:
    """Return a new link to the latest `serve`, None without one.

    entry: the path before a link's code.
    """
    files = sorted(home.glob(FILES), key=_started, reverse=True)
    return next(filter(None, (_link(_read(file), entry) for file in files)), None)


def _started(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:  # its server has just ended
        return 0.0


def _link(found: Mapping[str, Any], entry: str) -> str | None:
    """Return a link to one server, None if it does not answer."""
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


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_private_text(file))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
