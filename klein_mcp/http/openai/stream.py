"""Server-sent events that start late, so that early errors get a status."""

import time
from collections.abc import Mapping
from typing import Any

from starlette.types import Receive, Scope, Send

from klein_mcp.http.openai import payloads
from klein_mcp.http.openai.errors import ApiError

START_WITHIN = 2.0
"""Seconds without an event after which the response begins: what fails sooner gets a status of its own."""

KEEP_ALIVE_EVERY = 15.0
"""Seconds of silence after which a comment is sent; proxies close after 60."""


class EventStream:
    """Sends events as they happen. Nothing is sent before the first."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, headers: Mapping[str, str]) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-store",
            "x-accel-buffering": "no",
            **headers,
        }
        self._began = False
        self._latest = time.monotonic()

    async def event(self, payload: dict[str, Any]) -> None:
        await self._write(payloads.server_sent(payload))

    async def idle(self) -> None:
        """Start the response, or send a comment, after a silence.

        Called at least each second.
        """
        silent = time.monotonic() - self._latest
        if silent >= (KEEP_ALIVE_EVERY if self._began else START_WITHIN):
            await self._write(payloads.KEEP_ALIVE)

    async def fail(self, error: ApiError) -> None:
        """End with an error, as the response or as its last event."""
        if not self._began:
            await error.response()(self._scope, self._receive, self._send)
            return
        await self.event(error.payload())
        await self._close()

    async def finish(self) -> None:
        await self._write(payloads.DONE)
        await self._close()

    async def _write(self, data: bytes) -> None:
        if not self._began:
            self._began = True
            headers = [(name.encode(), value.encode()) for name, value in self._headers.items()]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": data, "more_body": True})
        self._latest = time.monotonic()

    async def _close(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})
