"""Tests that weights kept in 16 bits and widened for each product change no bit and halve the memory."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.checkpoints import narrow
from engine.checkpoints.narrow import NarrowEmbedding, NarrowLinear
from engine.contract import Exact, Job, OutOfMemory, Result
from engine.families.klein.checkpoint import Checkpoint
from engine.families.klein.loader import LoadOptions, prepare
from engine.families.klein.lora import Lora, LoraLinear
from engine.families.klein.pipeline import Klein
from engine.families.klein.variants import VARIANTS
from engine.memory import host, layout
from engine.memory.device import Device
from engine.registry import ModelRegistry
from tests.engine import published
from tests.engine.loras import LAYERS, bfl_fused, factors, write
from tests.engine.test_memory import nets
from tests.engine.test_offload import last

FP32, BF16 = (Device(torch.device("cpu"), dtype) for dtype in (torch.float32, torch.bfloat16))
JOB = Job("a red ball", size=Exact(64, 64), seed=3)
WIDE = 1 << 62


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16])
def half_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy whose files have 16 bits."""
    folder = published.toy(tmp_path_factory.mktemp("half") / "toy")
    for file in folder.rglob("*.safetensors"):
        save_file({name: tensor.to(request.param) for name, tensor in load_file(file).items()}, file)
    return folder


def load(folder: Path, narrow_from: int, monkeypatch: pytest.MonkeyPatch, *loras: Lora) -> Klein:
    monkeypatch.setattr(narrow, "NARROW_FROM", narrow_from)
    # Narrow layers are stored by rows; a product by columns may round otherwise.
    monkeypatch.setattr(layout, "BY_COLUMNS", 0)
    return last(Klein.load(ModelRegistry().resolve(str(folder)), FP32, None, LoadOptions(loras=loras)))


def generate(klein: Klein, job: Job = JOB) -> np.ndarray:
    *_, result = klein.run(job)
    assert isinstance(result, Result)
    return result.image


def linears(klein: Klein) -> Iterator[nn.Module]:
    for network in (klein.transformer, klein.text_encoder):
        yield from (layer for layer in network.modules() if isinstance(layer, nn.Linear | nn.Embedding))


def test_images_of_narrow_weights_equal_those_of_widened_ones(
    half_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide, held = (load(half_folder, count, monkeypatch) for count in (WIDE, 1))
    assert not any(isinstance(layer, NarrowLinear | NarrowEmbedding) for layer in linears(wide))
    assert all(isinstance(layer, NarrowLinear | NarrowEmbedding) for layer in linears(held))
    sizes = [sum(layer.weight.nbytes for layer in linears(klein)) for klein in (wide, held)]  # type: ignore[misc]
    assert sizes[0] == 2 * sizes[1]
    reference = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    for job in (JOB, Job("a green box", references=(reference,), seed=4)):
        assert np.array_equal(generate(wide, job), generate(held, job))


def test_only_large_matrices_of_a_small_model_stay_narrow(half_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    klein = load(half_folder, 6 * 128 * 128, monkeypatch)
    for layer in linears(klein):
        is_narrow = isinstance(layer, NarrowLinear | NarrowEmbedding)
        assert is_narrow == (layer.weight.numel() >= 6 * 128 * 128)  # type: ignore[operator]


def test_files_in_fp32_are_not_rounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    klein = load(folder, 1, monkeypatch)
    assert not any(isinstance(layer, NarrowLinear | NarrowEmbedding) for layer in linears(klein))


def test_lora_beside_a_narrow_layer_equals_a_merged_one(
    half_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(bfl_fused(), tmp_path / "style.safetensors")
    plain, changed = load(half_folder, 1, monkeypatch), load(half_folder, 1, monkeypatch, Lora(file, 0.5))
    for i, (name, (rows, columns)) in enumerate(LAYERS.items()):
        layer, beside = plain.transformer.get_submodule(name), changed.transformer.get_submodule(name)
        assert isinstance(layer, NarrowLinear)
        assert isinstance(beside, LoraLinear)
        up, down = factors(rows, columns, i)
        x = torch.randn(2, 5, columns)
        merged = x @ (layer.weight.float() + 0.5 * up @ down).T
        # Observed: 2e-5, fp32 sums in another order.
        torch.testing.assert_close(beside(x), merged, rtol=1e-4, atol=1e-4)


def _sparse(module: nn.Module, file: Path, **more: Tensor) -> Path:
    """Write a safetensors file of bf16 zeros that takes no disk space."""
    header, end = {}, 0
    for name, tensor in (module.state_dict() | more).items():
        size = 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)
    return file


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A klein 4B in its real shapes, as three files of zeros."""
    folder = tmp_path_factory.mktemp("real")
    transformer, encoder, autoencoder = nets("4b")
    return Checkpoint(
        VARIANTS["klein-4b"],
        transformer=_sparse(transformer, folder / "transformer.safetensors"),
        vae=_sparse(autoencoder, folder / "vae.safetensors"),
        # A layer above the last that is read shows that the encoder is cut there.
        text_encoder=_sparse(encoder, folder / "encoder.safetensors", **{"model.layers.27.mlp.x": torch.zeros(1)}),
        tokenizer=folder,
    )


def _machine(monkeypatch: pytest.MonkeyPatch, gigabytes: float) -> None:
    monkeypatch.setattr(host, "free_bytes", lambda: round(gigabytes * 1e9))
    monkeypatch.setattr(Device, "total_bytes", lambda self: round((gigabytes + 1) * 1e9))


def test_4b_needs_as_much_memory_in_fp32_as_in_bf16(real: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """README says 16 GB for all of it. Without narrow weights a machine in fp32 needed 32.0 GB."""
    _machine(monkeypatch, 64)
    peaks = {device.dtype: prepare(real, device, LoadOptions()).plan.peak / 1e9 for device in (FP32, BF16)}
    assert peaks[torch.float32] < 1.2 * peaks[torch.bfloat16]
    monkeypatch.setattr(narrow, "NARROW_FROM", WIDE)
    assert prepare(real, FP32, LoadOptions()).plan.peak / 1e9 > 1.7 * peaks[torch.bfloat16]


def test_refusal_on_a_machine_in_fp32_names_the_scheme_that_fits(
    real: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    _machine(monkeypatch, 15.5)
    with pytest.raises(OutOfMemory, match=r"Set quant to fp8: it would fit, with 1\d\.\d GB\.$"):
        prepare(real, FP32, LoadOptions())


def test_refusal_for_wide_weights_names_bfloat16_last(real: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrow, "NARROW_FROM", WIDE)
    _machine(monkeypatch, 19)
    with pytest.raises(OutOfMemory, match=r"Set dtype to bfloat16: it would fit, with 1\d\.\d GB\.$"):
        prepare(real, FP32, LoadOptions(quant="fp8"))
