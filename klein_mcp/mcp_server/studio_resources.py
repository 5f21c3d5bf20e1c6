"""klein://now, klein://library and klein://engine, which the studio's page reads."""

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import anyio.to_thread
from mcp.server.lowlevel.helper_types import ReadResourceContents

from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.service import Service
from klein_mcp.studio import views
from klein_mcp.studio.engine_view import engine_view
from klein_mcp.studio.feed import Feed

Query = Mapping[str, str]
Reader = Callable[[Service, Feed, Query, CallContext], Awaitable[Any]]


async def read(service: Service, feed: Feed, uri: str, call: CallContext) -> list[ReadResourceContents]:
    """Return the JSON of one of READERS."""
    address, _, _ = uri.partition("?")
    value = await READERS[address](service, feed, dict(parse_qsl(urlsplit(uri).query)), call)
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return [ReadResourceContents(text, "application/json")]


async def _now(service: Service, feed: Feed, query: Query, call: CallContext) -> Any:
    return await feed.now(call.client, after=_number(query.get("after"), 0))


async def _library(service: Service, feed: Feed, query: Query, call: CallContext) -> Any:
    limit, search = _number(query.get("limit"), 40), query.get("search", "")[:200]
    cursor = query.get("cursor", "")
    return await anyio.to_thread.run_sync(
        lambda: views.library_page(service.store, search=search, cursor=cursor, limit=limit)
    )


async def _engine(service: Service, feed: Feed, query: Query, call: CallContext) -> Any:
    return await engine_view(service)


READERS: Mapping[str, Reader] = {"klein://now": _now, "klein://library": _library, "klein://engine": _engine}


def _number(text: str | None, default: int) -> int:
    return int(text) if text and text.isascii() and text.isdecimal() and len(text) < 12 else default
