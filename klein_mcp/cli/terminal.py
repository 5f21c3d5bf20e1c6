"""Terminal output: a progress bar, this program's command, harmless text."""

import os
import shlex
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress

    from klein_mcp.errors import RequestAction

SENTENCES: "Mapping[RequestAction, str]" = {
    "list": "klein-mcp list shows {shows}.",
    "view": "klein-mcp info describes {shows}.",
    "wait": "klein-mcp list shows {shows}.",
    "make": "Name a file or a handle; klein-mcp list shows them.",
    "repaint": "An MCP client, asked to remove its background, does it by painting.",
}
"""The next step after an error, as a command."""


def error_line(error: Exception) -> str:
    """Return an error in one line, its next step as a command."""
    from engine.contract import EngineError
    from klein_mcp.errors import RequestError, explain, request_error_line

    if isinstance(error, EngineError):
        return explain(error)
    return request_error_line(error, SENTENCES) if isinstance(error, RequestError) else str(error)


def program() -> list[str]:
    """Return how this program was started, by absolute path."""
    started = Path(sys.argv[0]).absolute()
    return [str(started)] if started.stem == "klein-mcp" else [sys.executable, "-m", "klein_mcp"]


def stable_command() -> list[str]:
    """Return `program()`, or uvx instead of a file in its cache."""
    command = program()
    uvx = shutil.which("uvx")
    return [uvx, "klein-mcp"] if uvx and "archive-v0" in Path(command[0]).parts else command


def shell_line(command: Sequence[str]) -> str:
    """Return a command as this system's shell reads it."""
    return subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)


def ask(question: str) -> str:
    """Return what is typed, "" for Ctrl-D.

    The question goes to stderr, so that stdout holds results alone.
    """
    print(question, end=" ", file=sys.stderr, flush=True)
    answer = sys.stdin.readline()
    if not answer:
        print(file=sys.stderr)
    return answer.strip()


def strip_control_chars(text: str) -> str:
    """Remove characters that could control the terminal or reverse its text."""
    return "".join(map(_strip, text))


def _strip(c: str) -> str:
    if c in "\n\t":
        return c
    if c.isspace():
        return " "  # a vertical tab, a carriage return
    if unicodedata.category(c) == "Cs":
        return "?"  # a lone surrogate: JSON and file names can hold one, no terminal can show it
    return "" if unicodedata.category(c) == "Cc" or unicodedata.bidirectional(c) in _BIDI_CONTROLS else c


_BIDI_CONTROLS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


class ProgressBar:
    """A progress bar on stderr, only on a terminal, erased afterwards.

    `with ProgressBar("loading") as bar: bar.update(0.4, "step 2 of 4")`. rich honours NO_COLOR and dumb terminals.
    """

    def __init__(self, message: str) -> None:
        self._message = message
        self._progress: Progress | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            self._progress = Progress(
                SpinnerColumn(),
                BarColumn(bar_width=24),
                TimeElapsedColumn(),
                TextColumn("{task.description}", markup=False),
                console=Console(stderr=True),
                transient=True,
            )
            self._progress.start()
            self._task = self._progress.add_task(self._message, total=None)
        return self

    def update(self, fraction: float, message: str) -> None:
        """Show `fraction` (0 … 1) of the total and a message."""
        if self._progress is not None:
            changed, self._message = message != self._message, message
            # A new message at once: ten refreshes a second would miss short steps.
            self._progress.update(self._task, completed=fraction, total=1.0, description=message, refresh=changed)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
