"""Tests that options and folder layouts reach the image of a loaded model."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from engine.contract import BadWeights, EngineConfig, EngineError, Exact, Job, Result
from engine.engine import Engine
from engine.families.klein.loader import LoadOptions
from engine.families.klein.lora import Lora
from engine.families.klein.pipeline import Klein
from engine.memory.device import Device
from engine.registry import ModelRegistry
from tests.engine import published
from tests.engine.loras import bfl_fused, write
from tests.engine.test_offload import last

CPU = Device(torch.device("cpu"), torch.float32)


def test_a_lora_and_a_format_change_the_fingerprint(folder: Path, tmp_path: Path) -> None:
    """Check that other weights never reuse cached states.

    The fingerprint is part of the cache key.
    """
    file = write(bfl_fused(), tmp_path / "style.safetensors")
    checkpoint = ModelRegistry().resolve(str(folder))
    options = (
        LoadOptions(),
        LoadOptions("fp8"),
        LoadOptions(loras=(Lora(file),)),
        LoadOptions(loras=(Lora(file, 0.5),)),
    )
    prints = {last(Klein.load(checkpoint, CPU, None, option)).fingerprint for option in options}
    assert len(prints) == len(options)
    assert last(Klein.load(checkpoint, CPU)).fingerprint in prints


def test_quantised_model_generates_nearly_the_same_image(folder: Path) -> None:
    job = Job("a lighthouse of brass", seed=5, size=Exact(64, 64), steps=2)
    pictures = []
    for quant in (None, "fp8"):
        klein = last(Klein.load(ModelRegistry().resolve(str(folder)), CPU, None, LoadOptions(quant)))
        *_, painting = klein.run(job)
        assert isinstance(painting, Result)
        pictures.append(painting.image.astype(float))
    difference = abs(pictures[0] - pictures[1]).mean()
    assert 0 < difference < 25, "fp8 is another rounding, not another image"


def test_engine_takes_loras_and_format_as_strings(folder: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    (models / "loras").mkdir(parents=True)
    shutil.copytree(folder, models / "klein-4b")
    write(bfl_fused(), models / "loras" / "style.safetensors")
    job = Job("x", model="klein-4b", size=Exact(64, 64), steps=1)
    prints = set()
    for words in ({}, {"loras": ("style:0.5",)}, {"loras": ("style",)}, {"quant": "fp8", "loras": ("style",)}):
        engine = Engine(EngineConfig(models=(models,), device="cpu", dtype="float32", **words))  # type: ignore[arg-type]
        *_, painting = engine.run(job)
        assert isinstance(painting, Result)
        prints.add((painting.fingerprint, painting.image.tobytes()))
    assert len({fingerprint for fingerprint, _ in prints}) == len({image for _, image in prints}) == 4
    with pytest.raises(EngineError, match=r"No LoRA 'stile'; there are style"):
        list(Engine(EngineConfig(models=(models,), device="cpu", loras=("stile",))).run(job))
    with pytest.raises(EngineError, match=r"quant is 'int4'; allowed: fp8, nvfp4"):
        list(Engine(EngineConfig(models=(models,), device="cpu", quant="int4")).run(job))


def test_renamed_file_needs_the_variant_setting(bfl: dict[str, Tensor], folder: Path, tmp_path: Path) -> None:
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(folder / part, tmp_path / part)
    file = published.write(bfl, tmp_path / "mine.safetensors")
    job = Job("x", model=str(file), size=Exact(64, 64), steps=1)
    with pytest.raises(BadWeights, match="Set variant to klein-4b or klein-base-4b"):
        list(Engine(EngineConfig(device="cpu", dtype="float32")).run(job))
    *_, painting = Engine(EngineConfig(device="cpu", dtype="float32", variant="klein-base-4b")).run(job)
    assert isinstance(painting, Result)
    assert (painting.model, painting.guidance) == ("klein-base-4b", 4.0)


def test_variant_setting_overrules_only_the_preferred_file(
    bfl: dict[str, Tensor], folder: Path, tmp_path: Path
) -> None:
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(folder / part, tmp_path / part)
    older, preferred = (published.write(bfl, tmp_path / f"flux-2-klein-4b-{name}.safetensors") for name in "ab")
    engine = Engine(EngineConfig(device="cpu", dtype="float32", model=str(preferred), variant="klein-base-4b"))
    taken: list[str] = []
    for file in (preferred, older):
        *_, painting = engine.run(Job("x", model=str(file), size=Exact(64, 64), steps=1))
        assert isinstance(painting, Result)
        taken.append(painting.model)
    assert taken == ["klein-base-4b", "klein-4b"]


def test_model_in_comfyui_folders_runs(bfl: dict[str, Tensor], folder: Path, tmp_path: Path) -> None:
    """Check that a model runs from ComfyUI's folders.

    The fp8 transformer has a prefix, the autoencoder is fp32 and the encoder is one file.
    Only the tokenizer is a folder.
    """
    home = tmp_path / "ComfyUI" / "models"
    prefixed = {f"model.diffusion_model.{n}": t for n, t in published.quantised(bfl, "fp8")[0].items()}
    published.write(prefixed, home / "diffusion_models" / "flux-2-klein-4b-fp8.safetensors")
    published.write(published.bfl_autoencoder(folder), home / "vae" / "flux2-vae.safetensors")
    encoder = load_file(folder / "text_encoder" / "model.safetensors")
    published.write(encoder, home / "text_encoders" / "qwen_3_4b.safetensors")
    shutil.copytree(folder / "tokenizer", home / "diffusion_models" / "tokenizer")
    engine = Engine(EngineConfig(models=(home,), device="cpu", dtype="float32"))
    *_, painting = engine.run(Job("x", model="klein-4b", size=Exact(64, 64), steps=2))
    assert isinstance(painting, Result)
    assert painting.image.std() > 5
    assert engine.models()[1].format == "fp8"
