"""Tests the order of weights on a CPU: other strides, the same numbers."""

import copy

import torch
from torch import nn

from engine.memory.layout import BY_COLUMNS, arrange_for_cpu


def test_arranged_weights_have_the_same_shapes_and_give_the_same_results() -> None:
    torch.manual_seed(0)
    plain = nn.ModuleDict({"linear": nn.Linear(192, 576), "conv": nn.Conv2d(16, 32, 3), "norm": nn.GroupNorm(4, 16)})
    arranged = copy.deepcopy(plain)
    arrange_for_cpu(arranged)
    assert arranged.get_parameter("linear.weight").stride() == (1, 576)
    assert arranged.get_parameter("conv.weight").is_contiguous(memory_format=torch.channels_last)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(arranged.state_dict()[name], tensor)
    for name, x in (
        ("linear", torch.randn(1, 64, 192)),
        ("linear", torch.randn(1, 1, 192)),
        ("conv", torch.randn(1, 16, 9, 9)),
    ):
        # Observed: 0, 6e-7 and 5e-7.
        torch.testing.assert_close(arranged.get_submodule(name)(x), plain.get_submodule(name)(x), atol=1e-5, rtol=0)


def test_large_matrices_stay_as_they_are() -> None:
    layer = nn.Linear(1024, BY_COLUMNS // 1024, bias=False)
    arrange_for_cpu(layer)
    assert layer.weight.is_contiguous()
