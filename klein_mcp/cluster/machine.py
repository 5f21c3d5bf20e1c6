"""This machine's part of a cluster: its Ray process.

A file in the data folder says which process that is.
"""

import argparse
import contextlib
import hashlib
import hmac
import json
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from klein_mcp import atomic
from klein_mcp.cluster.application import RESOURCE
from klein_mcp.cluster.extra import import_ray
from klein_mcp.daemon.engine_server import read_token
from klein_mcp.errors import RequestError
from klein_mcp.private import check_folder, open_log, read_private_text

PATIENCE = 120.0
"""Seconds until Ray has to be up: a machine of 2 busy cores took 20."""

LEAVE = 60.0
"""Seconds until Ray has to be gone after a request to end: a joined machine first hands its work over, for up to 30."""

LOG = "cluster.log"
"""In the data folder: what Ray says while it starts and when one of its processes ends."""

SEE_LOG = f"{LOG} in the data folder says why."

STARTED = "Ray runtime started"
WRONG_TOKEN = "InvalidAuthToken"
"""Words of Ray in that log."""

STORE = 200_000_000
"""Bytes of Ray's object store. Nothing of ours is put there, and its default is a third of the memory."""


@dataclass(frozen=True, slots=True)
class Member:
    """This machine as a member of a cluster.

    pid: of its Ray. address: of the first machine's Ray, HOST:PORT.
    """

    pid: int
    address: str
    token_file: str


def environment_of(token_file: Path) -> dict[str, str]:
    """Return environment variables of Ray's processes on this machine.

    Ray's own ports run any code they are sent, so they take a token as well: one made from ours, which stays secret.
    Raises RequestError without a token.
    """
    try:
        token = read_token(token_file)
    except (OSError, ValueError) as exc:
        raise RequestError(
            f"The token file {token_file} cannot be used: {getattr(exc, 'strerror', None) or exc}."
        ) from None
    return {
        "KLEIN_ENGINE_TOKEN_FILE": str(token_file.absolute()),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": hmac.new(token.encode(), b"ray", hashlib.sha256).hexdigest(),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_LOG_TO_STDERR": "0",  # Serve's logs stay in Ray's folder
    }


