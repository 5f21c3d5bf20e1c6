"""The owner-only endpoint file, and the build of a daemon."""

import hashlib
import hmac
import json
import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

import klein_mcp
from klein_mcp import atomic
from klein_mcp.private import read_private_text

HOST = "127.0.0.1"

INSTALLED = str(Path(klein_mcp.__file__).parents[1])
"""The folder this code was loaded from."""

ENGINE_LOCK = "engine.lock"
"""In the data folder; held by the daemon for life."""

LAST_STEP = 30.0
"""Seconds a job may take to its next pause once the daemon has been asked to end; then it ends all the same."""


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
        package = Path(klein_mcp.__file__).parent
        digest, changed = hashlib.sha256(), 0
        for path in sorted((*package.rglob("*.py"), *(package.parent / "engine").rglob("*.py"))):
            digest.update(path.relative_to(package.parent).as_posix().encode())
            digest.update(path.read_bytes())
            changed = max(changed, path.stat().st_mtime_ns)
        return cls(klein_mcp.__version__, digest.hexdigest()[:16], changed)

    def newer_than(self, other: "BuildInfo") -> bool:
        return self._rank() > other._rank()

    def _rank(self) -> tuple[list[tuple[int, str]], int, str]:
        """Return what orders builds.

        Of any two one is the newer, or each would end the other's daemon.
        """
        numbers = [(int(part), "") if part.isdigit() else (-1, part) for part in self.version.split(".")]
        return numbers, self.changed, self.fingerprint


def new_token() -> str:
    return secrets.token_urlsafe(32)


def read(home: Path) -> Endpoint | None:
    """Return the endpoint in `home`.

    None where there is none that only we could have written.
    """
    path = home / "daemon.json"
    try:
        # In a folder that others may write to, a planted endpoint would bring them our prompts and images.
        if os.name == "posix" and path.stat(follow_symlinks=False).st_mode & 0o077:
            return None
        return Endpoint(**json.loads(read_private_text(path)))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def write(home: Path, endpoint: Endpoint) -> None:
    """Write the endpoint file. Raises OSError."""
    atomic.atomic_write(home / "daemon.json", json.dumps(asdict(endpoint)))


def remove(home: Path, endpoint: Endpoint) -> None:
    """Delete the endpoint file if it is still this one."""
    if read(home) == endpoint:
        (home / "daemon.json").unlink(missing_ok=True)
