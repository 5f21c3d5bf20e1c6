"""`klein-mcp models`: what is here, under which licence, and how it would live in this machine."""

import argparse
import json
import shutil
from pathlib import Path

import pytest

from klein_mcp.cli import models
from klein_mcp.settings import Settings
from tests.engine import published


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder and an fp8 file of a 4B, and a base file whose companions are another model's."""
    home = tmp_path_factory.mktemp("shelf")
    folder = published.toy(home / "klein-4b")
    tensors, metadata = published.quantised(published.bfl_transformer(folder), "fp8")
    published.write(tensors, home / "diffusion_models" / "flux-2-klein-base-4b-fp8.safetensors", metadata)
    return home


def run(settings: Settings, *, as_json: bool = False) -> int:
    return models.run(settings, argparse.Namespace(json=as_json))


def settings(home: Path, shelf: Path, **more: object) -> Settings:
    return Settings(home=home, hub=home / "hub", models=(shelf,), device="cpu", **more)  # type: ignore[arg-type]


def test_every_model_has_its_format_licence_size_and_place(
    shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(settings(tmp_path, shelf), as_json=True) == 0
    said = json.loads(capsys.readouterr().out)
    found = {model["name"]: model for model in said["installed"]}
    assert found.keys() == {"nano", "klein-4b", "klein-base-4b"}
    assert (found["klein-4b"]["format"], found["klein-base-4b"]["format"]) == ("bf16", "fp8")
    assert found["klein-base-4b"]["licence"] == "Apache-2.0"
    assert found["klein-4b"]["path"] == str(shelf / "klein-4b")
    assert all(model["fits"] and model["bytes"] > 10**6 for model in found.values())
    assert "all on the device" in found["klein-4b"]["memory"]
    assert [row["name"] for row in said["available"]] == ["klein-9b", "klein-base-9b", "klein-9b-kv"]
    assert all(row["gated"] and "Non-Commercial" in row["licence"] for row in said["available"])


def test_a_person_reads_what_does_not_fit_and_why(
    shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "shelf"
    shutil.copytree(shelf, home)
    shutil.rmtree(home / "klein-4b" / "vae")
    assert run(settings(tmp_path, home, memory=0.3)) == 0
    said = capsys.readouterr().out
    assert "klein-4b (bf16): Apache-2.0" in said
    assert "does not load: " in said
    assert "has no vae folder. Download it again." in said
    assert "klein-9b       FLUX.2 [klein] 9B, FLUX Non-Commercial, gated, bf16 18.2 GB, fp8 9.4 GB" in said
    assert "nvfp4; all in memory in bf16: 31 GB" in said


def test_what_cannot_be_called_by_a_name_is_listed_with_the_reason(
    shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "shelf"
    shutil.copytree(shelf / "klein-4b", home / "mine")
    (home / "flux-2-klein-4b-Q8_0.gguf").write_bytes(b"GGUF" + b"\0" * 20)
    there = Settings(home=tmp_path, hub=tmp_path / "hub", models=(home, tmp_path / "typo"), device="cpu")
    assert run(there) == 0
    said = capsys.readouterr().out
    assert f"  {home / 'mine'}\n    It is a klein, under a name of its own: give its path as the model." in said
    assert "flux-2-klein-4b-Q8_0.gguf (24 bytes) is not a whole GGUF file: its version is 0" in said
    assert f"  {tmp_path / 'typo'}\n    KLEIN_MODELS names it, and it is not there." in said
    assert run(there, as_json=True) == 0
    assert len(json.loads(capsys.readouterr().out)["not_used"]) == 3
