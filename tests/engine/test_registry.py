"""Tests of finding and identifying installed models.

A model is identified by the contents of its files, then by index, name, hash, or the user.
"""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from engine.contract import BadWeights, ModelNotFound
from engine.families.klein import identify, variants
from engine.families.klein.variants import VARIANTS, File
from engine.registry import NANO, ModelRegistry
from tests.engine import published


@pytest.fixture
def transformer(bfl: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(bfl)


def installed(folder: Path, home: Path, name: str = "klein-4b") -> Path:
    return Path(shutil.copytree(folder, home / name))


def hub(cache: Path, repo: str, files: dict[str, Path]) -> Path:
    """Create a cache in huggingface_hub's layout.

    Blobs are named by hash, and snapshots link to them.
    """
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / ("a" * 40)
    for name, source in files.items():
        data = source.read_bytes()
        blob = root / "blobs" / hashlib.sha256(data).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blob)
    return snapshot


def tree(folder: Path) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}


def comfyui(folder: Path, home: Path, name: str, tensors: dict[str, Tensor]) -> Path:
    """Create ComfyUI's model folders, with its file names and prefixes."""
    published.write({f"model.diffusion_model.{n}": t for n, t in tensors.items()}, home / "diffusion_models" / name)
    published.write(published.bfl_autoencoder(folder), home / "vae" / "flux2-vae.safetensors")
    encoder = load_file(folder / "text_encoder" / "model.safetensors")
    published.write(encoder, home / "text_encoders" / "qwen_3_4b.safetensors")
    return home


def test_embedded_model_is_always_installed(tmp_path: Path) -> None:
    assert ModelRegistry().installed() == {"nano": NANO}
    assert ModelRegistry().resolve("nano").variant.name == "nano"


def test_a_diffusers_folder_is_found_by_name_in_a_folder_of_models(folder: Path, tmp_path: Path) -> None:
    place = installed(folder, tmp_path / "models")
    registry = ModelRegistry((tmp_path,))
    assert registry.installed()["klein-4b"] == place
    found = registry.resolve("klein-4b")
    assert (found.variant, found.transformer) == (VARIANTS["klein-4b"], place / "transformer")
    index = place / "model_index.json"
    index.write_bytes(b"\xef\xbb\xbf" + index.read_bytes())
    assert registry.resolve(str(index)) == found, "the index, saved with a byte order mark, stands for its folder"


def test_hub_cache_is_searched_by_repository(folder: Path, tmp_path: Path) -> None:
    snapshot = hub(tmp_path, VARIANTS["klein-4b"].repo, tree(folder))
    assert ModelRegistry(hub=tmp_path).resolve("klein-4b").transformer == snapshot / "transformer"


def test_single_file_repository_takes_companions_from_another(
    folder: Path, transformer: dict[str, Tensor], tmp_path: Path
) -> None:
    """Resolve the files that `pull klein-4b-fp8` downloads.

    They are the fp8 file, and the full repository without its transformer.
    """
    eight = published.write(*_quantised(transformer, tmp_path / "flux-2-klein-4b-fp8.safetensors"))
    fp8 = VARIANTS["klein-4b"].files[1]
    cache = tmp_path / "hub"
    file = hub(cache, fp8.repo, {fp8.name: eight}) / fp8.name
    whole = hub(cache, VARIANTS["klein-4b"].repo, {n: p for n, p in tree(folder).items() if "transformer/" not in n})
    registry = ModelRegistry(hub=cache)
    assert [(s.name, s.format) for s in registry.installed_models()] == [("nano", "bf16"), ("klein-4b", "fp8")]
    found = registry.resolve("klein-4b")
    assert (found.transformer, found.vae, found.text_encoder, found.tokenizer) == (
        file, whole / "vae", whole / "text_encoder", whole / "tokenizer",
    )  # fmt: skip


def _quantised(tensors: dict[str, Tensor], file: Path, kind: str = "fp8"):
    out, metadata = published.quantised(tensors, kind)
    return out, file, metadata


