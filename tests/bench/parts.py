"""Memory that parts of an image allocate beside what is there: the memory plan must count it."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from engine.diffusion.canvas import to_rgb8
from engine.families.klein.conditioning import Conditioning
from engine.families.klein.sample_inputs import SampleInputs
from engine.nn import bands
from tests.bench.techniques import milliseconds

if TYPE_CHECKING:
    from tests.bench.timed import Bench


def measure(bench: "Bench") -> dict[str, Any]:
    """Measure the peak bytes of each part, in both modes and two sizes."""
    runner, found = bench.klein.runner, {}
    for mode in ("eager", runner.mode):
        for side in (bench.giant.large // 16, bench.giant.small // 16):
            example = SampleInputs(bench.klein.transformer, bench.device, bench.giant.variant.text_length, side, side)
            latent, image = example.latent(), example.image()
            named: dict[str, Callable[[], Any]] = {
                "decode": lambda latent=latent, mode=mode: runner.decode(latent, mode),
                "encode": lambda image=image, mode=mode: runner.encode(image, mode),
            }
            for count in (0, 1):
                x, text, mods, rope, references, _ = example.step(count * side * side)
                inputs = Conditioning((0, 0), text, rope, (), references)  # of no size that is captured
                named[f"step, {count} references"] = partial(runner.velocity, x, mods, inputs, mode)
            for name, part in named.items():
                found[f"{name}, {mode}, {16 * side}"] = taken(bench, part)
    ids = torch.zeros(1, bench.giant.variant.text_length, dtype=torch.long)
    found["text"] = taken(bench, lambda: runner.text(ids, torch.ones_like(ids)))
    return {"GB": found}


def measure_bands(bench: "Bench") -> dict[str, Any]:
    """Compare decoding in bands with decoding the whole, which has to give the same bits."""
    side, device = bench.giant.large // 16, bench.device
    example = SampleInputs(bench.klein.transformer, device, bench.giant.variant.text_length, side, side)
    autoencoder, latent = bench.klein.runner.autoencoder, example.latent()
    decoders = {"whole": autoencoder.decode, "in bands": partial(bands.decode, autoencoder)}
    found: dict[str, Any] = {}
    for name, decode in decoders.items():
        part = partial(decode, latent)
        found[name] = {"GB": taken(bench, part), "ms": milliseconds(bench, part)}
    whole, banded = (decode(latent) for decode in decoders.values())
    same = [(banded == whole).float().mean().item(), (to_rgb8(banded) == to_rgb8(whole)).mean().item()]
    shares = "{:.4%} of the values, {:.4%} of the levels of 255".format(*same)
    found["in bands"]["same bits"] = "yes" if min(same) == 1 else shares
    return found


def taken(bench: "Bench", part: Callable[[], Any]) -> float:
    """Return the gigabytes that a call allocates at its peak, 0 without a GPU."""
    part()  # memory that libraries allocate on their first call is not this part's
    if not bench.gpu:
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    part()
    return round((torch.cuda.max_memory_allocated() - before) / 1e9, 3)
