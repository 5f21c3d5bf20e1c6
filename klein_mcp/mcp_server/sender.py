"""Tells clients of one HTTP server apart, where requests allow it."""

import hashlib
import os
from contextvars import ContextVar
from typing import Any

from mcp_types import Tool as Listed

from klein_mcp.mcp_server.tools import fields

_shared: ContextVar[bool] = ContextVar("shared", default=False)


def http_client(request: Any) -> str:
    """Return whose turn it is, by session or token and name.

    A session names this process, too, since it ends with it.
    """
    if session := _session(request):
        return f"session-{os.getpid()}-{session}"
    token, name = request.headers.get("authorization", ""), request.query_params.get("client", "")
    return f"token-{hashlib.sha256(f'{token} {name}'.strip().encode()).hexdigest()[:16]}"


def identifies_client(request: Any) -> bool:
    """Return whether a request says which client sends it.

    Today's protocol has no sessions, and every client of one token sends the same. `?client=NAME` in the address that
    it is configured with tells it apart.
    """
    return bool(_session(request) or request.query_params.get("client"))


def _session(request: Any) -> str:
    return request.headers.get("mcp-session-id") or request.query_params.get("session_id") or ""


async def note_sharing(ctx: Any, call_next: Any) -> Any:
    """Middleware: remember for this request whether several clients may send it."""
    request = getattr(ctx, "request", None)
    token = _shared.set(request is not None and not identifies_client(request))
    try:
        return await call_next(ctx)
    finally:
        _shared.reset(token)


def is_shared() -> bool:
    """Return whether several clients may send as the one of this request."""
    return _shared.get()


def without_last(tool: Listed) -> Listed:
    """Offer no reference that is refused to clients that look alike."""
    for field in tool.input_schema["properties"].values():
        for text in fields.COUNTED_BACK:
            if text in field.get("description", ""):
                field["description"] = field["description"].replace(text, "")
    return tool