def test_full_precision_comes_first_unless_a_format_is_requested(
    folder: Path, transformer: dict[str, Tensor], tmp_path: Path
) -> None:
    place = installed(folder, tmp_path)
    file = published.write(*_quantised(transformer, tmp_path / "flux-2-klein-4b-fp8.safetensors"))
    registry = ModelRegistry((tmp_path,))
    assert registry.resolve("klein-4b").transformer == place / "transformer"
    assert registry.resolve("klein-4b", quant="fp8").transformer == file
    assert registry.resolve("klein-4b", quant="nvfp4").transformer == place / "transformer"
    for name in (file.name, file.stem):
        assert registry.resolve(name).transformer == file
    copy = tmp_path / "unet" / file.name
    copy.parent.mkdir()
    copy.hardlink_to(file)
    with pytest.raises(ModelNotFound, match=f"2 models '{file.stem}'"):
        ModelRegistry((tmp_path,)).resolve(file.stem)
    (tmp_path / "flux-2-klein-4b-broken.safetensors").write_bytes(b"junk")
    with pytest.raises(BadWeights, match="is not a whole safetensors file"):
        ModelRegistry((tmp_path,)).resolve("flux-2-klein-4b-broken")


def test_comfyui_folders_are_identified_by_content(
    folder: Path, transformer: dict[str, Tensor], tmp_path: Path
) -> None:
    home = comfyui(folder, tmp_path / "ComfyUI" / "models", "flux-2-klein-base-4b-fp8.safetensors", transformer)
    (home / "loras").mkdir()
    published.write({"x.lora_A.weight": torch.zeros(2, 2)}, home / "loras" / "klein-4b.safetensors")
    shutil.copytree(folder / "tokenizer", tmp_path / "tokens" / "tokenizer")
    (tmp_path / "tokens" / "model_index.json").write_text((folder / "model_index.json").read_text())
    registry = ModelRegistry((home, tmp_path / "tokens"))
    assert set(registry.installed()) == {"nano", "klein-base-4b"}
    found = registry.resolve("klein-base-4b")
    assert found.vae == home / "vae" / "flux2-vae.safetensors"
    assert found.text_encoder == home / "text_encoders" / "qwen_3_4b.safetensors"
    assert found.tokenizer == tmp_path / "tokens" / "tokenizer"


def test_encoder_is_chosen_by_the_transformers_input_width(
    folder: Path, transformer: dict[str, Tensor], tmp_path: Path
) -> None:
    home = comfyui(folder, tmp_path, "flux-2-klein-4b.safetensors", transformer)
    wider = {"model.embed_tokens.weight": torch.zeros(9, 64), "model.layers.0.self_attn.q_norm.weight": torch.zeros(4)}
    published.write(wider, home / "text_encoders" / "a_wider_one.safetensors")
    shutil.copytree(folder / "tokenizer", home / "diffusion_models" / "tokenizer")
    assert ModelRegistry((home,)).resolve("klein-4b").text_encoder.name == "qwen_3_4b.safetensors"


def test_small_decoder_is_used_when_requested(folder: Path, tmp_path: Path) -> None:
    place = installed(folder, tmp_path)
    small = published.small_decoder(tmp_path / ".work")
    file = published.write(small, tmp_path / "full_encoder_small_decoder.safetensors")
    assert ModelRegistry((tmp_path,)).resolve("klein-4b").vae == place / "vae"
    # A folder's own autoencoder comes first, but it is not small.
    assert ModelRegistry((tmp_path,), small_decoder=True).resolve("klein-4b").vae == file


