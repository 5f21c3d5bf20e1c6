"""AutoChoice: the model that `auto` means."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.contract import EngineError, OutOfMemory
from engine.families.klein.checkpoint import FileState
from engine.families.klein.variants import AUTO_ORDER, EMBEDDED
from engine.registry import InstalledModel

Paths = tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class _Failure:
    """A model's failure to load.

    paths: where it was installed. files: as they were then. temporary: it may be over the next time.
    """

    reason: str
    paths: Paths | None
    files: FileState
    temporary: bool


class AutoChoice:
    """Chooses the best installed model that fits, or the embedded one."""

    def __init__(
        self, installed_models: Callable[[], Sequence[InstalledModel]], obstacle: Callable[[str], str]
    ) -> None:
        """obstacle: why a model, by name, cannot be resident, or ""."""
        self._installed_models, self._obstacle = installed_models, obstacle
        self.obstacles: dict[str, str] = {}
        """Why a model was passed over when the last choice was made."""
        self._chosen = ""
        self._best: tuple[dict[str, Paths], str] | None = None  # installed models, and the best of them
        self._failures: dict[str, _Failure] = {}

    def name(self, loaded: str) -> str:
        """Return the model to load.

        The choice stays while it is `loaded`: the memory it fills itself must not count against it.
        """
        if not self._chosen or self._chosen != loaded:
            self._chosen = self._search(loaded)
        return self._chosen

    def failed(self, name: str, error: EngineError, files: FileState) -> None:
        """Pass over a model that did not load, until its files change.

        files: those that were read. Without any, or where memory is short, only until `forget_temporary`.
        """
        temporary = isinstance(error, OutOfMemory) or not files.paths
        self._failures[name] = _Failure(does_not_load(error), self._installed().get(name), files, temporary)
        self._best, self._chosen = None, ""

    def forget_temporary(self) -> None:
        """Forget failures that may be over the next time."""
        self._failures = {name: failure for name, failure in self._failures.items() if not failure.temporary}

    def has_loaded(self, name: str) -> None:
        """Forget the failure of a model."""
        self._failures.pop(name, None)

    def _search(self, loaded: str) -> str:
        """Return the best model.

        While any one is loaded, it is searched again only if other models are installed.
        """
        installed = self._installed()
        if not loaded or self._best is None or self._best[0] != installed:
            # Other files of a model, or the same ones replaced, are tried again.
            self._failures = {
                name: failure
                for name, failure in self._failures.items()
                if failure.paths == installed.get(name) and failure.files.are_unchanged()
            }
            self._best = installed, self._look(installed)
        return self._best[1]

    def _look(self, installed: dict[str, Paths]) -> str:
        obstacles = {name: failure.reason for name, failure in self._failures.items()}
        found = EMBEDDED
        for name in AUTO_ORDER:
            if name not in installed or name in obstacles:
                continue
            if not (obstacle := self._obstacle(name)):
                found = name
                break
            obstacles[name] = obstacle
        self.obstacles = obstacles  # all at once: other threads read it
        return found

    def _installed(self) -> dict[str, Paths]:
        """Return the paths of each installed variant."""
        found: dict[str, Paths] = {}
        for model in self._installed_models():
            found[model.name] = (*found.get(model.name, ()), model.path)
        return found


def does_not_load(error: EngineError) -> str:
    return f"does not load: {error.message} {error.hint}".strip()
