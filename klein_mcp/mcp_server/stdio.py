"""The stdio front end: one client on stdin and stdout.

It ends within a second of end of file or a signal.
"""

import asyncio
import logging
import signal
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any, NoReturn

import anyio
from mcp.server.stdio import stdio_server
from mcp.shared.message import SessionMessage
from mcp_types import JSONRPCError

from klein_mcp.exit import exit_now
from klein_mcp.jobs.service import Service
from klein_mcp.mcp_server.server import create_server
from klein_mcp.mcp_server.stdin_messages import read_message
from klein_mcp.settings import Settings, warn_misspelled

GRACE = 0.8
"""Seconds to cancel jobs and close the library after the client has disconnected."""


def run(settings: Settings) -> NoReturn:
    """Serve until the client disconnects, then end the process."""
    # Before the SDK does it, in wide coloured boxes; stdout belongs to the protocol.
    logging.basicConfig(
        level=settings.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    warn_misspelled()
    exit_now(anyio.run(serve, settings))


async def serve(settings: Settings) -> int:
    """Serve until end of file or a signal, return the exit code.

    Running jobs are cancelled.
    """
    from klein_mcp.daemon.client import DaemonClient

    jobs = DaemonClient(settings)
    service = Service(settings, jobs)
    server = create_server(service)
    code = 0
    try:
        async with anyio.create_task_group() as tasks:

            async def until_signal() -> None:
                nonlocal code
                with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                    async for number in signals:
                        code = 128 + number
                        _exit_soon(code)
                        tasks.cancel_scope.cancel()

            if sys.platform != "win32":  # there, a client ends the server by closing stdin
                tasks.start_soon(until_signal)
            lines = _Lines()
            async with stdio_server(stdin=lines) as (read, write):  # type: ignore[arg-type] - it only iterates
                lines.answer_with(write)
                await server.serve(read, write)
            tasks.cancel_scope.cancel()
        return code
    finally:
        await jobs.aclose()
        service.close()


class _Lines:
    """Lines of stdin, read and checked by a daemon thread.

    The SDK joins its own reader, which ends only when stdin does: a signal would have no effect. Checking a line of
    megabytes takes long; meanwhile the loop serves the calls that run.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._lines: asyncio.Queue[str | JSONRPCError | None] = asyncio.Queue()
        """Messages, answers to lines that hold none, and None at the end."""
        self._output: asyncio.Future[Any] = self._loop.create_future()
        threading.Thread(target=self._read, name="stdin", daemon=True).start()

    def answer_with(self, output: Any) -> None:
        """Set the SDK's output, for answers to lines that cannot be parsed."""
        self._output.set_result(output)

    def __aiter__(self) -> AsyncIterator[str]:
        return self._each()

    async def _each(self) -> AsyncIterator[str]:
        while (message := await self._lines.get()) is not None:
            if isinstance(message, str):
                yield message
            else:
                await (await self._output).send(SessionMessage(message))
        _exit_soon(0)

    def _read(self) -> None:
        with open(0, "rb", closefd=False) as stdin:
            for line in stdin:
                if (message := read_message(line)) is not None:
                    self._loop.call_soon_threadsafe(self._lines.put_nowait, message)
        self._loop.call_soon_threadsafe(self._lines.put_nowait, None)


def _exit_soon(code: int) -> None:
    """End the process after GRACE, even if a worker thread still runs.

    The library survives that.
    """
    timer = threading.Timer(GRACE, exit_now, (code,))
    timer.daemon = True
    timer.start()