def named(transformer: dict[str, Tensor], folder: Path, home: Path, name: str) -> Path:
    """Create a single file with companions beside it and no index."""
    for part in ("text_encoder", "tokenizer", "vae"):
        shutil.copytree(folder / part, home / part, dirs_exist_ok=True)
    return published.write(transformer, home / name)


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("flux-2-klein-4b.safetensors", "klein-4b"),
        ("FLUX.2-klein-base-4B-fp8.safetensors", "klein-base-4b"),
        ("flux2_klein_9b_kv.safetensors", "klein-9b-kv"),
        ("flux-2-klein-9b-kv-fp8.safetensors", "klein-9b-kv"),
        ("klein-9b-nvfp4.safetensors", "klein-9b"),
        ("my-finetune.safetensors", None),
    ],
)
def test_similar_variants_are_identified_by_name_or_must_be_given(
    name: str, variant: str | None, folder: Path, transformer: dict[str, Tensor], tmp_path: Path
) -> None:
    file = named(transformer, folder, tmp_path, name)
    if variant is not None:
        assert ModelRegistry().resolve(str(file)).variant.name == variant
        return
    with pytest.raises(BadWeights, match=r"look alike\. Set variant to klein-4b or klein-base-4b or klein-9b"):
        ModelRegistry().resolve(str(file))
    assert ModelRegistry().resolve(str(file), "klein-base-9b").variant.name == "klein-base-9b"


def test_error_lists_only_variants_of_the_right_size(
    folder: Path, transformer: dict[str, Tensor], tmp_path: Path
) -> None:
    wide = transformer | {"img_in.weight": torch.zeros(3072, 128)}
    file = named(wide, folder, tmp_path, "mine.safetensors")
    with pytest.raises(BadWeights, match=r"Set variant to klein-4b or klein-base-4b\."):
        ModelRegistry().resolve(str(file))
    with pytest.raises(BadWeights, match=r"is 3072 wide; klein-9b is 4096\..*klein-4b or klein-base-4b"):
        ModelRegistry().resolve(str(file), "klein-9b")


@pytest.mark.parametrize(
    ("name", "width", "setting", "taken"),
    [
        ("flux-2-klein-4b", 0, "klein-base-4b", "klein-base-4b"),
        ("flux-2-klein-4b", 3072, "klein-9b", "klein-4b"),
        ("flux-2-klein-4b", 4096, "klein-9b", "klein-9b"),  # misnamed: its error asks for the setting
        ("mine", 0, "klein-base-4b", "klein-base-4b"),
    ],
)
def test_variant_of_a_named_path_holds_unless_the_width_contradicts(
    name: str, width: int, setting: str, taken: str, folder: Path, transformer: dict[str, Tensor], tmp_path: Path
) -> None:
    wide = {"img_in.weight": torch.zeros(width, 128)} if width else {}
    file = named(transformer | wide, folder, tmp_path, f"{name}.safetensors")
    assert ModelRegistry(variant=setting).resolve(str(file), setting).variant.name == taken


@pytest.mark.parametrize(
    ("name", "width", "setting", "taken"),
    [
        ("flux-2-klein-4b", 0, "klein-base-4b", "klein-4b"),
        ("flux-2-klein-4b", 4096, "klein-9b", "klein-9b"),  # misnamed
        ("mine", 0, "klein-base-4b", "klein-base-4b"),
    ],
)
def test_variant_setting_overrules_no_name_of_another_path(
    name: str, width: int, setting: str, taken: str, folder: Path, transformer: dict[str, Tensor], tmp_path: Path
) -> None:
    wide = {"img_in.weight": torch.zeros(width, 128)} if width else {}
    file = named(transformer | wide, folder, tmp_path, f"{name}.safetensors")
    assert ModelRegistry(variant=setting).resolve(str(file)).variant.name == taken


def test_variant_setting_overrules_no_name_of_a_searched_file(
    folder: Path, transformer: dict[str, Tensor], tmp_path: Path
) -> None:
    named(transformer, folder, tmp_path, "flux-2-klein-4b.safetensors")
    assert set(ModelRegistry((tmp_path,), variant="klein-base-4b").installed()) == {"nano", "klein-4b"}


@pytest.mark.parametrize(("name", "variant"), [("FLUX.2-klein-4B", "klein-4b"), ("my-klein", "my-klein")])
def test_variant_setting_overrules_no_folder(name: str, variant: str, folder: Path, tmp_path: Path) -> None:
    place = installed(folder, tmp_path, name)
    assert ModelRegistry(variant="klein-9b").resolve(str(place), "klein-9b").variant.name == variant


