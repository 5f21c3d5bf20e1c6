"""Choice between implementations of the networks' operations, for the whole process."""

import time
from dataclasses import replace

from engine.families.klein.sample_inputs import heads
from engine.families.klein.transformer import Transformer
from engine.families.klein.variants import Variant
from engine.memory.device import Device
from engine.nn import ops
from engine.nn.attention import Choice, quickest

_choices: dict[tuple[object, ...], Choice] = {}
"""Attention back ends that were chosen, by device and shape of the trial. One trial serves all models of a process."""


def choose_operations(variant: Variant, transformer: Transformer, device: Device) -> Choice:
    """Use what is fastest on this device, and return its attention.

    On a GPU attention is chosen by a trial.
    """
    if not device.is_cuda:
        return Choice("", ops.PLAIN["attention"], {})
    choice = _quickest_attention(variant, transformer, device)
    ops.choose(norm_silu=ops.two_pass_norm_silu, attention=choice.attention)
    return choice


def _quickest_attention(variant: Variant, transformer: Transformer, device: Device) -> Choice:
    """Try the attention back ends on an image of the native size."""
    start = time.perf_counter()
    tokens = variant.text_length + (variant.native_size // variant.pixels_per_token) ** 2
    q, k, v = (heads(transformer, device, tokens) for _ in range(3))
    # Tried once a process: a second trial might choose another, and the same seed give other bits.
    key = (str(device.device), q.dtype, q.shape)
    if key in _choices:
        return _choices[key]
    _choices[key] = quickest(q, k, v, device.sync)
    return replace(_choices[key], seconds=time.perf_counter() - start)
