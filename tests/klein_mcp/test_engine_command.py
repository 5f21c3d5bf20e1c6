"""`klein-mcp engine`: what it refuses before it listens, and how it ends."""

import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from engine.contract import DeviceLost, EngineFailed, Job
from klein_mcp.cli.main import main
from klein_mcp.daemon.endpoint import BuildInfo
from klein_mcp.daemon.executors import local
from klein_mcp.daemon.executors.remote import RemoteExecutor
from tests.fakes import FakeExecutor


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KLEIN_HOME", str(tmp_path / "home"))
    file = tmp_path / "token"
    file.write_text("a-token-of-these-tests\n")
    file.chmod(0o600)
    return file


@pytest.fixture
def pem(tmp_path: Path) -> tuple[Path, Path]:
    """Make a certificate and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    return make_certificate(tmp_path, "localhost")


def make_certificate(folder: Path, host: str) -> tuple[Path, Path]:
    """Run the command of docs/scale.md."""
    certificate, key = folder / f"{host}.cert.pem", folder / f"{host}.key.pem"
    command = (
        f"openssl req -x509 -newkey rsa:2048 -nodes -days 365 -subj /CN={host} -addext subjectAltName=DNS:{host} "
        f"-keyout {key} -out {certificate}"
    )
    subprocess.run(command.split(), check=True, capture_output=True)
    return certificate, key


@pytest.mark.parametrize("listen", ["18800", ":18800", "127.0.0.1", "127.0.0.1:", "127.0.0.1:65536", "127.0.0.1:http"])
def test_address_without_host_or_port_is_refused(token: Path, listen: str, capsys: pytest.CaptureFixture[str]):
    assert main(["engine", "--listen", listen, "--token-file", str(token)]) == 2
    assert capsys.readouterr().err == f"klein-mcp engine: {listen!r} is not HOST:PORT\n"


def test_file_that_is_missing_is_named_before_it_listens(
    token: Path, pem: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
):
    certificate, key = map(str, pem)
    nothing = str(token.with_name("nothing"))
    for files in (["--certificate", nothing, "--key", key], ["--certificate", certificate, "--key", nothing]):
        assert main(["engine", "--listen", "127.0.0.1:0", "--token-file", str(token), *files]) == 2
        option = files[files.index(nothing) - 1]
        assert capsys.readouterr().err == f"klein-mcp engine: {option} {nothing}: No such file or directory\n"
    assert main(["engine", "--listen", "127.0.0.1:0", "--token-file", nothing]) == 1
    complaint = capsys.readouterr().err
    assert nothing in complaint
    assert "listens" not in complaint


def test_certificate_that_tls_cannot_use_is_refused(
    token: Path, pem: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    certificate, key = pem
    _, other = make_certificate(tmp_path, "other")
    for first, second in ((certificate, other), (key, key), (token, key)):
        files = ["--certificate", str(first), "--key", str(second)]
        assert main(["engine", "--listen", "127.0.0.1:0", "--token-file", str(token), *files]) == 2
        assert f"--certificate {first} and --key {second} cannot be used" in capsys.readouterr().err
    assert main(["engine", "--listen", "127.0.0.1:0", "--token-file", str(token), "--key", str(key)]) == 2
    assert "--key needs --certificate" in capsys.readouterr().err


def test_engine_that_lost_its_device_ends_with_an_error(
    token: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    executor, codes, printed = FakeExecutor(), [], ""
    executor.error = DeviceLost("The GPU no longer answers.")
    monkeypatch.setattr(local, "make_local", lambda settings: executor)
    command = ["engine", "--listen", "127.0.0.1:0", "--token-file", str(token)]
    serving = threading.Thread(target=lambda: codes.append(main(command)), daemon=True)
    serving.start()
    while not printed.endswith("\n"):
        assert serving.is_alive(), printed
        serving.join(0.01)
        printed += capsys.readouterr().err
    remote = RemoteExecutor([f"http://{printed.split()[-1]}"], token.read_text().strip(), BuildInfo.read())
    with pytest.raises(EngineFailed, match="The GPU no longer answers"):
        list(remote.run(Job("a cat")))
    serving.join(60)
    assert codes == [1]
    assert "start it again" in capsys.readouterr().err
