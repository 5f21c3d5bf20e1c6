"""Clients that stall, and more of them than there are descriptors."""

import asyncio
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from mcp import Client
from starlette.applications import Starlette

from klein_mcp import web_server
from tests.real_server import PATIENCE, RealServer
from tests.tool_calls import call

posix = pytest.mark.skipif(sys.platform == "win32", reason="descriptor limits")

DESCRIPTORS = 128
LIMITED = f"""
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_NOFILE, ({DESCRIPTORS}, {DESCRIPTORS}))
sys.argv = ["klein-mcp", "serve", "--port", "0"]
runpy.run_module("klein_mcp", run_name="__main__")
"""


@pytest.fixture(scope="module")
def limited(server: RealServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, int, Path]]:
    """`serve` with few descriptors: its port, its process and its log."""
    errors = tmp_path_factory.mktemp("limited") / "stderr"
    with errors.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", LIMITED], env=server.environment(), stdin=subprocess.DEVNULL, stderr=stderr
        )
    try:
        deadline = time.monotonic() + PATIENCE
        while " serves http://" not in (log := errors.read_text()):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield int(log.split("/mcp")[0].rpartition(":")[2]), process.pid, errors
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE)


def connected(port: int, sent: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), PATIENCE)
    connection.sendall(sent)
    return connection


def seconds_until_closed(connection: socket.socket, *, dripping: bytes = b"") -> float:
    started = time.monotonic()
    connection.settimeout(0.5 if dripping else PATIENCE)
    while time.monotonic() - started < PATIENCE:
        try:
            if dripping:
                connection.sendall(dripping)
            assert connection.recv(4096) == b""
        except TimeoutError:
            continue
        except (BrokenPipeError, ConnectionResetError):
            pass
        return time.monotonic() - started
    raise AssertionError("it is still open")


HALF_HEADER = b"POST /mcp HTTP/1.1\r\nHost: localhost\r\n"
HALF_BODY = b"POST /upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nabc"


@posix
def test_half_requests_beyond_the_descriptors_keep_nobody_out(limited: tuple[int, int, Path]):
    port, _, errors = limited
    half = [connected(port, HALF_HEADER) for _ in range(2 * DESCRIPTORS)]
    for _ in range(20):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=PATIENCE) as answer:
            assert answer.status == 200
    for connection in half:
        connection.close()
    assert errors.read_text().count("\n") < 10, errors.read_text()[:2000]


@pytest.mark.slow
@posix
def test_stalled_and_dripping_clients_are_dropped_after_seconds(limited: tuple[int, int, Path]):
    stalled = [connected(limited[0], sent) for sent in (b"", HALF_HEADER, HALF_BODY)]
    started = time.monotonic()
    dripping = connected(limited[0], HALF_HEADER)
    assert seconds_until_closed(dripping, dripping=b"x-a: b\r\n") > web_server.STALLED - 1, "a bad line has its time"
    for connection in stalled:
        seconds_until_closed(connection)
        connection.close()
    assert time.monotonic() - started > web_server.STALLED - 1
    dripping.close()


@pytest.mark.slow
@pytest.mark.anyio
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
async def test_idle_serve_and_daemon_sleep(server: RealServer, limited: tuple[int, int, Path]):
    """They wake up less than once a second.

    Counted are voluntary context switches of all their threads.
    """
    async with Client(server.stdio()) as client:
        await call(client, "generate_image", prompt="an apple", seed=1)
        pids = int((await call(client, "engine_status"))["pid"]), limited[1]
    await asyncio.sleep(6)  # connections that were used are closed after five
    before = [_switches(pid) for pid in pids]
    await asyncio.sleep(8)
    woken = [_switches(pid) - count for pid, count in zip(pids, before, strict=True)]
    assert max(woken) <= 12, f"{woken}; observed: 5 to 10 and 0"


def _switches(pid: int) -> int:
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        line = next(line for line in (task / "status").read_text().splitlines() if line.startswith("voluntary"))
        total += int(line.split()[1])
    return total


def test_answers_are_sent_without_delay():
    """With Nagle's algorithm, each answer on a connection in use waited 40 ms for an acknowledgement."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = web_server.WebServer(Starlette(), lifespan="off", log_level="error")
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        with connected(listener.getsockname()[1], b"GET / HTTP/1.1\r\nhost: x\r\n\r\n") as client:
            assert client.recv(1)
            (connection,) = server.server_state.connections
            undelayed = connection.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)  # type: ignore
        server.end()
        thread.join()
    assert undelayed
