"""A real cluster on one machine: two data folders, each with its own Ray."""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from engine.contract import NodeStatus
from klein_mcp.daemon.endpoint import BuildInfo
from klein_mcp.daemon.executors.remote import RemoteExecutor
from tests.real_server import PATIENCE, RealServer

TOKEN = "a-token-of-these-tests"


@dataclass
class Machine:
    """A data folder with its own Ray."""

    place: RealServer
    queue: int

    def cluster(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run `klein-mcp cluster`."""
        return self.place.run("-m", "klein_mcp", "cluster", *words, KLEIN_QUEUE_SIZE=str(self.queue))

    def join(self, address: str, token: Path) -> None:
        joined = self.cluster("join", address, "--host", "127.0.0.1", "--token-file", str(token), "--engines", "1")
        assert joined.returncode == 0, joined.stderr

    @property
    def pid(self) -> int:
        return json.loads((self.place.home / "cluster.json").read_text())["pid"]

    def cut_power(self) -> None:
        """Kill every process of this machine at once."""
        for pid in family(self.pid):
            os.kill(pid, signal.SIGKILL)


@dataclass
class Cluster:
    """Two machines: the first serves `url`, the second can join `ray`."""

    first: Machine
    second: Machine
    url: str
    ray: str
    token: Path

    @cached_property
    def watcher(self) -> RemoteExecutor:
        return self.executor()

    def executor(self) -> RemoteExecutor:
        return RemoteExecutor([self.url], TOKEN, BuildInfo.read())

    def engines(self) -> list[NodeStatus]:
        return list(self.watcher.status().nodes)


def family(pid: int) -> list[int]:
    """A process and all below it."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = {int(child): int(parent) for child, parent in map(str.split, listed.splitlines())}
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextmanager
def real_cluster(folder: Path, *options: str, queue: int) -> Iterator[Cluster]:
    """Start the first machine with room for one engine. Its queue takes `queue` jobs."""
    folder.mkdir()
    token = folder / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    first, second = (Machine(RealServer(folder / name), queue) for name in ("first", "second"))
    port, ray = free_port(), free_port()
    try:
        up = ["up", "--listen", f"127.0.0.1:{port}", "--port", str(ray), "--host", "127.0.0.1", "--engines", "1"]
        started = first.cluster(*up, "--token-file", str(token), *options)
        assert (started.returncode, started.stderr) == (0, "")
        assert f"http://127.0.0.1:{port}" in started.stdout
        yield Cluster(first, second, f"http://127.0.0.1:{port}", f"127.0.0.1:{ray}", token)
    finally:
        second.cluster("down")
        first.cluster("down")


def until(condition: Callable[[], object]) -> object:
    """Wait for `condition` and return what it is."""
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found
