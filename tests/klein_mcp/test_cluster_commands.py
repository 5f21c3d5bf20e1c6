"""`klein-mcp cluster` up to the point where Ray would start."""

import sys
from pathlib import Path

import pytest

from klein_mcp.cli.main import main
from klein_mcp.cluster import machine

TOKEN = "a token of these tests"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KLEIN_HOME", str(tmp_path / "home"))
    for name in ("KLEIN_ENGINE_TOKEN_FILE", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_USAGE_STATS_ENABLED"):
        monkeypatch.setenv(name, "")  # so that what a command sets is undone
    monkeypatch.setenv("RAY_SERVE_LOG_TO_STDERR", "0")
    return tmp_path / "home"


@pytest.fixture
def token(tmp_path: Path) -> Path:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    return file


def test_token_file_that_cannot_be_used_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    short = tmp_path / "short"
    short.write_text("abc")
    for file, words in ((short, "at least 16 characters"), (tmp_path / "none", "No such file")):
        assert main(["cluster", "join", "127.0.0.1:1", "--token-file", str(file)]) == 1
        complaint = capsys.readouterr().err
        assert str(file) in complaint
        assert words in complaint


def test_address_in_a_network_needs_a_certificate(token: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["cluster", "up", "--listen", "0.0.0.0:8000", "--token-file", str(token)]) == 2
    assert "--certificate" in capsys.readouterr().err


def test_machine_in_no_cluster_has_nothing_to_leave_or_report(capsys: pytest.CaptureFixture[str]):
    assert main(["cluster", "down", "--json"]) == 0
    assert capsys.readouterr().out == '{"left": false}\n'
    assert main(["cluster", "status"]) == 1
    assert "in no cluster" in capsys.readouterr().err


def test_missing_extra_is_named(token: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    assert main(["cluster", "join", "127.0.0.1:1", "--token-file", str(token)]) == 1
    assert "pip install 'klein-mcp[ray]'" in capsys.readouterr().err


def test_ray_gets_a_secret_that_does_not_show_the_token(token: Path):
    made = machine.environment_of(token)
    assert made["RAY_AUTH_MODE"] == "token"
    assert len(made["RAY_AUTH_TOKEN"]) == 64
    assert TOKEN not in "".join(made.values())
    assert made == machine.environment_of(token), "every machine derives the same"


@pytest.mark.parametrize(("visible", "count"), [("0,3", 2), ("", 0), ("-1", 0), ("GPU-5f", 1)])
def test_visible_gpus_are_counted_without_torch(visible: str, count: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine.gpus_here() == count


def test_process_of_another_program_is_not_taken_for_ours(home: Path):
    home.mkdir()
    machine.write_member(home, machine.Member(1, "127.0.0.1:6379", "/token"))
    assert machine.read_member(home) is None, "number 1 is init"
    assert machine.leave(home) is False
    assert not (home / "cluster.json").exists()
