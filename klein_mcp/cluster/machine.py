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
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from klein_mcp import atomic
from klein_mcp.cluster.application import RESOURCE
from klein_mcp.cluster.extra import first_line, import_ray, ray_folder
from klein_mcp.errors import RequestError
from klein_mcp.private import check_folder, open_log, read_private_text, read_token

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
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # else engines that take no GPU would all use the first
        "RAY_SERVE_LOG_TO_STDERR": "0",  # Serve's logs stay in Ray's folder
    }


def gpus_here() -> int:
    """Count the GPUs that a process of this user sees, without torch."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    return len(nvidia_gpus())


def nvidia_gpus() -> list[str]:
    """Return the names of the NVIDIA GPUs that the driver knows."""
    if not (program := shutil.which("nvidia-smi")):
        return []
    try:
        listed = subprocess.run([program, "--list-gpus"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if listed.returncode:
        return []
    # "GPU 0: NVIDIA H200 (UUID: GPU-5f…)"; its parts (MIG) have lines of their own below.
    return re.findall(r"^GPU \d+: (.*?)(?: \(UUID: .*)?$", listed.stdout, re.MULTILINE)


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
    # Ray would set 1, as its engines reserve no processors; they share those of the machine.
    threads = {"OMP_NUM_THREADS": str(max(1, _processors() // max(1, int(resources.get(RESOURCE, 1)))))}
    with open_log(home / LOG) as log:
        return subprocess.Popen(
            command,
            env={**threads, **os.environ, **more},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _processors() -> int:
    """Count the processors that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


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
    folder = ray_folder()
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
    return "ray.scripts.scripts" in _command_line(pid)


def _command_line(pid: int) -> str:
    """Return how a process was started, "" if it is gone."""
    if sys.platform == "linux":  # where a small container has no ps
        try:
            return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")
        except OSError:
            return ""
    return subprocess.run(["ps", "-ww", "-o", "command=", "-p", str(pid)], capture_output=True, text=True).stdout


@contextlib.contextmanager
def member_of(
    home: Path,
    arguments: argparse.Namespace,
    address: str,
    ray_arguments: list[str],
    ports: Iterable[tuple[str, str, int]] = (),
) -> Iterator[None]:
    """Start this machine's Ray and connect to its cluster.

    It stays, unless the block fails. ports: option, host and number of those that must be free. Raises RequestError.
    """
    if read_member(home):
        raise RequestError("This machine is in a cluster already.", hint="klein-mcp cluster down leaves it.")
    for port in ports:
        _check_port(*port)
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


def gpus_per_engine(arguments: argparse.Namespace) -> float:
    """Return how many GPUs an engine takes, by default 1 or none."""
    return min(1.0, gpus_here()) if arguments.gpus is None else arguments.gpus


def places(arguments: argparse.Namespace) -> int:
    """Return for how many engines this machine has room."""
    gpus = gpus_per_engine(arguments)
    if not gpus:
        return arguments.engines or 1
    # An engine's part lies on one GPU: each of four has room for two of 0.4.
    room = gpus_here() * int(1 / gpus) if gpus < 1 else int(gpus_here() / gpus)
    return min(room, arguments.engines or room)


def _check_port(option: str, host: str, port: int) -> None:
    """Raise RequestError if a port cannot be listened on.

    Ray would say so late, and in a traceback.
    """
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as exc:
        raise RequestError(
            f"{option} cannot be used: {exc.strerror or exc}.", hint="Name another, or end what listens there."
        ) from None


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
            f"Ray cannot be reached at {address}: {first_line(exc)}",
            hint="Check the address, that `cluster up` runs there, and that no firewall lies between.",
        ) from None
    try:
        yield
    finally:
        ray.shutdown()
