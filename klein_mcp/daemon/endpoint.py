"""Where the daemon listens and how a door and it know each other: an owner-only file with a port and a secret."""

import hashlib
import hmac
import json
import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

import klein_mcp
from klein_mcp import atomic

HOST = "127.0.0.1"

ENGINE_LOCK = "engine.lock"
"""In the data folder; held by the daemon for life."""

LAST_STEP = 30.0
"""Seconds a job may take to its next pause once the daemon has been told to end; then it ends all the same."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """token: proves to the daemon that a door may enter, and to a door that this is its daemon."""

    port: int
    pid: int
    token: str

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def proof(self, nonce: str) -> str:
        """What only the holder of the token can answer to `nonce`; a stranger on a stale port learns nothing."""
        return hmac.new(self.token.encode(), nonce.encode(), hashlib.sha256).hexdigest()


@dataclass(frozen=True, slots=True)
class BuildInfo:
    """Which code runs: doors and daemon of one build speak the same wire.

    changed: when the newest source file was written, in ns; orders two builds of one version.
    """

    version: str
    fingerprint: str
    changed: int

    @classmethod
    def read(cls) -> "BuildInfo":
        """The build on disk."""
        package = Path(klein_mcp.__file__).parent
        digest, changed = hashlib.sha256(), 0
        for path in sorted((*package.rglob("*.py"), *(package.parent / "engine").rglob("*.py"))):
            digest.update(str(path.relative_to(package.parent)).encode())
            digest.update(path.read_bytes())
            changed = max(changed, path.stat().st_mtime_ns)
        return cls(klein_mcp.__version__, digest.hexdigest()[:16], changed)

    def newer_than(self, other: "BuildInfo") -> bool:
        return self._rank() > other._rank()

    def _rank(self) -> tuple[list[tuple[int, str]], int]:
        numbers = [(int(part), "") if part.isdigit() else (-1, part) for part in self.version.split(".")]
        return numbers, self.changed


def new_token() -> str:
    return secrets.token_urlsafe(32)


def read(home: Path) -> Endpoint | None:
    """The address in `home`; None where there is none that only we could have written."""
    path = home / "daemon.json"
    try:
        with path.open("rb") as file:
            state = os.fstat(file.fileno())
            # In a folder that others may write to, a planted address would bring them our prompts and pictures.
            if os.name == "posix" and (state.st_uid != os.getuid() or state.st_mode & 0o077):
                return None
            return Endpoint(**json.load(file))
    except (OSError, ValueError, TypeError):
        return None


def write(home: Path, address: Endpoint) -> None:
    """Raises OSError."""
    atomic.write(home / "daemon.json", json.dumps(asdict(address)))


def remove(home: Path, address: Endpoint) -> None:
    """Take the address down if it is still this one."""
    if read(home) == address:
        (home / "daemon.json").unlink(missing_ok=True)
