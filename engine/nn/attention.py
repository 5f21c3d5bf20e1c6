"""Choice of the attention back end, by a trial on this device.

torch chooses one by rules that differ between its versions and devices. The fastest that gives the plain result is
named to torch instead, so that every image, eager, compiled or captured, is computed by the same one.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.nn import ops

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

ROUNDS = 8
"""Times that each back end is timed, in turns with the others, the shortest time counting. By the median of five in a
row, beside a process that used the same GPU for some seconds, flash was taken for the quickest (1.13 ms, cuDNN 2.77)
where alone it takes 0.82 and cuDNN 0.44: every image of that process took 13 to 34 % longer (H200, torch 2.11)."""
TOLERANCE = 0.02
"""Largest relative error against torch's own choice: five roundings to bf16."""
MARGIN = 1.03
"""Factor by which torch's own choice must be faster to be kept: a difference of less is noise."""


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.aten._scaled_dot_product_cudnn_attention.default(q, k, v, None, False)[0]


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention.default(q, k, v)[0]


def _efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.aten._scaled_dot_product_efficient_attention.default(q, k, v, None, False)[0]


def _by_heads(backend: Attention) -> Attention:
    """Return `ops.attention` by a back end that wants heads before tokens."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return backend(q, k, v).transpose(1, 2).flatten(2)

    return attention


BACKENDS: Mapping[str, Attention] = {
    "cuDNN": _by_heads(_cudnn),
    "flash": _by_heads(_flash),
    "memory-efficient": _by_heads(_efficient),
}
"""torch's fused back ends. Which of them run depends on device, number format and width of a head."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The implementation to use, and the milliseconds of all that ran.

    name: empty for torch's own choice. seconds: time that the choice took.
    """

    name: str
    attention: Attention
    ms: Mapping[str, float]
    seconds: float = 0.0


def quickest(
    q: Tensor, k: Tensor, v: Tensor, sync: Callable[[], None], backends: Mapping[str, Attention] = BACKENDS
) -> Choice:
    """Return the fastest back end for these inputs.

    q, k, v: [b, s, heads, head_dim]. sync: waits for the device.
    A back end that fails or gives other numbers is passed over.
    """
    plain = ops.PLAIN["attention"]
    expected = plain(q, k, v).float()
    tried = {"": plain}
    for name, attention in backends.items():
        try:
            # The first call also loads kernels and builds plans.
            error = (attention(q, k, v).float() - expected).norm() / expected.norm()
            if bool(error <= TOLERANCE):
                tried[name] = attention
        except (RuntimeError, NotImplementedError, TypeError):
            # It does not exist in this torch, or not for this device, number format or shape.
            continue
    ms = dict.fromkeys(tried, float("inf"))
    for _ in range(ROUNDS):
        for name, attention in tried.items():
            ms[name] = min(ms[name], _milliseconds(attention, (q, k, v), sync))
    named = {name: taken for name, taken in ms.items() if name}
    best = min(named, key=named.__getitem__, default="")
    if not best or ms[""] * MARGIN < ms[best]:
        return Choice("", plain, ms)
    return Choice(best, backends[best], ms)


def _milliseconds(attention: Attention, inputs: tuple[Tensor, Tensor, Tensor], sync: Callable[[], None]) -> float:
    sync()
    start = time.perf_counter()
    attention(*inputs)
    sync()
    return 1000 * (time.perf_counter() - start)