def gpus_here() -> int:
    """Count the GPUs that a process of this user sees, without torch."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    if not (program := shutil.which("nvidia-smi")):
        return 0
    try:
        listed = subprocess.run([program, "--list-gpus"], capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return 0
    return len(listed.stdout.splitlines()) if listed.returncode == 0 else 0


def start_ray(
    home: Path, arguments: list[str], more: Mapping[str, str], resources: Mapping[str, float]
) -> "subprocess.Popen[bytes]":
    """Start this machine's Ray, which outlives this process."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *arguments]
    command += ["--resources", json.dumps(resources), "--object-store-memory", str(STORE)]
    command += ["--disable-usage-stats", "--log-style", "record"]
    # Chosen by the system: two users of one machine would meet in the fixed range.
    command += ["--min-worker-port", "0", "--max-worker-port", "0"]
    if "--head" in arguments:  # the cluster ends with it, so there is nobody to hand work over to
        more = {**more, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
    with open_log(home / LOG) as log:
        return subprocess.Popen(
            command,
            env={**os.environ, **more},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def head_arguments(port: int, host: str) -> list[str]:
    """Return the arguments of the first machine's Ray. Raises RequestError."""
    return ["--head", f"--port={port}", "--include-dashboard=false", *_place(host)]


def worker_arguments(address: str, host: str) -> list[str]:
    """Return the arguments of any further machine's Ray. Raises RequestError."""
    return [f"--address={address}", *_place(host)]


def _place(host: str) -> list[str]:
    # Not Ray's own folder: it writes the address of the latest cluster there, and other programs connect to it.
    folder = [f"--temp-dir={_private_folder() / 'ray'}"]
    return [*folder, f"--node-ip-address={host}"] if host else folder


def _private_folder() -> Path:
    """Return a folder that nobody else can enter.

    Ray lets every user write to its own.
    """
    folder = Path("/tmp") / f"klein-mcp-{os.getuid()}"  # sockets lie in it, whose paths have at most 107 bytes
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        check_folder(folder)
    except OSError as exc:
        raise RequestError(f"The folder {folder} cannot be used: {exc.strerror or exc}.") from None
    return folder


def write_member(home: Path, member: Member) -> None:
    """Remember this machine's Ray. Raises OSError."""
    atomic.atomic_write(home / "cluster.json", json.dumps(asdict(member)))


def read_member(home: Path) -> Member | None:
    """Return this machine's membership, None where its Ray is gone."""
    try:
        member = Member(**json.loads(read_private_text(home / "cluster.json")))
    except (OSError, ValueError, TypeError):
        return None
    return member if _is_ray(member.pid) else None


def leave(home: Path) -> bool:
    """End this machine's Ray and wait until it is gone.

    False if there was none.
    """
    member = read_member(home)
    if member:
        stop_ray(member.pid)
    (home / "cluster.json").unlink(missing_ok=True)
    return member is not None


def stop_ray(pid: int) -> None:
    """End a Ray that `start_ray` started, with all its processes.

    Raises RequestError if it stays.
    """
    # It ends its children itself; `ray stop` would also end those of other users' clusters on this machine.
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, number)
        deadline = time.monotonic() + LEAVE
        while _is_ray(pid):
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        else:
            return
    raise RequestError(
        f"Ray's process {pid} does not end.", hint=f"End it by hand (kill -9 {pid}), then run this again."
    )


def _is_ray(pid: int) -> bool:
    """Tell whether the process is one of Ray's start commands.

    Its number may be another program's by now.
    """
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # as a zombie of ours it would count as running
    listed = subprocess.run(["ps", "-ww", "-o", "command=", "-p", str(pid)], capture_output=True, text=True)
    return "ray.scripts.scripts" in listed.stdout


@contextlib.contextmanager
def member_of(home: Path, arguments: argparse.Namespace, address: str, ray_arguments: list[str]) -> Iterator[None]:
    """Start this machine's Ray and connect to its cluster.

    It stays, unless the block fails. Raises RequestError.
    """
    if read_member(home):
        raise RequestError("This machine is in a cluster already.", hint="klein-mcp cluster down leaves it.")
    home.mkdir(parents=True, exist_ok=True)
    more = environment_of(arguments.token_file)
    os.environ.update(more)  # before ray is imported, which reads them once
    import_ray()
    name = f"machine-{secrets.token_hex(8)}"
    resources = {RESOURCE: places(arguments), name: 1.0}
    process = start_ray(home, ray_arguments, more, resources)
    try:
        _wait_for_start(home / LOG, process)
        with connected(address, more):
            _wait_for_member(name, process)
            write_member(home, Member(process.pid, address, more["KLEIN_ENGINE_TOKEN_FILE"]))
            yield
    except BaseException:
        stop_ray(process.pid)
        (home / "cluster.json").unlink(missing_ok=True)
        raise


def places(arguments: argparse.Namespace) -> int:
    """Return for how many engines this machine has room."""
    return arguments.engines or max(1, gpus_here())


def _wait_for_start(log: Path, process: "subprocess.Popen[bytes]") -> None:
    """Wait until Ray says in its log that it runs. Raises RequestError."""
    deadline = time.monotonic() + PATIENCE
    while (text := log.read_text(errors="replace")).find(STARTED) < 0:
        if WRONG_TOKEN in text:  # Ray itself goes on trying for 40 seconds
            raise RequestError("The cluster has another token.", hint="Its --token-file has to be the same everywhere.")
        _check_alive(process)
        _check_time(deadline)
        time.sleep(0.1)


def _wait_for_member(resource: str, process: "subprocess.Popen[bytes]") -> None:
    """Wait until the machine with `resource` belongs to the cluster. Raises RequestError."""
    ray = import_ray()
    deadline = time.monotonic() + PATIENCE
    while not any(node["Alive"] and resource in node["Resources"] for node in ray.nodes()):
        _check_alive(process)
        _check_time(deadline)
        time.sleep(0.2)


def _check_alive(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is not None:
        raise RequestError("Ray ended at once.", hint=SEE_LOG)


def _check_time(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise RequestError(f"This machine joined nothing within {PATIENCE:.0f} seconds.", hint=SEE_LOG)


@contextlib.contextmanager
def connected(address: str, more: Mapping[str, str]) -> Iterator[None]:
    """Connect this process to a cluster. Raises RequestError."""
    os.environ.update(more)
    ray = import_ray()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # it tells of each of its steps
    try:
        ray.init(address=address, namespace="klein", log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError, OSError) as exc:
        raise RequestError(
            f"Ray cannot be reached at {address}: {str(exc).splitlines()[0]}",
            hint="Check the address, that `cluster up` runs there, and that no firewall lies between.",
        ) from None
    try:
        yield
    finally:
        ray.shutdown()
