"""Compiled training step for CPUs that multiply bf16 in hardware.

Measured on one core of a Xeon with AMX, 16 examples at 2 noise levels, samples a second: plain fp32 31 (generate) and
27 (edit); autocast alone 44 and 35, since torch's own attention learns slowly in bf16; compiled, with attention as
plain products, 105 and 76. Compiling takes about a minute for each of eight shapes, and is kept on disk.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from engine.nano.training.model import Nano, Prompts
from engine.nn import ops

Velocity = Callable[[Tensor, Tensor, Prompts, Tensor | None], Tensor]
"""(noisy, sigma, prompts, references) -> velocity; shapes as in `Nano.velocity`."""


def plain(nano: Nano) -> Velocity:
    """Return the velocity as the sampler computes it."""
    return lambda noisy, sigma, prompts, references: nano.velocity(noisy, sigma, nano.read(prompts), references)


def compiled(nano: Nano) -> Velocity:
    """Return the function computed in bf16, with fp32 weights and result.

    Changes attention for this whole process.
    """
    torch._dynamo.config.recompile_limit = 32  # a shape for each number of references and each text length
    ops.choose(attention=_attend)

    def velocity(noisy: Tensor, sigma: Tensor, ids: Tensor, mask: Tensor, references: Tensor | None) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return nano.velocity(noisy, sigma, nano.read(Prompts(ids, mask)), references)

    fast = torch.compile(velocity, dynamic=False)
    return lambda noisy, sigma, prompts, references: fast(noisy, sigma, prompts.ids, prompts.mask, references).float()


def pays(device: torch.device) -> bool:
    """Whether this is a CPU that multiplies bf16 in hardware."""
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()


def products(device: torch.device) -> AbstractContextManager[Any]:
    """Use bf16 products and convolutions where the processor multiplies bf16.

    The decoder then learns in half the time.
    """
    return torch.autocast("cpu", torch.bfloat16) if pays(device) else nullcontext()


class _Attention(torch.autograd.Function):
    """Compute softmax(q·kᵀ)·v, saving the weights for the backward pass.

    8 MB a block, which is little for nano.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.softmax(torch.bmm(q, k.transpose(1, 2)), -1)
        ctx.save_for_backward(q, k, v, weights)
        return torch.bmm(weights, v)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (mixed,) = gradients
        q, k, v, weights = ctx.saved_tensors
        scores = torch._softmax_backward_data(torch.bmm(mixed, v.transpose(1, 2)), weights, -1, weights.dtype)
        return torch.bmm(scores, k), torch.bmm(scores.transpose(1, 2), q), torch.bmm(weights.transpose(1, 2), mixed)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute `ops.attention`, as plain products under autocast."""
    if v.dtype != torch.bfloat16:
        return ops.PLAIN["attention"](q, k, v)
    batch, _, heads, width = q.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1).bfloat16() for x in (q * width**-0.5, k, v))
    mixed: Any = _Attention.apply(q, k, v)
    return mixed.unflatten(0, (batch, heads)).transpose(1, 2).flatten(2)
