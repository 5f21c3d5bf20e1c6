"""Ways to make the decoder and the encoding of references faster, each beside today's, in one process."""

import copy
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.families.klein.sample_inputs import SampleInputs
from engine.nn import ops
from engine.nn.autoencoder import Decoder
from tests import operations

if TYPE_CHECKING:
    from tests.bench.timed import Bench


def measure(bench: "Bench") -> dict[str, Any]:
    """Milliseconds of each, and whether a batch of references has the bits of single ones."""
    side = bench.giant.large // 16
    example = SampleInputs(bench.klein.transformer, bench.device, bench.giant.variant.text_length, side, side)
    runner, latent, image = bench.klein.runner, example.latent(), example.image()
    found: dict[str, Any] = {}
    for name, norm in (("plain norm", ops.PLAIN["norm_silu"]), ("two-pass norm", ops.two_pass_norm_silu)):
        with operations.chosen(norm_silu=norm):
            found[f"decode, {name}"] = milliseconds(bench, lambda: runner.decode(latent, "eager"))
            found[f"encode, {name}"] = milliseconds(bench, lambda: runner.encode(image, "eager"))
    last = copy.deepcopy(runner.autoencoder).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    found["decode, two-pass norm, channels-last"] = milliseconds(bench, lambda: last.decode(latent))
    found["encode, two-pass norm, channels-last"] = milliseconds(bench, lambda: last.encode(image))
    if runner.mode == "compiled":
        found["decode, compiled"] = milliseconds(bench, lambda: runner.decode(latent, "compiled"))
        found["encode, compiled"] = milliseconds(bench, lambda: runner.encode(image, "compiled"))
        four = torch.cat([image, image.flip(2), image.flip(3), -image])
        found["encode four at once, compiled"] = milliseconds(bench, lambda: runner.encode(four, "compiled"))
        batch, single = runner.encode(four, "compiled"), [runner.encode(one, "compiled") for one in four.split(1)]
        found["a batch has the bits of single ones"] = bool((batch == torch.cat(single)).all())
    found["bands have the bits of the whole"] = _bands(last.decoder, latent)
    if bench.left > 40 and bench.gpu:
        torch._dynamo.reset()
        static = torch.compile(Decoder.forward, dynamic=False, fullgraph=True, backend=bench.backend)
        z = torch.randn(1, 32, 2 * side, 2 * side, device=bench.device.device, dtype=bench.device.dtype)
        z = z.contiguous(memory_format=torch.channels_last)
        start = time.perf_counter()
        static(last.decoder, z)
        bench.device.sync()
        found["decode, compiled for one size, s to compile"] = time.perf_counter() - start
        found["decode, compiled for one size"] = milliseconds(bench, lambda: static(last.decoder, z))
    return found


def _bands(decoder: Decoder, latent: Tensor) -> bool:
    """Whether a convolution of a band of rows gives the bits of the same rows of the whole."""
    conv = decoder.conv_out
    x = torch.randn(
        1, conv.in_channels, 16 * latent.shape[2], 16 * latent.shape[3], device=latent.device, dtype=latent.dtype
    ).contiguous(memory_format=torch.channels_last)
    whole, rows = conv(x), x.shape[2] // 4
    band = conv(x[:, :, rows - 1 : 2 * rows + 1])[:, :, 1:-1]
    return bool((band == whole[:, :, rows : 2 * rows]).all())


def milliseconds(bench: "Bench", do: Callable[[], Any], rounds: int = 5) -> float:
    """Return the median time of a call."""
    do()
    laps = []
    for _ in range(rounds if bench.gpu else 1):
        bench.device.sync()
        start = time.perf_counter()
        do()
        bench.device.sync()
        laps.append(1000 * (time.perf_counter() - start))
    return round(statistics.median(laps), 2)
