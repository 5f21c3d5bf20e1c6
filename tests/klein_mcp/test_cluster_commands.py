"""`klein-mcp cluster` up to the point where Ray would start."""

import argparse
import os
import shutil
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from klein_mcp.cli.main import build_parser, main
from klein_mcp.cluster import machine, report
from klein_mcp.cluster.application import Deployment, deploy
from klein_mcp.errors import RequestError
from tests.klein_mcp.test_engine_command import make_certificate

TOKEN = "a-token-of-these-tests"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KLEIN_HOME", str(tmp_path / "home"))
    for name in ("KLEIN_ENGINE_TOKEN_FILE", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_USAGE_STATS_ENABLED"):
        monkeypatch.setenv(name, "")  # so that what a command sets is undone
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
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
    several = tmp_path / "several"
    several.write_text("several words of at least 16 characters")
    one_word = "one word of at least 16 ASCII characters"
    for file, words in ((short, one_word), (several, one_word), (tmp_path / "none", "No such file")):
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
    assert "pip install '.[ray]'" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="modes of files")
def test_token_that_others_may_read_is_named(token: Path, capsys: pytest.CaptureFixture[str]):
    token.chmod(0o644)
    machine.environment_of(token)
    assert f"other users may read the token in {token}; run: chmod 600" in capsys.readouterr().err


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


def arguments(*words: str) -> argparse.Namespace:
    return build_parser(["cluster"]).parse_args(["cluster", "up", "--token-file", "F", *words])


@pytest.mark.parametrize(
    ("gpus", "words", "per_engine", "places"),
    [
        (4, "", 1, 4),
        (4, "--gpus 0.5", 0.5, 8),
        (4, "--gpus 0.4", 0.4, 8),
        (4, "--gpus 0.1", 0.1, 40),
        (4, "--gpus 2", 2, 2),
        (4, "--gpus 0", 0, 1),
        (4, "--engines 3", 1, 3),
        (1, "--engines 3", 1, 1),
        (1, "--engines 3 --gpus 0", 0, 3),
        (0, "", 0, 1),
        (0, "--engines 3", 0, 3),
        (0, "--gpus 1", 1, 0),
    ],
)
def test_machine_has_room_for_what_its_gpus_carry(
    gpus: int, words: str, per_engine: float, places: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus))))
    asked = arguments(*words.split())
    assert (machine.gpus_per_engine(asked), machine.places(asked)) == (per_engine, places)


@pytest.mark.parametrize("gpus", ["1.5", "-1", "nan", "inf", "all"])
def test_gpus_that_ray_cannot_give_are_refused(gpus: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        arguments(f"--gpus={gpus}")
    assert f"'{gpus}' is not 0, a part of a GPU such as 0.5, or whole ones" in capsys.readouterr().err


def test_proxies_get_whole_paths_of_the_certificate(
    token: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """They run in other folders, and on other machines."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    started: dict[str, Any] = {}
    serve = SimpleNamespace(start=lambda **options: started.update(options), status=None)
    monkeypatch.setitem(sys.modules, "ray.serve", serve)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(serve=serve))
    monkeypatch.setattr(machine, "member_of", lambda *_: nullcontext())
    monkeypatch.chdir(tmp_path)
    certificate, key = make_certificate(tmp_path, "localhost")
    tls = ("--certificate", certificate.name, "--key", key.name)
    assert main(["cluster", "up", "--listen", "127.0.0.1:0", "--token-file", str(token), *tls]) == 1
    assert "do not start" in capsys.readouterr().err, "no Ray is here"
    files = {started["http_options"][name] for name in ("ssl_certfile", "ssl_keyfile")}
    assert files == {str(certificate), str(key)}


@pytest.mark.parametrize("option", ["--listen", "--port"])
def test_port_that_is_taken_is_named_before_ray_starts(
    option: str, token: Path, home: Path, capsys: pytest.CaptureFixture[str]
):
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        listen, port = (taken, 0) if option == "--listen" else (0, taken)
        words = ("--listen", f"127.0.0.1:{listen}", "--port", str(port), "--token-file", str(token))
        assert main(["cluster", "up", *words]) == 1
    complaint = capsys.readouterr().err
    assert complaint.startswith(f"klein-mcp: {option} cannot be used: Address already in use")
    assert complaint.count("\n") == 1
    assert not (home / machine.LOG).exists()


def test_engine_that_does_not_start_is_named_by_its_own_error(monkeypatch: pytest.MonkeyPatch):
    """Ray's error says only that a deployment failed."""

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("Deploying application klein failed: Failed to update the deployments ['engine'].")

    engines = SimpleNamespace(message="It failed 3 times.\n  File ...\nRuntimeError: Another build.", replica_states={})
    state = SimpleNamespace(
        status=SimpleNamespace(value="DEPLOY_FAILED"), message="Failed.", deployments={"engine": engines}
    )
    serve = SimpleNamespace(start=fail, status=lambda: SimpleNamespace(applications={"klein": state}))
    monkeypatch.setitem(sys.modules, "ray.serve", serve)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(serve=serve, nodes=list))
    with pytest.raises(RequestError, match="do not start: RuntimeError: Another build"):
        deploy(Deployment())
    assert report.cluster_report()["message"] == "RuntimeError: Another build."


def test_failure_within_ray_is_its_last_line(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("Deploying failed:\n  File ...\nRuntimeError: This machine has another build.\n")

    serve = SimpleNamespace(start=fail, status=fail)
    monkeypatch.setitem(sys.modules, "ray.serve", serve)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(serve=serve, nodes=list))
    for call in (lambda: deploy(Deployment()), report.cluster_report):
        with pytest.raises(RequestError) as complaint:
            call()
        message = str(complaint.value)
        assert ": RuntimeError: This machine has another build." in message
        assert "\n" not in message


def test_engines_share_the_processors_of_their_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Ray sets one thread for an engine that reserves no processor."""
    scripts = tmp_path / "ray" / "scripts"
    scripts.mkdir(parents=True)
    for folder in (scripts, scripts.parent):
        (folder / "__init__.py").touch()
    (scripts / "scripts.py").write_text("import os; print(os.environ['OMP_NUM_THREADS'])")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "_processors", lambda: 12)

    def threads(engines: int) -> str:
        machine.start_ray(tmp_path, [], {}, {machine.RESOURCE: engines}).wait()
        return (tmp_path / machine.LOG).read_text().strip()

    assert [threads(engines) for engines in (0, 1, 4, 99)] == ["12", "12", "3", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert threads(1) == "2", "the user's own counts"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells in /proc")
def test_ray_is_found_where_no_ps_is_installed(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    home.mkdir()
    command = [sys.executable, "-c", "print(flush=True); input()", "ray.scripts.scripts"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline(), "only now its command line is sure to be there"
        machine.write_member(home, machine.Member(process.pid, "127.0.0.1:6379", "/token"))
        assert machine.read_member(home)
        os.kill(process.pid, 9)
    assert machine.read_member(home) is None
