"""Every front end of the real program, as a client opens it."""

import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from mcp import Client
from mcp.client.sse import sse_client

from tests.real_server import RealServer

FRONT_ENDS = ("stdio", "stdio legacy", "http", "http legacy", "sse")


@contextmanager
def serving(server: RealServer) -> Iterator[str]:
    """`klein-mcp serve` on a free port: its address, without a path."""
    with serving_process(server) as (url, _):
        yield url


@contextmanager
def serving_process(server: RealServer) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The same with its process."""
    process = subprocess.Popen(
        [sys.executable, "-m", "klein_mcp", "serve", "--port", "0"],
        env=server.environment(),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr
    try:
        message = process.stderr.readline()
        while message and " serves http://" not in message:
            message = process.stderr.readline()
        assert message, f"serve ended with {process.wait(120)}"
        yield message.split()[-1].removesuffix("/mcp"), process
    finally:
        process.terminate()
        process.wait(120)
        process.stderr.close()


@asynccontextmanager
async def through(front_end: str, server: RealServer, url: str) -> AsyncIterator[Client]:
    """Connect a client. url: from `serving`, for the front ends over HTTP."""
    mode = "legacy" if "legacy" in front_end or front_end == "sse" else "auto"
    over_http = sse_client(f"{url}/sse") if front_end == "sse" else f"{url}/mcp?client=tests"
    async with Client(server.stdio() if front_end.startswith("stdio") else over_http, mode=mode) as client:
        yield client
