"""Companions of single files: ranked, named, and found where people have them."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from engine.contract import BadWeights, EngineConfig, ModelNotFound
from engine.engine import Engine
from engine.families.klein import identify
from engine.families.klein.answers import Answers
from engine.registry import ModelRegistry
from tests.engine import published
from tests.engine.test_registry import comfyui, hub, tree


@pytest.fixture
def home(folder: Path, bfl: dict[str, Tensor], tmp_path: Path) -> Path:
    home = comfyui(folder, tmp_path / "models", "flux-2-klein-4b.safetensors", dict(bfl))
    shutil.copytree(folder / "tokenizer", home / "diffusion_models" / "tokenizer")
    return home


def encoder(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "text_encoder" / "model.safetensors")


def taken(home: Path, **more: str) -> str:
    return ModelRegistry((home,), **more).resolve("klein-4b").text_encoder.name  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("model.layers.0.pre_feedforward_layernorm.weight", "gemma_3_4b"),
        ("model.visual.blocks.0.weight", "qwen3_vl_4b"),
    ],
)
def test_other_encoders_of_the_same_width_are_passed_over(key: str, kind: str, folder: Path, home: Path):
    published.write(encoder(folder) | {key: torch.zeros(2)}, home / "text_encoders" / f"{kind}.safetensors")
    published.write(encoder(folder) | {key: torch.zeros(2)}, home / "text_encoders" / f"a_{kind}.safetensors")
    assert taken(home) == "qwen_3_4b.safetensors"


def test_published_encoder_comes_before_a_fine_tune(folder: Path, home: Path):
    published.write(encoder(folder), home / "text_encoders" / "Josiefied-Qwen3-4B-abliterated.safetensors")
    published.write(encoder(folder), home / "text_encoders" / "a-fine-tune.safetensors")
    assert taken(home) == "qwen_3_4b.safetensors"
    (home / "text_encoders" / "qwen_3_4b.safetensors").unlink()
    assert taken(home) == "Josiefied-Qwen3-4B-abliterated.safetensors", "one that suits is better than none"


def test_quantised_transformer_takes_the_smaller_encoder(folder: Path, bfl: dict[str, Tensor], home: Path):
    """A bf16 transformer takes the finer one."""
    small = {n: t.to(torch.float8_e4m3fn) if t.ndim == 2 and "layers" in n else t for n, t in encoder(folder).items()}
    published.write(small, home / "text_encoders" / "qwen_3_4b_fp8_scaled.safetensors")
    assert taken(home) == "qwen_3_4b.safetensors"
    file = home / "diffusion_models" / "flux-2-klein-4b.safetensors"
    file.unlink()
    tensors, metadata = published.quantised(dict(bfl), "fp8")
    published.write(tensors, file.with_name("flux-2-klein-4b-fp8.safetensors"), metadata)
    assert taken(home) == "qwen_3_4b_fp8_scaled.safetensors"


def test_encoder_in_a_format_that_is_not_read_comes_last(folder: Path, home: Path, tmp_path: Path) -> None:
    encoders = home / "text_encoders"
    odd = encoder(folder) | {"model.layers.0.mlp.gate_proj.weight": torch.zeros(64, 16, dtype=torch.uint8)}
    published.write(odd, encoders / "Qwen3-4B-bf16.safetensors")
    assert taken(home) == "qwen_3_4b.safetensors"
    (encoders / "qwen_3_4b.safetensors").rename(encoders / "a-fine-tune.safetensors")
    half = tmp_path / "half"  # a folder whose download was interrupted
    shutil.copytree(folder / "text_encoder", half / "text_encoder", ignore=shutil.ignore_patterns("*.safetensors"))
    found = ModelRegistry((home, half)).resolve(str(home / "diffusion_models" / "flux-2-klein-4b.safetensors"))
    assert found.text_encoder.name == "a-fine-tune.safetensors"
    (encoders / "a-fine-tune.safetensors").unlink()
    with pytest.raises(BadWeights, match=r"gate_proj\.weight is packed in a format that is not read"):
        taken(home)


def test_setting_names_the_encoder_and_a_wrong_name_lists_them(folder: Path, home: Path):
    published.write(encoder(folder), home / "text_encoders" / "my-fine-tune.safetensors")
    assert taken(home, text_encoder="my-fine-tune") == "my-fine-tune.safetensors"
    assert (
        taken(home, text_encoder=str(home / "text_encoders" / "my-fine-tune.safetensors")) == "my-fine-tune.safetensors"
    )
    with pytest.raises(ModelNotFound, match=r"no text encoder 'typo'; found: .*my-fine-tune\.safetensors"):
        taken(home, text_encoder="typo")


def test_companions_are_found_in_subfolders_beside_a_single_file(home: Path, monkeypatch: pytest.MonkeyPatch):
    """People sort ComfyUI's folders, and name the file alone, also by a relative path."""
    for folder, name in (("vae", "flux2-vae"), ("text_encoders", "qwen_3_4b")):
        (home / folder / "FLUX.2").mkdir()
        (home / folder / f"{name}.safetensors").rename(home / folder / "FLUX.2" / f"{name}.safetensors")
    found = ModelRegistry().resolve(str(home / "diffusion_models" / "flux-2-klein-4b.safetensors"))
    assert found.vae == home / "vae" / "FLUX.2" / "flux2-vae.safetensors"
    assert found.text_encoder == home / "text_encoders" / "FLUX.2" / "qwen_3_4b.safetensors"
    monkeypatch.chdir(home / "diffusion_models")
    assert ModelRegistry().resolve("./flux-2-klein-4b.safetensors").vae == found.vae


