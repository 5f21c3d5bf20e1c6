"""`klein-mcp doctor`: each line says ok, or what to do."""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections import namedtuple
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import pytest
from filelock import FileLock

from klein_mcp.cli import doctor, doctor_clients, doctor_files, models
from klein_mcp.cli.doctor_clients import check_clients
from klein_mcp.cli.doctor_files import check_daemon_files, check_disk, check_library, check_roots, check_signer
from klein_mcp.daemon.endpoint import ENGINE_LOCK
from klein_mcp.daemon.executors.local import make_engine
from klein_mcp.settings import Settings
from tests.embedded import SIDE
from tests.real_server import PATIENCE, engine_process


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "klein", hub=tmp_path / "hub", device="cpu")


def found(findings: list[doctor.Check]) -> dict[str, doctor.Check]:
    return {finding.subject: finding for finding in findings}


def test_fresh_machine_generates_and_lists_what_is_missing(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: settings.home)
    lines = list(doctor.checks(settings))
    by_subject = found(lines)
    assert list(by_subject) == [
        "Python",
        "torch",
        "disk",
        "library",
        "clients",
        "daemon",
        "device",
        "compiling",
        "model",
        "test image",
    ]
    assert by_subject["daemon"].found.startswith("not running")
    assert "cpu" in by_subject["device"].found
    assert by_subject["model"].todo.startswith("Run: klein-mcp pull klein-4b (16 GB). It needs a GPU")
    assert "claude mcp add klein" in by_subject["clients"].todo
    assert f"{SIDE}×{SIDE} with nano in" in by_subject["test image"].found
    assert {line.subject for line in lines if line.todo} == {"clients", "model"}


def test_every_line_says_ok_or_todo(tmp_path: Path) -> None:
    environment = {"KLEIN_HOME": str(tmp_path / "klein"), "KLEIN_HUB": str(tmp_path / "hub"), "HOME": str(tmp_path),
              "KLEIN_DEVICE": "cpu"}  # fmt: skip
    (tmp_path / ".cursor").mkdir()
    (tmp_path / ".cursor" / "mcp.json").write_text('{"mcpServers": {"klein": {"command": "klein-mcp"}}}')
    call = [sys.executable, "-m", "klein_mcp", "doctor"]
    done = subprocess.run(call, env=os.environ | environment, capture_output=True, text=True, timeout=PATIENCE)
    lines = done.stdout.splitlines()
    assert all(line.startswith(("ok    ", "todo  ")) for line in lines), done.stdout
    assert all(" → " in line for line in lines if line.startswith("todo"))
    assert "ok    clients: configured in Cursor" in done.stdout
    assert "todo  model: only the embedded demo model" in done.stdout
    assert done.returncode == 0, "the embedded model works: the rest is advice"


def test_full_disk_missing_torch_and_wrong_device_say_what_to_do(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10**11, 10**11, 10**9))
    assert "Free some space" in check_disk(settings).todo
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(0, 0, 0))  # as /proc, which root may write to
    assert "would be on no disk" in check_disk(settings).found

    def gone(name: str) -> str:
        raise doctor.PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", gone)
    assert "Install klein-mcp again" in doctor._torch().todo
    missing = Settings(home=settings.home, hub=settings.hub, device="cuda:7")
    assert "this machine has: cpu" in found(list(doctor.checks(missing)))["engine"].todo


def test_model_that_cannot_load_says_why(settings: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "klein-4b"
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "model.safetensors").write_bytes(b"GGUF")
    (folder / "model_index.json").write_text('{"_class_name": "Flux2KleinPipeline", "is_distilled": true}')
    lines = list(doctor.checks(Settings(home=settings.home, hub=settings.hub, device="cpu", models=(folder,))))
    (broken,) = [line for line in lines if line.found.startswith("klein-4b")]
    assert "has no vae folder" in broken.todo
    assert not broken.optional


@pytest.mark.parametrize(
    ("model", "todo"),
    [
        ("klein-4b", "Run: klein-mcp pull klein-4b"),
        ("/nope", "No model at /nope"),
        ("klein-4d", "Did you mean klein-4b?"),
    ],
)
def test_default_model_that_is_missing_fails(settings: Settings, model: str, todo: str) -> None:
    lines = list(doctor.checks(replace(settings, model=model)))
    (default,) = [line for line in lines if line.found == f"KLEIN_MODEL is {model}"]
    assert todo in default.todo
    assert not default.optional


def test_default_model_that_is_installed_is_ok(settings: Settings) -> None:
    lines = list(doctor.checks(replace(settings, model="nano")))
    (default,) = [line for line in lines if line.found == "KLEIN_MODEL is nano"]
    assert not default.todo


