"""For whoever sits at a terminal: a bar while something long is done, the name to call us by, text that stays text."""

import shutil
import sys
import unicodedata
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress


def program() -> list[str]:
    """How this program was started, by its whole path: what a client needs that does not see this terminal's PATH."""
    called = Path(sys.argv[0]).absolute()
    return [str(called)] if called.stem == "klein-mcp" else [sys.executable, "-m", "klein_mcp"]


def lasting() -> list[str]:
    """The same for a configuration: what uvx has put into its cache may be gone tomorrow, uvx is not."""
    command = program()
    uvx = shutil.which("uvx")
    return [uvx, "klein-mcp"] if uvx and "archive-v0" in Path(command[0]).parts else command


def harmless(text: str) -> str:
    """What strangers wrote, without what could move the cursor, change the terminal or turn its text round."""
    return "".join(map(_harmless, text))


def _harmless(c: str) -> str:
    if c in "\n\t":
        return c
    if c.isspace():
        return " "  # a vertical tab, a carriage return
    if unicodedata.category(c) == "Cs":
        return "?"  # half of a pair: JSON and file names can hold it, no terminal can show it
    return "" if unicodedata.category(c) == "Cc" or unicodedata.bidirectional(c) in _TURNS else c


_TURNS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


class ProgressBar:
    """`with Bar("loading") as bar: bar.tell(0.4, "step 2 of 4")`; gone from the screen when it is over.

    stdout stays what a script would want, and rich keeps to NO_COLOR and to terminals that can do nothing.
    """

    def __init__(self, words: str) -> None:
        self._words = words
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
            self._task = self._progress.add_task(self._words, total=None)
        return self

    def tell(self, fraction: float, words: str) -> None:
        """fraction: 0 … 1 of the whole."""
        if self._progress is not None:
            new, self._words = words != self._words, words
            # New words at once: ten times a second is too seldom for a step that is over in less.
            self._progress.update(self._task, completed=fraction, total=1.0, description=words, refresh=new)

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