def test_models_name_the_companions_that_are_taken(home: Path):
    engine = Engine(EngineConfig(models=(home,), device="cpu", dtype="float32"))
    (found,) = (model for model in engine.models() if model.name == "klein-4b")
    assert Path(found.text_encoder).name == "qwen_3_4b.safetensors"
    assert Path(found.vae).name == "flux2-vae.safetensors"


def test_repack_in_the_cache_of_the_hub_is_found_with_its_companions(home: Path, tmp_path: Path):
    """ComfyUI's repositories hold their folders below split_files."""
    files = {f"split_files/{path.relative_to(home)}": path for path in home.glob("*/*.safetensors")}
    snapshot = hub(tmp_path / "hub", "Comfy-Org/flux2-klein-4B", files) / "split_files"
    registry = ModelRegistry(hub=tmp_path / "hub")
    assert [model.name for model in registry.installed_models()] == ["nano", "klein-4b"]
    with pytest.raises(BadWeights, match="No tokenizer"):
        registry.resolve("klein-4b")
    shutil.copytree(home / "diffusion_models" / "tokenizer", tmp_path / "tokens" / "tokenizer")
    registry = ModelRegistry((tmp_path / "tokens",), tmp_path / "hub")
    found = registry.resolve(str(snapshot / "diffusion_models" / "flux-2-klein-4b.safetensors"))
    assert found.text_encoder == snapshot / "text_encoders" / "qwen_3_4b.safetensors"
    assert found.vae == snapshot / "vae" / "flux2-vae.safetensors"


@pytest.mark.parametrize(
    ("pipeline", "model"),
    [("FluxPipeline", "black-forest-labs/FLUX.1-dev"), ("Flux2Pipeline", "black-forest-labs/FLUX.2-dev")],
)
def test_tokenizer_of_another_model_is_passed_over(
    pipeline: str, model: str, folder: Path, home: Path, tmp_path: Path
) -> None:
    """Their folders sort before klein's, and hold a tokenizer without klein's words."""
    shutil.rmtree(home / "diffusion_models" / "tokenizer")
    files = {name: path for name, path in tree(folder).items() if name.startswith(("model_index", "tokenizer"))}
    other = tmp_path / "model_index.json"
    other.write_text(f'{{"_class_name": "{pipeline}"}}')
    hub(tmp_path / "hub", model, files | {"model_index.json": other})
    file = str(home / "diffusion_models" / "flux-2-klein-4b.safetensors")
    with pytest.raises(BadWeights, match="No tokenizer"):
        ModelRegistry((home,), tmp_path / "hub").resolve(file)
    klein = hub(tmp_path / "hub", "black-forest-labs/FLUX.2-klein-4B", files)
    assert ModelRegistry((home,), tmp_path / "hub").resolve(file).tokenizer == klein / "tokenizer"