def test_misspelled_variable_is_advice(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KLEIN_MODLE", "nano")
    (finding,) = [line for line in doctor.checks(settings) if line.subject == "settings"]
    assert finding.found.startswith("KLEIN_MODLE ")
    assert finding.todo == "Did you mean KLEIN_MODEL?"
    assert finding.optional


def test_unusable_model_file_is_advice(settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "models" / "my-klein.gguf"
    file.parent.mkdir()
    file.write_bytes(b"GGUF" + b"\0" * 20)
    changed = Settings(home=settings.home, hub=settings.hub, device="cpu", models=(file.parent, tmp_path / "typo"))
    advice = {line.found: line for line in doctor.checks(changed) if line.subject == "model" and line.todo}
    assert "is not a whole GGUF file" in advice[f"{file} is not usable as it is"].todo
    assert "KLEIN_MODELS" in advice[str(tmp_path / "typo")].todo
    assert all(line.optional for line in advice.values())


def test_terminal_shows_progress_while_libraries_load(settings: Settings, tmp_path: Path) -> None:
    """Importing the libraries that know the device takes seconds."""
    pty = pytest.importorskip("pty")
    for command in ("models", "doctor"):
        terminal, child = pty.openpty()
        environment = {"KLEIN_HOME": str(settings.home), "KLEIN_HUB": str(settings.hub), "KLEIN_DEVICE": "cpu",
                  "HOME": str(tmp_path), "TERM": "xterm"}  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-m", "klein_mcp", command],
            env=os.environ | environment,
            stderr=child,
            stdout=subprocess.PIPE,
        )
        seen = b""
        while b"looking at this machine" not in seen and b"starting the engine" not in seen:
            assert process.poll() is None, seen
            seen += os.read(terminal, 4096)
        process.kill()
        process.communicate()
        os.close(child)
        os.close(terminal)


def test_engines_elsewhere_have_a_line_each_instead_of_models_here(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token, other = tmp_path / "token", tmp_path / "other"
    token.write_text("a-token-of-this-test")
    other.write_text("a-token-of-somebody-else")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stopped = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with engine_process(tmp_path / "one", token) as (one, _), engine_process(tmp_path / "two", other) as (two, _):
        far = replace(settings, engine=(one, two, stopped), engine_token_file=token)
        lines = list(doctor.checks(far))
        assert doctor.run(far, argparse.Namespace(json=False, repair=False)) == 0, "one engine is enough"
        assert models.run(far, argparse.Namespace(json=False)) == 0
    engines = [line for line in lines if line.subject == "engine"]
    assert [line.found.partition(": ")[0] for line in engines] == [one, two, stopped]
    assert not engines[0].todo
    assert "another token than KLEIN_ENGINE_TOKEN_FILE" in engines[1].todo
    assert "is klein-mcp engine running there?" in engines[2].todo
    assert not {line.subject for line in lines} & {"torch", "device", "compiling", "model", "test image"}
    printed = capsys.readouterr().out
    assert f"todo  engine: {stopped} → " in printed
    assert "They tell their models once one of them has made an image." in printed
    assert "fits" not in printed, "this machine's memory is not asked"


@pytest.mark.parametrize(
    ("url", "todo"),
    [
        ("http://192.168.1.5:8000", "would send prompts, images and the token in the clear"),
        ("gpu.example.org:8000", "no address"),
        ("http://127.0.0.1:8000", "nothing cannot be used"),
    ],
)
def test_setting_with_which_no_engine_can_be_asked_fails(
    settings: Settings, tmp_path: Path, url: str, todo: str
) -> None:
    token = tmp_path / ("nothing" if "nothing" in todo else "token")
    (tmp_path / "token").write_text("a-token-of-this-test")
    far = replace(settings, engine=(url,), engine_token_file=token)
    assert todo in found(list(doctor.checks(far)))["engine"].todo
    assert doctor.run(far, argparse.Namespace(json=True, repair=False)) == 1


def test_json_is_printed_for_scripts(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run(settings, argparse.Namespace(json=True, repair=False)) == 0
    findings = json.loads(capsys.readouterr().out)
    assert {"what", "ok", "found", "todo"} == findings[0].keys()


def test_unusable_device_fails(settings: Settings) -> None:
    nowhere = Settings(home=settings.home, hub=settings.hub, device="cuda:7")
    assert doctor.run(nowhere, argparse.Namespace(json=True, repair=False)) == 1


def test_data_folder_that_cannot_be_made_is_no_empty_library(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    settings = Settings(home=tmp_path / "file" / "klein", hub=tmp_path / "hub", device="cpu")
    for check in (check_library(settings), check_disk(settings)):
        assert f"{tmp_path / 'file'} is not a folder" in check.found
        assert "KLEIN_HOME" in check.todo


def test_disk_that_gives_every_file_the_same_mode_is_named(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_exfat(**options: Any) -> IO[bytes]:
        file = make(**options)
        os.fchmod(file.fileno(), 0o755)
        return file

    make = tempfile.TemporaryFile
    assert not list(check_daemon_files(settings))
    monkeypatch.setattr(tempfile, "TemporaryFile", on_exfat)
    (check,) = check_daemon_files(settings)
    assert check.found.startswith(f"{tmp_path} is on a disk that sets owner and mode")
    assert "KLEIN_HOME" in check.todo


def test_daemon_that_does_not_answer_is_named(settings: Settings) -> None:
    settings.home.mkdir()
    with FileLock(settings.home / ENGINE_LOCK):
        check = doctor._daemon(settings)
    assert check.found == "starting, ending or hanging: its process runs and does not answer"
    assert check.optional, "the first call may be starting it"
    assert "stop" in check.todo


def test_roots_that_do_not_exist_are_named(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    odd = replace(settings, read_roots=(tmp_path, tmp_path / "none"), write_roots=(tmp_path / "file",))
    none, file = check_roots(odd)
    assert none.found == f"{tmp_path / 'none'} in KLEIN_READ_ROOTS does not exist"
    assert file.found == f"{tmp_path / 'file'} in KLEIN_WRITE_ROOTS is not a folder"
    assert none.todo
    assert file.todo


def test_credentials_that_cannot_sign_are_named(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not list(check_signer(settings))
    (found,) = check_signer(replace(settings, credentials=str(tmp_path / "none.pem")))
    assert found.todo
    monkeypatch.setattr(doctor_files, "find_spec", lambda name: None)
    (found,) = check_signer(replace(settings, credentials="local"))
    assert "pip install '.[c2pa]'" in found.todo
    assert not (settings.home / "credentials").exists()


@pytest.mark.parametrize("system", [".config", "Library/Application Support", "AppData/Roaming"])
def test_configuration_of_vs_code_is_found_on_every_system(system: str, tmp_path: Path) -> None:
    file = tmp_path / system / "Code" / "User" / "mcp.json"
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    assert check_clients(tmp_path).found == "not configured in VS Code"
    file.write_text('{"servers": {"klein": {"command": "klein-mcp"}}}')
    assert check_clients(tmp_path).found == "configured in VS Code"


FILES = {
    "Codex": """[mcp_servers.klein]
command = "uvx"
args = ["--from", "/home/me/wheels/klein.whl", "klein-mcp"]""",
    "Zed": r"""{ // of Zed
  "context_servers": {"images": {"command": {"path": "C:\\Program Files\\klein-mcp.exe", "args": [],}}}, /* */
}""",
    "Claude Code": '{"projects": {"/a": {"mcpServers": {"a": {"command": "python3", "args": ["-m", "klein_mcp"]}}}}}',
    "Cursor": '{"mcpServers": {"klein": {"url": "http://127.0.0.1:8765/mcp"}}}',
}
STRANGE = {
    "Codex": '[projects."/home/me/klein-mcp"]\ntrust_level = "trusted"',
    "Zed": '{"context_servers": {"klein": "',
    "Claude Code": """{"projects": {"/home/me/klein-mcp": {"mcpServers": {}}},
        "mcpServers": {"files": {"command": "npx", "args": ["server-filesystem", "FOLDER"]}, "klein": null}}""",
    "Cursor": "[" * 100_000,
}


def test_only_an_entry_that_starts_this_server_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "klein-mcp"
    folder.mkdir()

    def found(files: dict[str, str]) -> doctor.Check:
        for name, text in files.items():
            file = tmp_path / doctor_clients.CONFIGURATIONS[name][0]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text.replace("FOLDER", str(folder)))
        return check_clients(tmp_path)

    assert found(FILES).found == "configured in Claude Code, Codex, Cursor, Zed"
    monkeypatch.setattr(sys, "argv", ["/home/me/.cache/uv/archive-v0/a1B2/bin/klein-mcp"])
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    check = found(STRANGE)
    assert check.found == "not configured in Claude Code, Codex, Cursor, Zed"
    assert check.todo.endswith("claude mcp add klein -- /usr/bin/uvx klein-mcp")


def test_gpu_that_this_torch_cannot_use_is_named(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_engine(settings)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    automatic = replace(settings, device="auto")
    assert not doctor._device(automatic, made).todo, "no nvidia-smi here"
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-5f)'\n")
    driver.chmod(0o755)
    finding = doctor._device(automatic, made)
    assert f"This torch ({version('torch')}) cannot use the NVIDIA H200." in finding.todo
    assert "--torch-backend auto" in finding.todo
    assert "UV_TORCH_BACKEND=auto" in finding.todo
    assert finding.optional
    made.device = replace(made.device, passed_over="this torch has no kernels for the GTX 1080")
    assert doctor._device(automatic, made).found.endswith("GB free; this torch has no kernels for the GTX 1080")
    assert not doctor._device(settings, made).todo, "KLEIN_DEVICE=cpu is a choice"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not doctor._device(automatic, made).todo, "so is this"
