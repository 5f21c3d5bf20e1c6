"""Import hook: packages that ship with klein_mcp win over namesakes."""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

NAMES = ("engine", "prompts")
ROOT = Path(__file__).resolve().parents[1]


class OwnPackages(MetaPathFinder):
    """Finds `engine` and `prompts` beside klein_mcp, whatever comes first on sys.path.

    A project folder often has an `engine/` of its own and is on PYTHONPATH, or is the folder a client starts us in.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(fullname, [str(ROOT)], target) if fullname in NAMES else None


def install() -> None:
    """Put the hook first. Calling it twice does no harm."""
    if not any(isinstance(finder, OwnPackages) for finder in sys.meta_path):
        sys.meta_path.insert(0, OwnPackages())