def test_tokenizer_beside_the_encoder_that_is_taken_comes_first(folder: Path, home: Path, tmp_path: Path) -> None:
    """Another model's Qwen3 reads what its own tokenizer writes, whatever pipeline that model has."""
    (home / "text_encoders" / "qwen_3_4b.safetensors").unlink()
    other = Path(shutil.copytree(folder, tmp_path / "Z-Image"))
    (other / "model_index.json").write_text('{"_class_name": "ZImagePipeline"}')
    found = ModelRegistry((home, other)).resolve(str(home / "diffusion_models" / "flux-2-klein-4b.safetensors"))
    assert (found.text_encoder, found.tokenizer) == (other / "text_encoder", other / "tokenizer")


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("flux-2-klein-4b-fp16", "klein-4b"), ("flux-2-klein-4b (1)", "klein-4b"), ("klein4b", "klein-4b"),
        ("flux-2-klein-4b-distilled", "klein-4b"), ("flux2Klein_9bBase", "klein-base-9b"),
        ("Flux2-Klein-9B-True-V3-bf16", "klein-9b"), ("flux-2-klein-base-4b-Q4_K_M", "klein-base-4b"),
        ("klein_kv_9b", "klein-9b-kv"), ("my klein", None), ("klein-4b-or-9b", None), ("qwen-4b", None),
        ("flux2KleinBase9b", "klein-base-9b"), ("flux-2-klein-base9b", "klein-base-9b"),
        ("klein_base4b", "klein-base-4b"), ("Flux2-Klein-Base4B-fp8", "klein-base-4b"),
        ("flux2Klein9b", "klein-9b"), ("Flux2Klein9B_v2", "klein-9b"), ("FLUX2Klein9B", "klein-9b"),
        ("flux2klein4b", "klein-4b"), ("flux-2-klein-kv9b", "klein-9b-kv"),
    ],
)  # fmt: skip
def test_common_names_say_the_variant(name: str, variant: str | None):
    row = identify.by_name(name)
    assert (row.name if row else None) == variant


def test_answer_about_a_file_is_remembered_until_the_file_changes(home: Path, tmp_path: Path):
    file = home / "diffusion_models" / "mine.safetensors"
    (home / "diffusion_models" / "flux-2-klein-4b.safetensors").rename(file)
    answers = Answers(tmp_path / "models.json")
    registry = ModelRegistry((home,), answers=answers)
    with pytest.raises(BadWeights, match="does not say which klein it is"):
        registry.resolve(str(file))
    assert registry.resolve(str(file), variant="klein-base-4b").variant.name == "klein-base-4b"
    assert ModelRegistry((home,), answers=answers).resolve(str(file)).variant.name == "klein-base-4b"
    assert "klein-base-4b" in ModelRegistry((home,), answers=answers).installed()
    now = ModelRegistry((home,), variant="klein-4b", answers=answers)
    assert now.resolve(str(file)).variant.name == "klein-4b"
    assert set(now.installed()) == {"nano", "klein-4b"}
    file.touch()
    with pytest.raises(BadWeights, match="does not say which klein it is"):
        ModelRegistry((home,), answers=answers).resolve(str(file))
    (tmp_path / "models.json").unlink()
    getattr(os, "mkfifo", os.mkdir)(tmp_path / "models.json")
    with pytest.raises(BadWeights, match="does not say which klein it is"):
        ModelRegistry((home,), answers=answers).resolve(str(file))
