"""The real program on the embedded model, in a home of its own: what a user's machine would run."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mcp.client.stdio import StdioServerParameters


@dataclass(frozen=True)
class Living:
    """One home, and so one engine for everything started in it."""

    home: Path

    def environment(self, **more: str) -> dict[str, str]:
        """The user's own environment without their settings of klein-mcp."""
        theirs = {key: value for key, value in os.environ.items() if not key.startswith("KLEIN_")}
        ours = {"KLEIN_HOME": str(self.home), "KLEIN_MODEL": "nano", "KLEIN_THREADS": "1", "OMP_NUM_THREADS": "1"}
        # An engine that starts on a busy machine may take longer than a client would wait: still an image, not a job.
        ours["KLEIN_WAIT_BUDGET"] = "120"
        return {**theirs, **ours, **more}

    def stdio(self, *arguments: str, **more: str) -> StdioServerParameters:
        """Return how a client starts the server."""
        return StdioServerParameters(
            command=sys.executable, args=["-m", "klein_mcp", *arguments], env=self.environment(**more)
        )

    def run(self, *command: str, cwd: Path | None = None, **more: str) -> subprocess.CompletedProcess[str]:
        """A Python program of the project, to its end."""
        return subprocess.run(
            [sys.executable, *command],
            cwd=cwd,
            env=self.environment(**more),
            capture_output=True,
            text=True,
            timeout=300,
            stdin=subprocess.DEVNULL,
        )


@contextmanager
def living(home: Path) -> Iterator[Living]:
    """Whatever engine was started in `home` is gone afterwards."""
    place = Living(home)
    try:
        yield place
    finally:
        place.run("-m", "klein_mcp", "stop")
