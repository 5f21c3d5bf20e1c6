"""A uvicorn server without idle ticks or stalled clients."""

import asyncio
import contextlib
import errno
import logging
import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger(__name__)

STALLED = 10.0
"""Seconds for a request's headers, and between parts of its body. A client on a bad line needs one or two."""

LOOK = 2.0
"""Seconds between looks at connections; without any, nothing wakes up."""

BACKLOG = 128
"""Connections the system holds until we accept them. asyncio also tries to accept that many at once."""

SPARE_DESCRIPTORS = 64
"""Left to files, the library and the daemon."""

DESCRIPTORS_EACH = 2
"""Of one connection: its own, and one to the daemon while its job is followed."""

NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)

REPEAT_AFTER = 60.0
"""Seconds until the same error of the event loop is logged again; it comes many times a second."""


class Connection(H11Protocol):
    """An HTTP connection that knows since when it waits for its client."""

    opened: Callable[["Connection"], None]
    """Called with each new connection, set by its server."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._waits_since = self._heard = time.monotonic()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # asyncio sets it only where the listener names its protocol, which create_server does not. Without it, the body
        # of each answer on a connection in use waited 40 ms for the client's delayed acknowledgement of the headers.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.opened(self)

    def data_received(self, data: bytes) -> None:
        self._heard = time.monotonic()
        super().data_received(data)

    def on_response_complete(self) -> None:
        self._waits_since = time.monotonic()
        super().on_response_complete()

    @property
    def between_requests(self) -> bool:
        """True while no request is being read or answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def stalled_for(self) -> float:
        """Return seconds that the client has owed bytes."""
        if self.between_requests:
            return time.monotonic() - self._waits_since
        owes_body = self.cycle.more_body and not self.flow.read_paused
        return time.monotonic() - self._heard if owes_body else 0.0

    def drop(self) -> None:
        """End the connection at once."""
        if self.transport is not None:
            self.transport.abort()


class WebServer(uvicorn.Server):
    """A uvicorn server that drops stalled clients and is silent while idle.

    It can be ended from a signal handler or by `end`.
    """

    def __init__(self, app: Any, **options: Any) -> None:
        """options: of uvicorn.Config."""
        kind = type("Connection", (Connection,), {"opened": self._opened})
        config = uvicorn.Config(
            app, http=kind, log_config=None, access_log=False, date_header=False, backlog=BACKLOG, **options
        )
        super().__init__(config)
        self.answering = asyncio.Event()
        self._stirred = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._most = _most_connections()
        self._logged_at = -REPEAT_AFTER

    async def main_loop(self) -> None:
        """Wait for the end. Wake up only while there are connections."""
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(self._loop_error)
        self.answering.set()
        while not self.should_exit:
            self._stirred.clear()
            for connection in self._connections():
                if connection.stalled_for > STALLED:
                    connection.drop()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stirred.wait(), LOOK if self.server_state.connections else None)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self.end()

    def end(self) -> None:
        """End from any thread or signal handler."""
        self.should_exit = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stirred.set)

    def _connections(self) -> list[Connection]:
        return [each for each in self.server_state.connections if isinstance(each, Connection)]

    def _opened(self, new: Connection) -> None:
        """Make room for a new connection.

        Drop the one that has waited longest for its client.
        """
        self._stirred.set()
        if len(self.server_state.connections) <= self._most:
            return
        waiting = [each for each in self._connections() if each is not new and each.between_requests]
        max(waiting, key=lambda each: each.stalled_for, default=new).drop()

    def _loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log once a minute that descriptors are short.

        asyncio reports it up to BACKLOG times a second.
        """
        if getattr(context.get("exception"), "errno", None) not in NO_DESCRIPTORS:
            loop.default_exception_handler(context)
        elif time.monotonic() - self._logged_at >= REPEAT_AFTER:
            self._logged_at = time.monotonic()
            log.error("no more connections can be accepted: this process has no descriptors left (see ulimit -n)")


def _most_connections() -> int:
    """Return how many connections this process has descriptors for."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return 10_000
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return 10_000
    return max(8, (limit - SPARE_DESCRIPTORS) // DESCRIPTORS_EACH)
