"""The owner-only endpoint file, and the build of a daemon."""

import hashlib
import hmac
import json
import secrets
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import klein_mcp
from klein_mcp import atomic
from klein_mcp.private import is_open_to_others, read_private_text

HOST = "127.0.0.1"

INSTALLED = str(Path(klein_mcp.__file__).parents[1])
"""The folder this code was loaded from."""

ENGINE_LOCK = "engine.lock"
"""In the data folder; held by the daemon for life."""

HOST_FILE = "daemon.host"
"""In the data folder; the name of the machine whose loopback the endpoint is of. Not in the endpoint's own file: older
front ends refuse a field that they do not know."""

NOT_IN_THE_WHEEL = (
    "engine/nano/training",
    "engine/nano/evaluate.py",
    "klein_mcp/studio/page",
    "klein_mcp/studio/build.py",
)
"""As in pyproject.toml: a checkout that has them runs the same code as an installation that lacks them."""

WEIGHTS = "engine/nano/weights"
"""The embedded model's folder: other weights paint other images, so they are part of the build."""

SAMPLES = 8
SAMPLE_BYTES = 1024
"""Read of each weights file, spread evenly: training changes all numbers, and every front end starts with this."""

LAST_STEP = 30.0
"""Seconds a job may take to its next pause once the daemon has been asked to end; then it ends all the same."""

DRAINING = 503
UNKNOWN = 404
REFUSED = 409
"""Status codes of a daemon: replaced by another one, no such job, and an error that is to be raised."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Address of a daemon.

    token: authorises a front end, and proves to it that this is its daemon.
    """

    port: int
    pid: int
    token: str

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def proof(self, nonce: str) -> str:
        """Answer `nonce` as only a holder of the token can."""
        return proof(self.token, nonce)


def proof(token: str, nonce: str) -> str:
    """Answer `nonce` without showing the token.

    Another process on a stale port learns nothing.
    """
    return hmac.new(token.encode(), nonce.encode(), hashlib.sha256).hexdigest()


@dataclass(frozen=True, slots=True)
class BuildInfo:
    """Identifies the code that runs.

    Front ends and daemon of one build speak the same protocol.
    changed: when the newest source file was written, in ns; orders two builds of one version.
    """

    version: str
    fingerprint: str
    changed: int

    @classmethod
    def read(cls) -> "BuildInfo":
        """Read the build on disk."""
        return cls(klein_mcp.__version__, *_fingerprint(Path(INSTALLED)))

    @property
    def name(self) -> str:
        """Name of the build for people, such as 0.2.0 (1f0c6b2e9d3a4c58)."""
        return f"{self.version} ({self.fingerprint[:16]})"

    def newer_than(self, other: "BuildInfo") -> bool:
        return self._rank() > other._rank()

    def _rank(self) -> tuple[list[tuple[int, str]], int, str]:
        """Return what orders builds.

        Of any two one is the newer, or each would end the other's daemon.
        """
        numbers = [(int(part), "") if part.isdigit() else (-1, part) for part in self.version.split(".")]
        return numbers, self.changed, self.fingerprint


def _fingerprint(root: Path) -> tuple[str, int]:
    """Hash code and weights in `root`, and return their latest change.

    The same commit has the same hash as a checkout of any system and as an installed wheel.
    """
    digest, changed = hashlib.sha256(), 0
    for name, path in sorted(_sources(root)):
        digest.update(name.encode())
        digest.update(_sample(path) if path.suffix == ".safetensors" else path.read_bytes().replace(b"\r\n", b"\n"))
        changed = max(changed, path.stat().st_mtime_ns)
    return digest.hexdigest()[:16], changed


def _sources(root: Path) -> Iterator[tuple[str, Path]]:
    left_out = tuple(f"{place}/" for place in NOT_IN_THE_WHEEL)
    for package in ("engine", "klein_mcp"):
        for path in (root / package).rglob("*.py"):
            name = path.relative_to(root).as_posix()
            # Not by is_relative_to: every front end starts with this, and that took half of its time.
            if not f"{name}/".startswith(left_out):
                yield name, path
    for path in (root / WEIGHTS).rglob("*.*"):
        if path.suffix in (".safetensors", ".json", ".jinja"):
            yield path.relative_to(root).as_posix(), path


def _sample(path: Path) -> bytes:
    """Return a file's size and some of its bytes."""
    size = path.stat().st_size
    parts = [str(size).encode()]
    with path.open("rb") as file:
        for i in range(1, SAMPLES + 1):  # the last bytes, not the first: these are a header, the same for equal shapes
            file.seek(max(0, size * i // SAMPLES - SAMPLE_BYTES))
            parts.append(file.read(SAMPLE_BYTES))
    return b"".join(parts)


def new_token() -> str:
    return secrets.token_urlsafe(32)


def read(home: Path) -> Endpoint | None:
    """Return the endpoint in `home`.

    None where there is none that only we could have written.
    """
    path = home / "daemon.json"
    try:
        # In a folder that others may write to, a planted endpoint would bring them our prompts and images.
        if is_open_to_others(path.stat(follow_symlinks=False)):
            return None
        return Endpoint(**json.loads(read_private_text(path)))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def write(home: Path, endpoint: Endpoint) -> None:
    """Write the endpoint file.

    Raises OSError, also if no front end would take it.
    """
    atomic.atomic_write(home / "daemon.json", json.dumps(asdict(endpoint)))
    if read(home) != endpoint:
        # exFAT and network drives do so: every front end would look past the file, and start another engine.
        raise OSError(
            f"{home} is on a disk that sets owner and mode of its files itself, so others could read the engine's "
            "address. Set KLEIN_HOME to a folder on another disk."
        )


def remove(home: Path, endpoint: Endpoint) -> None:
    """Delete the endpoint file if it is still this one."""
    if read(home) == endpoint:
        (home / "daemon.json").unlink(missing_ok=True)
        (home / HOST_FILE).unlink(missing_ok=True)


def claim(home: Path) -> None:
    """Note that the engine of `home` is on this machine. Raises OSError.

    For the holder of its lock, at once: the last one may have been on another machine.
    """
    atomic.atomic_write(home / HOST_FILE, socket.gethostname())


def other_host(home: Path) -> str:
    """Return the machine that the engine of `home` is on.

    "" if it is this one, or not known. It may be gone: the lock says whether it runs.
    """
    try:
        name = read_private_text(home / HOST_FILE).strip()
    except (OSError, ValueError):
        return ""
    return name if name != socket.gethostname() and name.isprintable() else ""
