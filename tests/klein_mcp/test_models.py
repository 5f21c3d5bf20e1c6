"""Tests of `klein-mcp models`: installed models, licences and memory placement."""

import argparse
import json
import os
import shutil
from pathlib import Path

import pytest

from klein_mcp.cli import models
from klein_mcp.settings import Settings
from tests.engine import published


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a folder of models: a diffusers 4B, an fp8 base 4B.

    The base file uses the companions of the other model.
    """
    home = tmp_path_factory.mktemp("model_folder")
    folder = published.toy(home / "klein-4b")
    tensors, metadata = published.quantised(published.bfl_transformer(folder), "fp8")
    published.write(tensors, home / "diffusion_models" / "flux-2-klein-base-4b-fp8.safetensors", metadata)
    return home


def run(settings: Settings, *, as_json: bool = False) -> int:
    return models.run(settings, argparse.Namespace(json=as_json))


def settings(home: Path, model_folder: Path, **more: object) -> Settings:
    return Settings(home=home, hub=home / "hub", models=(model_folder,), device="cpu", **more)  # type: ignore[arg-type]


def test_every_model_has_its_format_licence_size_and_path(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(settings(tmp_path, model_folder), as_json=True) == 0
    output = json.loads(capsys.readouterr().out)
    found = {model["name"]: model for model in output["installed"]}
    assert found.keys() == {"nano", "klein-4b", "klein-base-4b"}
    assert (found["klein-4b"]["format"], found["klein-base-4b"]["format"]) == ("bf16", "fp8")
    assert found["klein-base-4b"]["licence"] == "Apache-2.0"
    assert found["klein-4b"]["path"] == str(model_folder / "klein-4b")
    assert all(model["fits"] and model["bytes"] > 10**6 for model in found.values())
    assert "all on the device" in found["klein-4b"]["memory"]
    assert [row["name"] for row in output["available"]] == ["klein-9b", "klein-base-9b", "klein-9b-kv"]
    assert all(row["gated"] and "Non-Commercial" in row["licence"] for row in output["available"])


def test_text_output_explains_models_that_do_not_fit(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "model_folder"
    shutil.copytree(model_folder, home)
    shutil.rmtree(home / "klein-4b" / "vae")
    assert run(settings(tmp_path, home, memory=0.3)) == 0
    output = capsys.readouterr().out
    assert "klein-4b (bf16): Apache-2.0" in output
    assert "does not load: " in output
    assert "has no vae folder. Download it again." in output
    assert "klein-9b       FLUX.2 [klein] 9B, FLUX Non-Commercial, gated, bf16 18.2 GB, fp8 9.4 GB" in output
    assert "nvfp4; all in memory in bf16: 31 GB" in output


def test_models_without_a_usable_name_are_listed_with_reasons(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "model_folder"
    shutil.copytree(model_folder / "klein-4b", home / "mine")
    (home / "flux-2-klein-4b-Q8_0.gguf").write_bytes(b"GGUF" + b"\0" * 20)
    there = Settings(home=tmp_path, hub=tmp_path / "hub", models=(home, tmp_path / "typo"), device="cpu")
    assert run(there) == 0
    output = capsys.readouterr().out
    assert "nano: Apache-2.0, 15 MB read\n" in output
    assert "\nNot usable as they are:\n" in output
    assert f"  {home / 'mine'}\n    It is a klein, under a name of its own: give its path as the model." in output
    assert "flux-2-klein-4b-Q8_0.gguf (24 bytes) is not a whole GGUF file: its version is 0" in output
    assert f"  {tmp_path / 'typo'}\n    KLEIN_MODELS names it, and it is not there." in output
    assert run(there, as_json=True) == 0
    assert len(json.loads(capsys.readouterr().out)["not_used"]) == 3


def test_empty_folder_and_wrong_separator_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "tokens" / "tokenizer").mkdir(parents=True)
    listed = Path(f"{tmp_path}/a,{tmp_path}/b")
    places = (tmp_path / "empty", listed, tmp_path / "tokens")
    there = Settings(home=tmp_path, hub=tmp_path / "hub", models=places, device="cpu")
    assert run(there) == 0
    output = capsys.readouterr().out
    assert f"  {tmp_path / 'empty'}\n    KLEIN_MODELS names it, and nothing usable is in it." in output
    assert f"it is not there. Separate several paths with {os.pathsep!r}, not ','." in output
    assert f"  {tmp_path / 'tokens'}\n" not in output
