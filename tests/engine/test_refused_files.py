"""Tests that a file that is no klein model gives a one-line error."""

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.contract import BadWeights, EngineConfig, EngineError, Exact, Job
from engine.engine import Engine
from engine.registry import NANO, ModelRegistry
from tests.engine import published

# Files given by mistake -> the error for each.


def cut(file: Path) -> Path:
    file.write_bytes(file.read_bytes()[:-1])
    return file


def header_of_nonsense(file: Path) -> Path:
    file.write_bytes(struct.pack("<Q", 20) + b"x" * 20 + b"\0" * 100)
    return file


def endless_header(file: Path) -> Path:
    file.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    return file


def overlapping(file: Path) -> Path:
    header = {
        name: {"dtype": "F32", "shape": [2], "data_offsets": [begin, begin + 8]} for name, begin in (("a", 0), ("b", 4))
    }
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 12)
    return file


def starting(start: bytes) -> Callable[[Path], Path]:
    def make(file: Path) -> Path:
        file.write_bytes(start + b"\0" * 1000)
        return file

    return make


def holding(*names: str) -> Callable[[Path], Path]:
    def make(file: Path) -> Path:
        save_file({name: torch.zeros(4, 4) for name in names}, file)
        return file

    return make


def crowded(file: Path) -> Path:
    header = json.dumps({str(n): {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for n in range(20_001)})
    file.write_bytes(struct.pack("<Q", len(header)) + header.encode())
    return file


def not_klein(transformer: dict[str, Tensor]) -> dict[str, tuple[Callable[[Path], Path], str]]:
    def whole(file: Path) -> Path:
        return published.write(transformer, file)

    return {
        "cut short": (lambda file: cut(whole(file)), r"is not a whole safetensors file: .* bytes are named"),
        "nonsense": (header_of_nonsense, r"is not a whole safetensors file: its header makes no sense"),
        "endless header": (endless_header, r"is not a whole safetensors file: its header is cut short or invalid"),
        "20,001 tensors": (crowded, r"its header makes no sense \(20,001 tensors\)"),
        "empty": (lambda file: (file.write_bytes(b""), file)[1], r"\(0 bytes\) is not a whole safetensors file"),
        "overlapping": (overlapping, r"b does not lie where its header says"),
        "GGUF": (starting(b"GGUF"), r"is not a whole GGUF file: its version is 0"),
        "pickle": (starting(b"PK\x03\x04"), r"is a pickle, which could run code; only safetensors and GGUF are read"),
        "old pickle": (starting(b"\x80\x02"), r"is a pickle"),
        "git-lfs": (starting(b"version https://git-lfs"), r"is a pointer of git-lfs"),
        "LoRA": (
            holding("transformer.transformer_blocks.0.attn.to_q.lora_A.weight"),
            r"is a LoRA, which changes a model but is not one, not a klein",
        ),
        "SDXL": (
            holding("model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.0.x"),
            r"is an SDXL or SD checkpoint, not a klein",
        ),
        "FLUX.1": (holding("double_blocks.0.img_mod.lin.weight"), r"is a FLUX\.1 model, not a klein"),
        "autoencoder": (
            holding("decoder.post_quant_conv.weight", "bn.running_mean"),
            r"is an autoencoder, not a klein",
        ),
        "text encoder": (holding("model.layers.0.self_attn.q_norm.weight"), r"is a text encoder, not a klein"),
        "unknown": (holding("something.weight"), r"is not a FLUX\.2 \[klein\] transformer: it has no img_in\.weight"),
    }


@pytest.mark.parametrize("what", not_klein({}))
def test_file_that_is_no_klein_gives_a_one_line_error(
    what: str, bfl: dict[str, Tensor], folder: Path, tmp_path: Path
) -> None:
    make, says = not_klein(bfl)[what]
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(folder / part, tmp_path / part)
    file = make(tmp_path / "flux-2-klein-4b.safetensors")
    with pytest.raises(BadWeights, match=says) as error:
        list(Engine(EngineConfig(device="cpu", dtype="float32")).run(Job("x", model=str(file))))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_second_scan_of_a_large_library_opens_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most files of a library are other programs' models, which every scan passes by in the same order."""
    for number in range(300):
        file = tmp_path / f"{number}.safetensors"
        save_file({f"block.{number}.lora_A.weight": torch.zeros(1)}, file) if number % 10 else file.touch()
    opened: list[Path] = []
    open_file = Path.open

    def noted(self: Path, *arguments: Any, **options: Any) -> Any:
        opened.append(self)
        return open_file(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", noted)
    registry = ModelRegistry((tmp_path,))
    counts = []
    for _ in range(2):
        opened.clear()
        assert [*registry.installed()] == ["nano"]
        assert not registry.unusable_models()
        counts.append(sum(file.is_relative_to(tmp_path) for file in opened))
    assert counts == [300, 0]


def test_file_named_as_a_pickle_is_refused_unopened(tmp_path: Path) -> None:
    file = tmp_path / "flux-2-klein-4b.ckpt"
    file.write_bytes(b"\x80\x02anything")
    with pytest.raises(BadWeights, match="is a pickle"):
        ModelRegistry().resolve(str(file))


def test_the_9b_encoder_with_a_4b_transformer_is_refused(bfl: dict[str, Tensor], folder: Path, tmp_path: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from tests import toys

    home = tmp_path / "mixed"
    shutil.copytree(folder, home)
    config: dict[str, Any] = toys.QWEN3 | {"hidden_size": 64}
    wide = Qwen3ForCausalLM(Qwen3Config(vocab_size=300, **config))
    wide.save_pretrained(home / "text_encoder")
    with pytest.raises(
        BadWeights, match=r"gives 192 numbers a token, the transformer reads 96.*klein 9B with Qwen3-8B"
    ):
        list(Engine(EngineConfig(device="cpu", dtype="float32")).run(Job("x", model=str(home))))


def test_unreadable_file_gives_a_clear_error(bfl: dict[str, Tensor], folder: Path, tmp_path: Path) -> None:
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(folder / part, tmp_path / part)
    file = published.write(bfl, tmp_path / "flux-2-klein-4b.safetensors")
    with forbidden(file, tmp_path), pytest.raises(BadWeights, match=r"may not be read by this user\. Change its perm"):
        ModelRegistry().resolve(str(file))


@contextmanager
def forbidden(file: Path, home: Path) -> Iterator[None]:
    """Remove the permission to read `file` for the duration of the context.

    A root process gives up its privileges meanwhile, because root can read everything.
    """
    above = [folder for folder in file.parents if folder.is_relative_to("/tmp") and folder != Path("/tmp")]
    modes = {path: path.stat().st_mode for path in (*above, file)}
    user = os.geteuid()
    for folder in above:
        folder.chmod(0o755)
    file.chmod(0)
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        for path, mode in modes.items():
            path.chmod(mode)


def test_error_while_loading_leaves_no_partial_model(folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "torn"
    shutil.copytree(folder, home)
    engine = Engine(EngineConfig(device="cpu", dtype="float32", cache_bytes=0))
    for _ in engine.run(Job("x", model=str(NANO), size=Exact(64, 64), steps=1)):
        pass
    cut(home / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(EngineError):
        list(engine.run(Job("x", model=str(home))))
    for _ in engine.run(Job("x", model=str(NANO), size=Exact(64, 64), steps=1)):
        pass
    assert engine.status().loaded == str(NANO)


def test_a_folder_of_pickles_is_refused(folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "pickled"
    shutil.copytree(folder, home)
    file = home / "transformer" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    says = r"only diffusion_pytorch_model\.bin, which is a pickle and could run code\. Only safetensors are read"
    with pytest.raises(BadWeights, match=says):
        list(Engine(EngineConfig(device="cpu", dtype="float32")).run(Job("x", model=str(home))))
