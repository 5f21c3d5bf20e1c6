"""Clients that vanish or talk nonsense, folders one may not write, full disks, and other users of the machine."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
from mcp import Client

from klein_mcp.daemon import endpoint as addresses
from tests.disks import fill, small_disk
from tests.real_server import RealServer, real_server
from tests.tool_calls import call, refused

pytestmark = pytest.mark.anyio

INITIALIZE = {
    "protocolVersion": "2025-11-25",
    "capabilities": {},
    "clientInfo": {"name": "by hand", "version": "1"},
}


class Typed:
    """A stdio door that a test types into, line by line."""

    def __init__(self, place: RealServer) -> None:
        server = place.stdio()
        self.process = subprocess.Popen(
            [server.command, *server.args],
            env=server.env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self.process.stdin
        assert self.process.stdout
        self.stdin: IO[bytes] = self.process.stdin
        self.stdout: IO[bytes] = self.process.stdout

    def line(self, data: bytes) -> None:
        self.stdin.write(data + b"\n")
        self.stdin.flush()

    def send(self, method: str, params: dict[str, Any] | None = None, id: int | None = None) -> None:
        message = {"jsonrpc": "2.0", "method": method, "params": params or {}}
        self.line(json.dumps(message if id is None else {**message, "id": id}).encode())

    def hear(self, wanted: Any) -> dict[str, Any]:
        """The next message for which `wanted` holds."""
        for line in self.stdout:
            message = json.loads(line)
            if wanted(message):
                return message
        raise AssertionError("the door closed")

    def shake_hands(self) -> None:
        self.send("initialize", INITIALIZE, id=0)
        self.hear(lambda message: message.get("id") == 0)
        self.send("notifications/initialized")


@contextmanager
def typed(place: RealServer) -> Iterator[Typed]:
    door = Typed(place)
    try:
        yield door
    finally:
        door.process.kill()
        door.process.wait()
        door.stdin.close()
        door.stdout.close()


def running(place: RealServer) -> bool:
    """Whether the engine paints."""
    state = json.loads(place.run("-m", "klein_mcp", "status", "--json").stdout)
    return bool(state["running"] and state["queue"]["running"])


@pytest.mark.parametrize("how", ["end of file", "SIGTERM", "SIGINT"])
def test_front_end_whose_client_leaves_ends_and_cancels_its_job(server: RealServer, how: str):
    with typed(server) as door:
        door.shake_hands()
        arguments = {"prompt": "a cat", "width": 512, "height": 512, "count": 4}
        params = {"name": "generate_image", "arguments": arguments, "_meta": {"progressToken": 1}}
        door.send("tools/call", params, id=1)
        door.hear(lambda message: "step" in message.get("params", {}).get("message", ""))
        if how == "end of file":
            door.stdin.close()
        else:
            door.process.send_signal(signal.Signals[how])
        door.process.wait(60)
    deadline = time.monotonic() + 60
    while running(server):
        assert time.monotonic() < deadline
    assert not list((server.home / "library" / "incoming").glob("*/*"))


NONSENSE = [
    b"",
    b"hello?",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe\xfd",
    b'{"jsonrpc": "2.0"}',
    b'{"jsonrpc": "2.0", "id": 1, "method": 7}',
    b'{"jsonrpc": "2.0", "id": 2, "result": {}}',
    b'{"jsonrpc": "2.0", "id": 3, "method": "tools/call", "params": {"name": 5}}',
    b"[" * 100_000,
]


def test_a_client_that_talks_nonsense_is_still_answered_afterwards(server: RealServer):
    with typed(server) as door:
        door.shake_hands()
        for line in NONSENSE:
            door.line(line)
        door.send("tools/list", id=99)
        answer = door.hear(lambda message: message.get("id") == 99)
    assert len(answer["result"]["tools"]) >= 8


# Run as another user: the imports are done before the rights are dropped, because that user may not read our Python.
DROPPED = """
import asyncio, json, os, sys
from pathlib import Path
import httpx2, httpcore2, filelock, anyio, numpy, anyio._backends._asyncio, klein_mcp.daemon.wire, encodings.idna
import h11, httpcore2._async, httpx2._transports.default, traceback, secrets, socket
from engine.contract import EngineError
from klein_mcp.jobs.events import Failed
from klein_mcp.jobs.request import generate
from klein_mcp.daemon.client import DaemonClient
from klein_mcp.daemon import endpoint
from klein_mcp.settings import Settings
home = Path(sys.argv[1])
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)

