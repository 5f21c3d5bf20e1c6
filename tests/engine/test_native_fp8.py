"""Tests that fp8 is multiplied natively only where a trial product of its kind is right."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.checkpoints import quant
from engine.checkpoints.files.header import Entry
from engine.checkpoints.quant import StoredWeight, fp8
from engine.checkpoints.quant.fp8 import Fp8Linear
from engine.memory.device import multiplies_fp8

CPU = torch.device("cpu")
RIGHT = torch._scaled_mm
"""The CPU has this product too, only slowly."""


def windows(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, **options: Any) -> Tensor:
    if scale_a.ndim:
        raise RuntimeError("Rowwise scaling is not currently supported on your device")
    return RIGHT(a, b, scale_a, scale_b, **options)


def none(*_: Any, **__: Any) -> Tensor:
    raise RuntimeError("torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0")


def wrong(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, **options: Any) -> Tensor:
    return 1.1 * RIGHT(a, b, scale_a, scale_b, **options)


@pytest.fixture(autouse=True)
def ada(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the CPU stand for a GPU that multiplies fp8."""
    monkeypatch.setattr(fp8, "multiplies_fp8", lambda device: device == CPU)
    fp8.multiplies.cache_clear()
    yield
    fp8.multiplies.cache_clear()


def make(*, full_precision: bool = False) -> Fp8Linear:
    with torch.device("meta"):
        linear = nn.Linear(64, 128, bias=False)
        layer = quant.MEMORY_SCHEMES["fp8"].make(linear, CPU, full_precision=full_precision)
    assert isinstance(layer, Fp8Linear)
    return layer


@pytest.mark.parametrize(
    ("product", "static", "by_rows"), [(RIGHT, True, True), (windows, True, False), (none, False, False),
                                       (wrong, False, False)]
)  # fmt: skip
def test_layer_multiplies_natively_where_its_product_works(
    product: Callable[..., Tensor], static: bool, by_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "_scaled_mm", product)
    weight, x = torch.randn(128, 64), torch.randn(3, 64, dtype=torch.bfloat16)
    for tensors, native in (
        (fp8.encode(weight) | {"input_scale": torch.tensor(0.01)}, static),
        (fp8.encode(weight), by_rows),
        (fp8.encode(weight, by_rows=True) | {"input_scale": torch.tensor(0.01)}, by_rows),
    ):
        layer = make()
        layer.load_tensors(tensors)
        assert layer.native is native
        assert (layer(x).float() - x.float() @ weight.T).norm() < 0.08 * (x.float() @ weight.T).norm()
        layer = make(full_precision=True)
        layer.load_tensors(tensors)
        assert layer.native is False


@pytest.mark.parametrize(("product", "held"), [(RIGHT, "fp8"), (windows, "nvfp4")])
def test_four_bits_become_eight_only_where_these_multiply_by_rows(
    product: Callable[..., Tensor], held: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "_scaled_mm", product)
    scheme = quant.MEMORY_SCHEMES["nvfp4"]
    stored = StoredWeight(scheme, dict[str, Entry](), (128, 64))
    assert scheme.memory_scheme(stored, CPU) == held


def test_fp8_is_tried_from_ada_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, native in (((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert multiplies_fp8(torch.device("cuda")) is native
    assert not multiplies_fp8(CPU)
