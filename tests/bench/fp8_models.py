"""The models of both sides with the blocks' matrices in fp8.

diffusers has no fp8 of its own that is faster than bf16: its layerwise casting only stores in fp8. Both sides therefore
multiply with the same layer, so that what differs is what surrounds it.
"""

import copy
from collections.abc import Iterable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from engine.checkpoints.quant import fp8
from engine.checkpoints.quant.fp8 import Fp8Linear
from engine.memory.device import multiplies_fp8
from tests.bench.full_size_models import Nets

LIBRARIES = ("torchao", "optimum.quanto", "bitsandbytes")
"""Libraries that quantise to fp8 for diffusers. Only those that are installed could be compared with."""


def in_fp8(nets: Nets, *, static: bool = False) -> Nets:
    """Copy our networks with the blocks' matrices in fp8.

    static: activations have a fixed scale, which covers 8 standard deviations of a normed activation: speed does not
    depend on its value.
    """
    transformer = copy.deepcopy(nets.transformer)
    _quantise((*transformer.double_blocks, *transformer.single_blocks), static)
    return replace(nets, transformer=transformer)


def quantise_pipeline(pipe: Any) -> Any:
    """Quantise the blocks of diffusers' transformer in place, with scales by row of the activations."""
    transformer = pipe.transformer
    _quantise((*transformer.transformer_blocks, *transformer.single_transformer_blocks), False)
    return pipe


def available() -> dict[str, bool]:
    """Return which libraries for fp8 in diffusers are installed."""
    return {name: _is_installed(name) for name in LIBRARIES}


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _quantise(blocks: Iterable[nn.Module], static: bool) -> None:
    for block in blocks:
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear):
                device = layer.weight.device
                quantised = Fp8Linear(layer.in_features, layer.out_features, native=multiplies_fp8(device))
                stored = fp8.encode(layer.weight.data)
                if static:
                    stored["input_scale"] = torch.tensor(8.0 / fp8.LARGEST, device=device)
                quantised.load_tensors(stored)
                block.set_submodule(name, quantised)
