"""dev.py on a machine where not all goes well: what stopped a new user before the first image."""

import subprocess
import venv
from pathlib import Path
from typing import Any

import pytest

import dev


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an environment that is not there yet."""
    monkeypatch.setattr(dev, "HOME", tmp_path / ".venv")
    monkeypatch.setattr(dev, "BIN", tmp_path / ".venv" / "bin")
    return tmp_path / ".venv"


def test_python_without_ensurepip_reports_which_package_is_missing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise subprocess.CalledProcessError(1, "ensurepip")

    monkeypatch.setattr(venv, "create", fail)
    with pytest.raises(SystemExit) as message:
        dev.installed("")
    assert "apt install python3-venv" in str(message.value)


def test_environment_that_was_left_half_made_is_made_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted, or made before the missing package was installed: a python is there, and no pip."""
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "python").touch()
    made: list[Path] = []
    monkeypatch.setattr(venv, "create", lambda where, **options: made.append(where))
    monkeypatch.setattr(subprocess, "call", lambda *args, **kwargs: 0)
    dev.installed("")
    dev.installed("")
    assert made == [home], "once; then its stamp says that it is whole"


@pytest.mark.parametrize(("system", "links"), [("posix", True), ("nt", False)])
def test_environment_links_to_its_python_except_on_windows(
    home: Path, system: str, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy of a uv-managed Python does not find its library."""
    made: list[dict[str, Any]] = []

    def create(where: Path, **options: Any) -> None:
        made.append(options)
        raise subprocess.CalledProcessError(1, "ensurepip")

    monkeypatch.setattr(venv, "create", create)
    with monkeypatch.context() as patched:
        patched.setattr(dev.os, "name", system)
        with pytest.raises(SystemExit):
            dev.installed("")
    assert made == [{"with_pip": True, "symlinks": links}]
