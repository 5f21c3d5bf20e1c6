"""Tests that a broken diffusers folder is refused with a one-line error.

A part is missing or invalid. The error names it, and no image is generated.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.contract import BadWeights, EngineConfig, Exact, Job
from engine.engine import Engine
from engine.families.klein import components

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
ENCODER = "text_encoder/model.safetensors"

Change = Callable[[Path], object]


def without(file: str, *starts: str) -> Change:
    """Remove every tensor whose name starts with one of `starts`."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / file)
        kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(starts)}
        assert len(kept) < len(tensors)
        save_file(kept, folder / file)

    return change


def stored_as(file: str, name: str, dtype: torch.dtype) -> Change:
    def change(folder: Path) -> None:
        tensors = load_file(folder / file)
        save_file(tensors | {name: tensors[name].to(dtype)}, folder / file)

    return change


def saying(file: str, **keys: Any) -> Change:
    """Change values in a JSON file, where None removes a key."""

    def change(folder: Path) -> None:
        there = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        content = {key: value for key, value in (there | keys).items() if value is not None}
        (folder / file).write_text(json.dumps(content))

    return change


def written(file: str, text: str) -> Change:
    return lambda folder: (folder / file).write_text(text)


BROKEN: dict[str, tuple[Change, str]] = {
    "the last double block": (
        without(TRANSFORMER, "transformer_blocks.1."),
        r"transformer lacks the tensor transformer_blocks\.1\.attn\.to_q\.weight",
    ),
    "the last single block": (
        without(TRANSFORMER, "single_transformer_blocks.1."),
        r"transformer lacks the tensor single_transformer_blocks\.1\.",
    ),
    "more blocks than its config has": (
        saying("transformer/config.json", num_layers=1),
        r"transformer has a tensor klein does not know: transformer_blocks\.1\.",
    ),
    "the autoencoder's attention": (
        without(VAE, "encoder.mid_block.attentions", "decoder.mid_block.attentions"),
        r"autoencoder lacks the tensor encoder\.mid_block\.attentions\.0\.group_norm",
    ),
    "the latent statistics": (without(VAE, "bn."), r"autoencoder lacks the tensor bn\.running_mean"),
    "a layer of the encoder": (
        without(ENCODER, "model.layers.26.mlp.up_proj"),
        r"text encoder lacks the tensor model\.layers\.26\.mlp\.up_proj",
    ),
    "a format that is not read": (
        stored_as(TRANSFORMER, "proj_out.weight", torch.int32),
        r"transformer, proj_out\.weight is stored as I32, which is not read; read are .*BF16",
    ),
    "the encoder's number of layers": (
        saying("text_encoder/config.json", num_hidden_layers=None),
        r"text encoder's config makes no sense \(KeyError: 'num_hidden_layers'\)",
    ),
    "a number of heads in words": (
        saying("text_encoder/config.json", num_attention_heads="two"),
        r"text encoder's config makes no sense \(.*num_attention_heads",
    ),
    "rotary positions in a list": (
        saying("text_encoder/config.json", rope_parameters=["default"]),
        r"text encoder's config makes no sense \(ValueError: the rotary positions are \['default'\]\)",
    ),
    "axes that are none": (
        saying("transformer/config.json", axes_dims_rope=7),
        r"transformer's config makes no sense \(TypeError",
    ),
    "norm groups that do not divide": (
        saying("vae/config.json", norm_num_groups=7),
        r"autoencoder's config makes no sense \(.*divisible",
    ),
    "a config that is a list": (written("vae/config.json", "[]"), r"config\.json is not a JSON object"),
    "the tokenizer's words": (
        lambda folder: (folder / "tokenizer" / "tokenizer.json").unlink(),
        r"tokenizer in .* cannot be used",
    ),
    "a tokenizer cut short": (written("tokenizer/tokenizer.json", '{"version": "1.0", "tr'), r"tokenizer in .* cannot"),
    "the chat template": (
        lambda folder: (folder / "tokenizer" / "chat_template.jinja").unlink(),
        r"tokenizer in .* cannot be used \(.*chat_template",
    ),
    "layers in words": (
        saying("klein.json", text_layers="9, 18, 27"),
        r"klein\.json: text_layers is '9, 18, 27'; it must be a list of positive integers",
    ),
    "no text at all": (saying("klein.json", text_length=0), r"text_length is '0'; it must be a positive integer"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_folder_gives_a_one_line_error(what: str, folder: Path, tmp_path: Path) -> None:
    change, says = BROKEN[what]
    home = Path(shutil.copytree(folder, tmp_path / "broken"))
    change(home)
    with pytest.raises(BadWeights, match=says) as error:
        list(Engine(EngineConfig(device="cpu", dtype="float32")).run(Job("x", model=str(home), size=Exact(64, 64))))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def test_bug_of_ours_is_not_reported_as_a_damaged_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def constructor(shape: object) -> None:
        raise NameError("name 'shpae' is not defined")

    monkeypatch.setattr(components, "Transformer", constructor)
    with pytest.raises(NameError, match="shpae"):
        list(Engine(EngineConfig(device="cpu")).run(Job("x", model="nano", size=Exact(64, 64))))


def test_wrong_config_keeps_the_error_that_it_caused(folder: Path, tmp_path: Path) -> None:
    home = Path(shutil.copytree(folder, tmp_path / "broken"))
    saying("vae/config.json", norm_num_groups=7)(home)
    with pytest.raises(BadWeights) as error:
        components.autoencoder(home / "vae")
    assert isinstance(error.value.__cause__, ValueError)


def test_tokenizer_without_vocabulary_is_refused(tmp_path: Path) -> None:
    """Check that a tokenizer without a vocabulary is refused.

    transformers builds a Qwen2Tokenizer without a vocabulary from its config alone, so every prompt would be the same.
    """
    from engine.families.klein.text_encoder import Tokenizer
    from engine.registry import NANO

    shutil.copytree(NANO / "tokenizer", tmp_path / "tokenizer", ignore=shutil.ignore_patterns("tokenizer.json"))
    with pytest.raises(BadWeights, match=r"it knows no words: tokenizer\.json, or vocab\.json"):
        Tokenizer(tmp_path / "tokenizer", 64)
