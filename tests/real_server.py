"""The real program on the embedded model, in a data folder of its own."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mcp.client.stdio import StdioServerParameters

PATIENCE = 600
"""Seconds until a process that should end counts as hanging: a busy machine of 2 cores needed 60 at a load of 8."""


@dataclass(frozen=True)
class RealServer:
    """One data folder, and so one engine for everything started in it."""

    home: Path

    def environment(self, **more: str) -> dict[str, str]:
        """Return this environment without the user's own klein-mcp settings."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("KLEIN_")}
        fixed = {"KLEIN_HOME": str(self.home), "KLEIN_MODEL": "nano", "KLEIN_THREADS": "1", "OMP_NUM_THREADS": "1"}
        # On a busy machine an engine may take longer to start than a client would wait: an image, not a job.
        fixed["KLEIN_WAIT_BUDGET"] = str(PATIENCE)
        return {**inherited, **fixed, **more}

    def stdio(self, *arguments: str, **more: str) -> StdioServerParameters:
        """Return how a client starts the server."""
        return StdioServerParameters(
            command=sys.executable, args=["-m", "klein_mcp", *arguments], env=self.environment(**more)
        )

    def run(self, *command: str, cwd: Path | None = None, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a Python program of the project to its end."""
        return subprocess.run(
            [sys.executable, *command],
            cwd=cwd,
            env=self.environment(**more),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            stdin=subprocess.DEVNULL,
        )


@contextmanager
def real_server(home: Path) -> Iterator[RealServer]:
    """Yield a server whose engine is stopped afterwards."""
    server = RealServer(home)
    try:
        yield server
    finally:
        server.run("-m", "klein_mcp", "stop")


def wait_until_listening(port: int, process: "subprocess.Popen[bytes]") -> None:
    """Wait until a process accepts connections on a port of loopback."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        assert process.poll() is None, f"ended with {process.returncode}"
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError(f"nothing listened on port {port} within {PATIENCE} seconds")


@contextmanager
def engine_process(home: Path, token: Path, port: int = 0) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """Run `klein-mcp engine`. Yield its address and process."""
    place = RealServer(home)
    home.mkdir(exist_ok=True)
    token.chmod(0o600)  # or the first line would be a warning
    command = [sys.executable, "-m", "klein_mcp", "engine", "--listen", f"127.0.0.1:{port}", "--token-file", str(token)]
    # A session of its own, as on a machine of its own: Linux shares a busy CPU among sessions.
    process = subprocess.Popen(
        command, env=place.environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr
    try:
        yield f"http://{process.stderr.readline().split()[-1]}", process
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
