"""Terminals, homes and environments as people have them: one line, never a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from klein_mcp.cli.doctor_files import check_daemon_files
from klein_mcp.daemon import __main__ as daemon
from klein_mcp.images.library import Store
from klein_mcp.settings import Settings
from tests.real_server import PATIENCE, RealServer

posix = pytest.mark.skipif(os.name != "posix", reason="homes and folders of POSIX")
EMOJI = "a cat 🐈 on a Straße × 2"


def run(home: Path, *words: str, cwd: Path | None = None, **environment: str) -> "subprocess.CompletedProcess[bytes]":
    """Run the program on a data folder, without variables set to ""."""
    merged = {**RealServer(home).environment(), **environment}
    return subprocess.run(
        [sys.executable, "-m", "klein_mcp", *words],
        cwd=cwd,
        env={name: value for name, value in merged.items() if value or name not in environment},
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=PATIENCE,
    )


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A data folder with one image whose prompt few terminals can show."""
    store = Store(tmp_path / "home" / "library")
    store.put(
        b"image", handle=store.new_handle(), pixels="0", size=(8, 8), client="c", tool="generate_image", recipe={},
        prompt=EMOJI,
    )  # fmt: skip
    store.close()
    return tmp_path / "home"


@pytest.mark.parametrize("encoding", ["cp1252", "gbk", "ascii"])
@pytest.mark.parametrize("command", ["list", "status"])
def test_terminal_of_any_encoding_shows_what_it_can(home: Path, encoding: str, command: str):
    ran = run(home, command, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert (ran.returncode, ran.stderr) == (0, b"")
    if command == "list":
        assert b"a cat ? on a " in ran.stdout


@posix
@pytest.mark.parametrize("value", ["", "/"])
def test_without_a_usable_home_folder_commands_work(home: Path, value: str):
    ran = run(home, "list", HOME=value)
    assert ran.returncode == 0, ran.stderr
    assert b"a cat" in ran.stdout


@posix
def test_broken_config_is_one_line_also_from_doctor(home: Path):
    (home / "config.toml").write_text("a = " + "[" * 5000)
    for command in ("list", "doctor"):
        ran = run(home, command)
        assert ran.returncode == 1
        assert ran.stderr.count(b"\n") == 1
        assert len(ran.stderr) < 400
        assert b"config.toml" in ran.stderr
    assert ran.stdout.startswith(b"todo  settings: ")


def test_damaged_index_is_one_line(home: Path):
    (home / "library" / "library.sqlite3").write_bytes(b"garbage" * 1000)
    ran = run(home, "list")
    assert (ran.returncode, ran.stderr.count(b"\n")) == (1, 1)
    assert b"doctor --repair" in ran.stderr


@posix
def test_deleted_working_folder_is_named(home: Path, tmp_path: Path):
    gone = tmp_path / "gone"
    gone.mkdir()
    script = (
        f"import os, sys; os.rmdir({str(gone)!r}); sys.path.insert(0, {str(Path(__file__).parents[2])!r});"
        "from klein_mcp.cli.main import main; sys.exit(main(['demo']))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=gone, env=RealServer(home).environment(), capture_output=True,
        timeout=PATIENCE,
    )  # fmt: skip
    assert ran.returncode == 1
    assert ran.stderr.endswith(b"The folder this was started in is gone.\n")
    assert ran.stderr.count(b"\n") == 1


def test_foreign_numpy_on_the_path_is_named(home: Path, tmp_path: Path):
    (tmp_path / "numpy").mkdir()
    (tmp_path / "numpy" / "__init__.py").write_text("raise ImportError('no module named numpy._core')")
    ran = run(home, "paint", "a cat", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert (ran.returncode, ran.stderr.count(b"\n")) == (1, 1)
    assert b"PYTHONPATH is" in ran.stderr


@posix
def test_log_is_never_written_through_a_link(tmp_path: Path):
    from klein_mcp.private import open_log

    target = tmp_path / "mine.txt"
    target.write_text("mine")
    (tmp_path / "daemon.err").symlink_to(target)
    for append in (False, True):
        with pytest.raises(OSError, match="it is a link"):
            open_log(tmp_path / "daemon.err", append=append)
    assert target.read_text() == "mine"
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="it is not a regular file"):
        open_log(tmp_path / "fifo")


@posix
@pytest.mark.parametrize("kind", ["link", "FIFO"])
def test_daemon_ends_in_one_line_where_its_log_is_no_file(
    kind: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """A FIFO had hung it, and everything that waits for it, for ever."""
    target = tmp_path / "mine.txt"
    target.write_text("mine")
    (home / "daemon.log").symlink_to(target) if kind == "link" else os.mkfifo(home / "daemon.log")
    monkeypatch.setenv("KLEIN_HOME", str(home))
    assert daemon.main() == 1
    written = capfd.readouterr().err
    assert (written.count("\n"), "daemon.log cannot be used as a log: it is " in written) == (1, True), written
    assert target.read_text() == "mine"
    (finding,) = check_daemon_files(Settings(home=home))
    assert "so no engine can start" in finding.found


@posix
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_token_of_any_editor_is_read_and_others_access_is_reported(
    tmp_path: Path, encoding: str, capsys: pytest.CaptureFixture[str]
):
    from klein_mcp.private import read_token

    path = tmp_path / "token"
    path.write_text("a-word-that-is-long-enough\r\n", encoding=encoding)
    path.chmod(0o644)
    assert read_token(path) == "a-word-that-is-long-enough"
    assert "chmod 600" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", [[[0, 1]], [["NaN", 1]], [[1, -1]], [[1e999, 2]], "x", [[[]]]])
def test_timing_history_that_cannot_be_divided_by_is_dropped(tmp_path: Path, seconds: object):
    import json

    from engine.contract import Job
    from klein_mcp.jobs.timing import TimingHistory

    (tmp_path / "history.json").write_text(json.dumps({"seconds": {"auto": seconds}, "native": {"auto": 16384}}))
    assert TimingHistory(tmp_path / "history.json").seconds(Job("a cat")) is None