def test_renamed_published_file_is_identified_by_its_hash(
    folder: Path, transformer: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = named(transformer, folder, tmp_path, "renamed.safetensors")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    row = VARIANTS["klein-base-4b"]
    known = File("x", "y.safetensors", bytes=file.stat().st_size, sha256=digest[:8])
    monkeypatch.setitem(variants.VARIANTS, "klein-base-4b", replace(row, files=(known,)))
    for setting, now in ((None, None), ("klein-4b", "klein-4b"), (None, "klein-4b")):
        assert ModelRegistry(variant=now).resolve(str(file), setting).variant.name == "klein-base-4b"
    monkeypatch.setitem(variants.VARIANTS, "klein-base-4b", replace(row, files=(replace(known, sha256="0" * 8),)))
    with pytest.raises(BadWeights, match="look alike"):
        ModelRegistry().resolve(str(file))


def test_hub_blob_is_identified_by_name_without_reading(
    folder: Path, transformer: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = named(transformer, folder, tmp_path, "renamed.safetensors")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    blob = tmp_path / "blobs" / digest
    blob.parent.mkdir()
    file.rename(blob)
    file.symlink_to(blob)
    known = File("x", "y.safetensors", bytes=blob.stat().st_size, sha256=digest[:8])
    monkeypatch.setitem(variants.VARIANTS, "klein-9b", replace(VARIANTS["klein-9b"], files=(known,), hidden=0))
    monkeypatch.setattr(identify, "sha256", lambda file: pytest.fail("read the whole file"))
    assert ModelRegistry().resolve(str(file)).variant.name == "klein-9b"


def test_index_beside_a_file_identifies_it(folder: Path, transformer: dict[str, Tensor], tmp_path: Path):
    file = named(transformer, folder, tmp_path / "mine", "whatever.safetensors")
    index = json.loads((folder / "model_index.json").read_text())
    (tmp_path / "mine" / "model_index.json").write_text(json.dumps(index | {"is_distilled": False}))
    found = ModelRegistry().resolve(str(file)).variant
    assert (found.name, found.steps, found.guidance) == ("mine", 50, 4.0)


def test_folder_with_one_klein_file_resolves_to_it(folder: Path, transformer: dict[str, Tensor], tmp_path: Path):
    file = named(transformer, folder, tmp_path / "flat", "flux-2-klein-4b.safetensors")
    assert ModelRegistry().resolve(str(tmp_path / "flat")).transformer == file


def test_similar_name_is_suggested(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"'klein-4n'\. Did you mean klein-4b"):
        ModelRegistry().resolve("klein-4n")
    with pytest.raises(ModelNotFound, match=r"'klein-4n'\. Did you mean klein-4b"):
        ModelRegistry(variant="klein-4n").resolve("nano")
    with pytest.raises(ModelNotFound, match=r"'klein-9bkv'\. Did you mean klein-9b-kv"):
        ModelRegistry().resolve(str(tmp_path), "klein-9bkv")
    with pytest.raises(ModelNotFound, match=r"not installed; installed: nano\. Pull klein-9b\."):
        ModelRegistry().resolve("klein-9b")


def test_unusable_models_are_listed_with_the_reason(
    folder: Path, transformer: dict[str, Tensor], tmp_path: Path
) -> None:
    """List unusable models with the reason for each.

    They are a custom klein, one of unknown variant, a broken one, and unsupported formats.
    """
    own = installed(folder, tmp_path, "my-klein")
    unnamed = published.write(transformer | {"img_in.weight": torch.zeros(3072, 128)}, tmp_path / "mine.safetensors")
    broken = published.write(transformer, tmp_path / "flux-2-klein-9b.safetensors")
    broken.write_bytes(broken.read_bytes()[:-1])
    packed, other = tmp_path / "unet" / "flux-2-klein-4b-Q4.gguf", tmp_path / "sdxl.ckpt"
    packed.parent.mkdir()
    packed.write_bytes(b"GGUF" + b"\0" * 9)
    other.write_bytes(b"PK\x03\x04")
    named_well = installed(folder, tmp_path)
    published.write({"x.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "klein-style.safetensors")
    registry = ModelRegistry((tmp_path,))
    errors = {model.path: str(model.error) for model in registry.unusable_models()}
    assert errors.keys() == {own, unnamed, broken, packed}
    assert "give its path as the model" in errors[own]
    assert "Set variant to klein-4b or klein-base-4b" in errors[unnamed]
    assert "is not a whole safetensors file" in errors[broken]
    assert "is not a whole GGUF file: its version is 0" in errors[packed]
    assert registry.installed() == {"nano": NANO, "klein-4b": named_well}
    with pytest.raises(BadWeights, match=r"flux-2-klein-9b\.safetensors .* not a whole safetensors file"):
        registry.resolve("klein-9b")


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["x.lora_A.weight"], "is a LoRA, which changes a model but is not one"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "is an SDXL or SD checkpoint, not a klein transformer"),
        (["double_blocks.0.img_mod.lin.weight"], r"is a FLUX\.1 model"),
        (["decoder.post_quant_conv.weight", "bn.running_mean"], "is an autoencoder, not a klein transformer"),
        (["something.weight"], r"is not a FLUX\.2 \[klein\] transformer: it has no img_in"),
    ],
)
def test_other_architectures_are_refused_without_asking_the_variant(keys: list[str], says: str, tmp_path: Path) -> None:
    file = published.write({name: torch.zeros(2, 2) for name in keys}, tmp_path / "whatever.safetensors")
    with pytest.raises(BadWeights, match=says):
        ModelRegistry().resolve(str(file))


def test_error_for_a_folder_without_model_names_its_contents(
    folder: Path, transformer: dict[str, Tensor], tmp_path: Path
) -> None:
    with pytest.raises(BadWeights, match=rf"is a part of the model in {folder}\. Give that folder"):
        ModelRegistry().resolve(str(folder / "vae"))
    for path in (folder / "transformer", folder / "transformer" / "diffusion_pytorch_model.safetensors"):
        with pytest.raises(BadWeights, match=rf"is a part of the model in {folder}\. Give that folder"):
            ModelRegistry().resolve(str(path))
    (tmp_path / "klein.gguf").write_bytes(b"GGUF" + b"\0" * 9)
    with pytest.raises(BadWeights, match=r"klein\.gguf \(13 bytes\) is not a whole GGUF file"):
        ModelRegistry().resolve(str(tmp_path))
    for name in ("a", "b"):
        published.write(transformer, tmp_path / f"{name}.safetensors")
    with pytest.raises(BadWeights, match=r"has 2 klein files: a\.safetensors, b\.safetensors\. Give one of them"):
        ModelRegistry().resolve(str(tmp_path))
    with pytest.raises(ModelNotFound, match=r"No model at /nowhere\. List the installed models"):
        ModelRegistry().resolve("/nowhere")


def test_error_for_a_missing_component_names_the_smallest_pull(
    folder: Path, transformer: dict[str, Tensor], tmp_path: Path
) -> None:
    """Suggest pulling only the missing component.

    ComfyUI's files include no tokenizer, and a whole model is too large to download for it.
    """
    home = comfyui(folder, tmp_path / "models", "flux-2-klein-9b.safetensors", transformer)
    with pytest.raises(BadWeights, match=r"No tokenizer beside the file, .*Pull tokenizer\.$"):
        ModelRegistry((home,)).resolve("klein-9b")
    shutil.rmtree(home / "text_encoders")
    with pytest.raises(BadWeights, match=r"No text_encoder beside the file, .*Pull klein-9b-companions\.$"):
        ModelRegistry((home,)).resolve("klein-9b")
    pulled = hub(tmp_path / "hub", VARIANTS["klein-4b"].repo, {
        name: path for name, path in tree(folder).items() if name.startswith(("model_index", "tokenizer", "text_enc"))
    })  # fmt: skip
    assert ModelRegistry((home,), tmp_path / "hub").resolve("klein-9b").tokenizer == pulled / "tokenizer"
