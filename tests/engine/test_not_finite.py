"""Weights and latents that are not finite are errors before anything is decoded or saved."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.contract import BadWeights, EngineConfig, Exact, Job, Loading, OutOfMemory, Stage
from engine.engine import Engine
from engine.families.klein.checkpoint import Checkpoint
from engine.families.klein.pipeline import Klein
from tests.engine import published

JOB = Job("x", model="nano", size=Exact(64, 64), steps=2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_layer_that_is_not_finite_is_refused_while_loading(
    bad: float, bfl: dict[str, Tensor], folder: Path, tmp_path: Path
) -> None:
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(folder / part, tmp_path / part)
    broken = {name: tensor.clone() for name, tensor in bfl.items()}
    broken["single_blocks.0.linear2.weight"][3, 5] = bad
    file = published.write(broken, tmp_path / "flux-2-klein-4b.safetensors")
    with pytest.raises(BadWeights, match=r"single_blocks\.0\.linear2\.weight has numbers that are not finite"):
        list(Engine(EngineConfig(device="cpu", dtype="float32")).run(Job("x", model=str(file))))


def test_latent_that_is_not_finite_is_never_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(EngineConfig(device="cpu"))
    list(engine.run(JOB))
    assert engine._klein is not None
    with torch.no_grad():
        engine._klein.transformer.img_in.weight[0, 0] = float("nan")
    monkeypatch.setattr(engine._klein.autoencoder, "decode", lambda latent: pytest.fail("decoded"))
    stages = []
    running = engine.run(JOB)
    with pytest.raises(BadWeights, match="nano computed numbers that are not finite: its weights, or a LoRA"):
        stages.extend(event for event in running if isinstance(event, Stage))
    assert Stage("decode") not in stages


def test_auto_takes_the_next_model_where_the_best_does_not_load(
    bfl: dict[str, Tensor], folder: Path, tmp_path: Path
) -> None:
    home = tmp_path / "models"
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(folder / part, home / part)
    broken = {name: tensor.clone() for name, tensor in bfl.items()}
    broken["img_in.weight"][0, 0] = float("nan")
    published.write(broken, home / "flux-2-klein-4b.safetensors")
    engine = Engine(EngineConfig(models=(home,), device="cpu", dtype="float32"))
    assert engine.auto.name(loaded="") == "klein-4b"
    *_, result = engine.run(Job("x", size=Exact(64, 64), steps=1))
    assert result.model == "nano"  # type: ignore
    obstacles = {model.name: model.obstacle for model in engine.status().models if model.obstacle}
    assert obstacles.keys() == {"klein-4b"}
    assert re.match("does not load: .*img_in.weight has numbers that are not finite", obstacles["klein-4b"])


def test_another_file_of_a_model_is_taken_where_one_is_damaged(
    bfl: dict[str, Tensor], folder: Path, tmp_path: Path
) -> None:
    home = tmp_path / "models"
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(folder / part, home / part)
    broken = bfl | {"img_in.weight": torch.full_like(bfl["img_in.weight"], float("nan"))}
    published.write(broken, home / "flux-2-klein-4b.safetensors")
    other = home / "flux-2-klein-4b-mine.safetensors"
    published.write({name: tensor.bfloat16() for name, tensor in bfl.items()}, other)
    engine = Engine(EngineConfig(models=(home,), device="cpu", dtype="float32"))
    *_, result = engine.run(Job("x", size=Exact(64, 64), steps=1))
    assert result.model == "klein-4b"  # type: ignore
    assert not [model.name for model in engine.status().models if model.obstacle]
    engine.release()
    published.write(broken, other)
    with pytest.raises(BadWeights, match=r"img_in\.weight has numbers that are not finite"):
        list(engine.run(Job("x", model="klein-4b")))


def test_auto_tries_a_model_again_whose_file_was_replaced(bfl: dict[str, Tensor], folder: Path, tmp_path: Path) -> None:
    home, job = tmp_path / "models", Job("x", size=Exact(64, 64), steps=1)
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(folder / part, home / part)
    file = home / "flux-2-klein-4b.safetensors"
    published.write(bfl | {"img_in.weight": torch.full_like(bfl["img_in.weight"], float("nan"))}, file)
    engine = Engine(EngineConfig(models=(home,), device="cpu", dtype="float32"))
    models = []
    for change in (lambda: None, lambda: None, lambda: published.write(bfl, file)):
        change()
        *_, result = engine.run(job)
        models.append(result.model)  # type: ignore
        engine.release()
    assert models == ["nano", "nano", "klein-4b"]
    assert not [model.name for model in engine.status().models if model.obstacle]


def test_auto_tries_a_model_again_that_found_too_little_memory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder, tmp_path / "klein-4b")
    load, tried = Klein.load.__func__, []  # type: ignore[attr-defined]

    def load_or_fail(cls: type[Klein], checkpoint: Checkpoint, *arguments: Any) -> Iterator[Loading]:
        tried.append(checkpoint.variant.name)
        if tried == ["klein-4b"]:
            raise OutOfMemory("Another program holds the memory.")
        return (yield from load(cls, checkpoint, *arguments))

    monkeypatch.setattr(Klein, "load", classmethod(load_or_fail))
    engine = Engine(EngineConfig(models=(tmp_path,), device="cpu", dtype="float32"))
    for _ in range(2):
        list(engine.run(Job("x", size=Exact(64, 64), steps=1)))
        engine.release()
    assert tried == ["klein-4b", "nano", "klein-4b"]
