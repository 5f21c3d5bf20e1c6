"""`klein-mcp doctor`: each line says ok, or what to do."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from klein_mcp.cli import doctor
from klein_mcp.settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "klein", hub=tmp_path / "hub", device="cpu")


def found(findings: list[doctor.Check]) -> dict[str, doctor.Check]:
    return {finding.what: finding for finding in findings}


def test_a_fresh_machine_is_told_what_is_missing_and_paints(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "home", lambda: settings.home)
    lines = list(doctor.look(settings))
    said = found(lines)
    assert list(said) == ["Python", "torch", "disk", "clients", "daemon", "device", "model", "test painting"]
    assert said["daemon"].found.startswith("not running")
    assert "cpu" in said["device"].found
    assert said["model"].todo == "Run: klein-mcp pull klein-4b"
    assert "claude mcp add klein" in said["clients"].todo
    assert "128×128 with nano in" in said["test painting"].found
    assert {line.what for line in lines if line.todo} == {"clients", "model"}


def test_in_a_terminal_every_line_says_ok_or_todo(tmp_path: Path) -> None:
    inside = {"KLEIN_HOME": str(tmp_path / "klein"), "KLEIN_HUB": str(tmp_path / "hub"), "HOME": str(tmp_path),
              "KLEIN_DEVICE": "cpu"}  # fmt: skip
    (tmp_path / ".cursor").mkdir()
    (tmp_path / ".cursor" / "mcp.json").write_text('{"mcpServers": {"klein": {"command": "klein-mcp"}}}')
    call = [sys.executable, "-m", "klein_mcp", "doctor"]
    done = subprocess.run(call, env=os.environ | inside, capture_output=True, text=True, timeout=60)
    lines = done.stdout.splitlines()
    assert all(line.startswith(("ok    ", "todo  ")) for line in lines), done.stdout
    assert all(" → " in line for line in lines if line.startswith("todo"))
    assert "ok    clients: Cursor start klein-mcp" in done.stdout
    assert "todo  model: only the embedded demo model" in done.stdout
    assert done.returncode == 0, "the embedded model paints: the rest is advice"


def test_a_full_disk_a_missing_torch_and_a_wrong_device_each_say_what_to_do(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10**11, 10**11, 10**9))
    assert "Make room" in doctor._disk(settings).todo

    def gone(name: str) -> str:
        raise doctor.PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", gone)
    assert "Install klein-mcp again" in doctor._torch().todo
    missing = Settings(home=settings.home, hub=settings.hub, device="cuda:7")
    assert "this machine has: cpu" in found(list(doctor.look(missing)))["engine"].todo


def test_a_model_that_cannot_load_says_why(settings: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "klein-4b"
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "model.safetensors").write_bytes(b"GGUF")
    (folder / "model_index.json").write_text('{"_class_name": "Flux2KleinPipeline", "is_distilled": true}')
    lines = list(doctor.look(Settings(home=settings.home, hub=settings.hub, device="cpu", models=(folder,))))
    (broken,) = [line for line in lines if line.found.startswith("klein-4b")]
    assert "has no vae folder" in broken.todo
    assert not broken.works


@pytest.mark.parametrize(
    ("model", "todo"),
    [
        ("klein-4b", "Run: klein-mcp pull klein-4b"),
        ("/nope", "No model at /nope"),
        ("klein-4d", "Did you mean klein-4b?"),
    ],
)
def test_a_model_that_is_set_and_not_there_fails(settings: Settings, model: str, todo: str) -> None:
    lines = list(doctor.look(replace(settings, model=model)))
    (asked,) = [line for line in lines if line.found == f"KLEIN_MODEL is {model}"]
    assert todo in asked.todo
    assert not asked.works


def test_a_model_that_is_set_and_there_is_ok(settings: Settings) -> None:
    lines = list(doctor.look(replace(settings, model="nano")))
    (asked,) = [line for line in lines if line.found == "KLEIN_MODEL is nano"]
    assert not asked.todo


def test_a_variable_that_is_misspelt_is_advice(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KLEIN_MODLE", "nano")
    (said,) = [line for line in doctor.look(settings) if line.what == "settings"]
    assert said.found.startswith("KLEIN_MODLE ")
    assert said.todo == "Did you mean KLEIN_MODEL?"
    assert said.works


def test_a_model_that_has_no_name_is_advice(settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "models" / "my-klein.gguf"
    file.parent.mkdir()
    file.write_bytes(b"GGUF" + b"\0" * 20)
    there = Settings(home=settings.home, hub=settings.hub, device="cpu", models=(file.parent, tmp_path / "typo"))
    advice = {line.found: line for line in doctor.look(there) if line.what == "model" and line.todo}
    assert "not read yet" in advice[f"{file} cannot be called by a name"].todo
    assert "KLEIN_MODELS" in advice[str(tmp_path / "typo")].todo
    assert all(line.works for line in advice.values())


def test_whoever_waits_at_a_terminal_sees_that_something_is_done(settings: Settings, tmp_path: Path) -> None:
    """The libraries that know the device take seconds to come in."""
    pty = pytest.importorskip("pty")
    for command in ("models", "doctor"):
        ours, theirs = pty.openpty()
        inside = {"KLEIN_HOME": str(settings.home), "KLEIN_HUB": str(settings.hub), "KLEIN_DEVICE": "cpu",
                  "HOME": str(tmp_path), "TERM": "xterm"}  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-m", "klein_mcp", command], env=os.environ | inside, stderr=theirs, stdout=subprocess.PIPE
        )
        seen = b""
        while b"looking at this machine" not in seen and b"starting the engine" not in seen:
            assert process.poll() is None, seen
            seen += os.read(ours, 4096)
        process.kill()
        process.communicate()
        os.close(theirs)
        os.close(ours)


def test_a_script_reads_json(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run(settings, argparse.Namespace(json=True)) == 0
    said = json.loads(capsys.readouterr().out)
    assert {"what", "ok", "found", "todo"} == said[0].keys()


def test_what_is_in_the_way_of_painting_fails(settings: Settings) -> None:
    nowhere = Settings(home=settings.home, hub=settings.hub, device="cuda:7")
    assert doctor.run(nowhere, argparse.Namespace(json=True)) == 1
