"""Child processes of the GPU benchmark: results as lines of JSON, and an end that none can miss.

A child prints one line of JSON a section. It may tell that it is ready and wait for its turn: Python and its libraries
are then loaded, and the GPU is not touched. The parent imports nothing heavy, so that no child can stop it.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from queue import Empty, Queue
from typing import Any

Message = dict[str, Any]
ROOT = Path(__file__).parents[2]
TAIL = 3000
"""Bytes of a process's errors that are kept."""


def say(section: str, result: Mapping[str, Any]) -> None:
    """Print the result of a section for the parent."""
    print(json.dumps({"section": section, **result}, default=str), flush=True)


def wait_for_go() -> float:
    """Tell the parent that this process is ready, and return until when it may run, as time.time() counts.

    The process ends where the parent has no turn for it.
    """
    print(json.dumps({"ready": True}), flush=True)
    line = sys.stdin.readline()
    if not line.strip():
        sys.exit(0)
    return float(line)


class Child:
    """A process and its messages."""

    def __init__(
        self,
        name: str,
        module: str,
        arguments: Iterable[object],
        heard: "Queue[tuple[Child, Message | None]]",
        environment: Mapping[str, str],
        *,
        nice: bool = False,
    ) -> None:
        """Start a module of this repository.

        heard: gets its messages, and None at its end. nice: other processes come first.
        """
        self.name, self._heard = name, heard
        self.sections: dict[str, Message] = {}
        self.ready = self.ended = False
        """As the parent has heard so far."""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - it is open as long as this object
        polite = ["nice", "-n", "10"] if nice and shutil.which("nice") else []
        self._process = subprocess.Popen(
            [*polite, sys.executable, "-m", module, *map(str, arguments)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self._errors, text=True, start_new_session=True, cwd=ROOT,
            env={**os.environ, **environment},
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        threading.Thread(target=self._wait, daemon=True).start()

    def go(self, seconds: float) -> None:
        """Let the process run for so many seconds."""
        self.ready = False
        with suppress(OSError):
            assert self._process.stdin
            self._process.stdin.write(f"{time.time() + seconds}\n")
            self._process.stdin.flush()

    def kill(self) -> None:
        """End the process and all that it started."""
        with suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    @property
    def errors(self) -> str:
        """The end of what the process wrote to its standard error."""
        # Not through its own position, which the process shares.
        size = os.fstat(self._errors.fileno()).st_size
        return os.pread(self._errors.fileno(), TAIL, max(0, size - TAIL)).decode(errors="replace").strip()

    @property
    def failed(self) -> bool:
        """Whether the process or a section of it failed."""
        bad = any("error" in result or result.get("failed") for result in self.sections.values())
        return bad or (self.ended and self.died)

    @property
    def died(self) -> bool:
        """Whether the process ended by itself with an error."""
        return self._process.poll() not in (None, 0, -signal.SIGKILL)

    @property
    def complaint(self) -> str:
        """The exit status and the last line of standard error."""
        return f"exit status {self._process.poll()}: {(self.errors.splitlines() or ['no output'])[-1][:300]}"

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            with suppress(json.JSONDecodeError):
                message = json.loads(line)
                if isinstance(message, dict):
                    self._heard.put((self, message))

    def _wait(self) -> None:
        self._process.wait()
        # A compiler's workers may hold the pipe open longer than this process runs.
        self._reader.join(2.0)
        self._heard.put((self, None))


class Children:
    """All children of a run."""

    def __init__(self, heard: Callable[[str, Message], None]) -> None:
        """heard: is called with each section's name and result, in this thread."""
        self._tell = heard
        self._queue: Queue[tuple[Child, Message | None]] = Queue()
        self.all: list[Child] = []

    def start(self, name: str, module: str, *arguments: object, nice: bool = False, **environment: str) -> Child:
        """Start a module of this repository as a process."""
        child = Child(name, module, arguments, self._queue, environment, nice=nice)
        self.all.append(child)
        return child

    def listen(self, until: Callable[[], bool], seconds: float) -> bool:
        """Hear the children until a condition holds, and return whether it does in time."""
        deadline = time.monotonic() + seconds
        while not until():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            with suppress(Empty):
                self._hear(*self._queue.get(timeout=min(left, 1.0)))
        return True

    def finish(self, children: Iterable[Child], seconds: float) -> None:
        """Hear these children to their ends, and kill those that are late."""
        children = tuple(children)
        self.listen(lambda: all(child.ended for child in children), seconds)
        late = [child for child in children if not child.ended]
        self.kill(late)
        for child in late:
            self._tell(child.name, {"error": f"killed after {seconds:.0f} s"})

    def kill(self, children: Iterable[Child] | None = None) -> None:
        """Kill these children, by default all, and hear their last messages."""
        chosen = [child for child in (self.all if children is None else children) if not child.ended]
        for child in chosen:
            child.kill()
        self.listen(lambda: all(child.ended for child in chosen), 5.0)

    def _hear(self, child: Child, message: Message | None) -> None:
        if message is None:
            child.ended = True
            if child.died:
                self._tell(child.name, {"error": child.complaint})
        elif message.get("ready"):
            child.ready = True
        elif "section" in message:
            section = str(message.pop("section"))
            child.sections[section] = message
            self._tell(section, message)
