"""One toy for all tests of loading, in the layouts they need, and a compiler that compiles nothing."""

import threading
from pathlib import Path

import pytest
from torch import Tensor

from engine.families.klein import runner as runner_module
from tests.engine import published
from tests.engine.runners import InstantCompiler


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder. Nobody may write into it."""
    return published.toy(tmp_path_factory.mktemp("klein") / "toy")


@pytest.fixture(scope="session")
def bfl(folder: Path) -> dict[str, Tensor]:
    """The toy's transformer under BFL's names."""
    return published.bfl_transformer(folder)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> type[InstantCompiler]:
    """The stand-in that runners get. It ends when its gate opens."""

    class Compiler(InstantCompiler):
        gate = threading.Event()

    monkeypatch.setattr(runner_module, "Compiler", Compiler)
    return Compiler
