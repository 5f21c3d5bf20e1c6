"""One toy for all tests of loading, in the layouts they need."""

from pathlib import Path

import pytest
from torch import Tensor

from tests.engine import published


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder. Nobody may write into it."""
    return published.toy(tmp_path_factory.mktemp("klein") / "toy")


@pytest.fixture(scope="session")
def bfl(folder: Path) -> dict[str, Tensor]:
    """The toy's transformer under BFL's names."""
    return published.bfl_transformer(folder)