async def main():
    door = DaemonClient(Settings(home=home))
    try:
        async for event in door.run(generate("a cat"), client="another user"):
            if isinstance(event, Failed):
                raise event.error
            print(type(event).__name__)
    except EngineError as problem:
        print("refused:", problem)

asyncio.run(main())
"""

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX users and modes")
as_root = pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="needs a second user: run as root")


def dropped(home: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", DROPPED, str(home)],
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@posix
def test_a_data_folder_that_is_not_writable_is_one_line(tmp_path: Path):
    home = tmp_path / "home"
    home.mkdir(mode=0o555)
    for folder in (home, *tmp_path.parents[:1], tmp_path):
        folder.chmod(0o555)
    try:
        message = dropped(home)
    finally:
        for folder in (*tmp_path.parents[:1], tmp_path, home):
            folder.chmod(0o755)
    assert message.startswith("refused: The data folder")
    assert "KLEIN_HOME" in message
    assert message.count("\n") == 1


@posix
@as_root
def test_another_user_of_the_machine_is_not_let_in(server: RealServer):
    """Even one who is knows where the data folder is, and who could reach the port."""
    server.run("-m", "klein_mcp", "demo", "--out", str(server.home / "demo"))
    address = addresses.read(server.home)
    assert address
    paths = (server.home, *list(server.home.parents)[:3])
    modes = [path.stat().st_mode for path in paths]
    for path in paths:
        path.chmod(0o777)  # as careless as one can be
    try:
        message = dropped(server.home)
        assert (server.home / "daemon.json").stat().st_mode & 0o077 == 0
    finally:
        for path, mode in zip(paths, modes, strict=True):
            path.chmod(mode)
    assert "Submitted" not in message
    assert "refused:" in message
    assert addresses.read(server.home) == address


@posix
@as_root
def test_an_address_planted_by_another_user_is_not_believed(tmp_path: Path):
    planted = addresses.Endpoint(1, 1, "planted")
    addresses.write(tmp_path, planted)
    assert addresses.read(tmp_path) == planted
    os.chown(tmp_path / "daemon.json", 65534, 65534)
    assert addresses.read(tmp_path) is None


@posix
@as_root
async def test_a_full_disk_is_one_line_and_nothing_is_lost(tmp_path: Path):
    with small_disk(tmp_path / "disk", "3m") as disk, real_server(disk / "home") as place:
        async with Client(place.stdio()) as client:
            painted = [await call(client, "generate_image", prompt="a cat on red", seed=1)]
            filler = fill(disk)
            message = await refused(client, "generate_image", prompt="a dog on blue", seed=2)
            assert "disk" in message.lower()
            filler.unlink()
            painted.append(await call(client, "generate_image", prompt="a dog on blue", seed=2))
        for facts in painted:
            assert Path(facts["path"]).read_bytes().startswith(b"\x89PNG")


async def test_the_engine_starts_on_a_full_disk_or_says_why(tmp_path: Path):
    """The first call of a user whose disk is full: an error that names the disk, not a traceback."""
    with small_disk(tmp_path / "disk", "40k") as disk:
        with open(disk / "filler", "wb") as file:
            file.write(bytes(32 * 1024))
        with real_server(disk / "home") as place:
            async with Client(place.stdio()) as client:
                message = await refused(client, "generate_image", prompt="a cat on red", seed=1)
        assert "Traceback" not in message
        assert "disk" in message.lower()
