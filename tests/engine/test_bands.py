"""Tests that decoding in bands gives the image of decoding at once, in less memory."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.contract import Job, OutOfMemory, Result
from engine.families.klein.footprint import activation_memory
from engine.families.klein.pipeline import Klein
from engine.memory.device import Device
from engine.memory.plan import BANDED_IMAGES, MemoryInfo, fits, working
from engine.nn import bands, ops
from engine.nn.autoencoder import Autoencoder, AutoencoderShape
from engine.registry import NANO, ModelRegistry
from tests import operations
from tests.bench.full_size_models import GIANTS, grown
from tests.embedded import SIDE
from tests.engine.peak import Peak
from tests.engine.test_memory import GB, SMALL, card, empty, needs, work
from tests.engine.test_offload import last

FP32, BF16 = (Device.choose("cpu", dtype) for dtype in ("float32", "bfloat16"))


def to_levels(image: Tensor) -> Tensor:
    return ((image.float().clamp(-1, 1) + 1) * 127.5).round()


@pytest.mark.parametrize("device", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
@torch.no_grad()
def test_bands_equal_the_whole_image(device: Device, count: int) -> None:
    autoencoder = grown(GIANTS["toy"], device).autoencoder
    torch.manual_seed(0)
    for rows, columns in ((5, 4), (7, 9)):
        latent = torch.randn(1, 128, rows, columns, dtype=device.dtype)
        with operations.chosen(norm_silu=ops.two_pass_norm_silu):
            whole, banded = autoencoder.decode(latent), bands.decode(autoencoder, latent, count)
        # Observed: 0 in bf16, 4e-6 in fp32, where the convolution of a narrow band sums in another order.
        assert (whole - banded).abs().max() <= 1e-5
        apart = (to_levels(whole) - to_levels(banded)).abs()
        assert apart.max() <= 1
        assert (apart > 0).float().mean() < 1e-3
        # With torch's own norm. Observed: 4e-6 in fp32, 6e-2 in bf16, whose roundings fall otherwise.
        assert (autoencoder.decode(latent) - bands.decode(autoencoder, latent, count)).abs().max() <= (
            1e-5 if device is FP32 else 0.1
        )


@pytest.mark.parametrize("norm", [ops.two_pass_norm_silu, ops.PLAIN["norm_silu"]], ids=["two-pass", "torch's"])
def test_embedded_model_makes_the_same_image_in_bands(norm: Callable[..., Tensor]) -> None:
    klein: Klein = last(Klein.load(ModelRegistry().resolve(str(NANO)), FP32))
    images = []
    with operations.chosen(norm_silu=norm):
        for banded in (False, True):
            klein.runner.banded = banded
            *_, result = klein.run(Job("a red ball on a blue table", seed=3))
            assert isinstance(result, Result)
            images.append(result.image.astype(int))
    apart = np.abs(images[0] - images[1])
    # Observed: 1 and 2 values of 49,152 are one level off.
    assert apart.max() <= 1
    assert (apart > 0).mean() < 1e-3


def test_an_image_is_decoded_in_bands_where_memory_is_short_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a model that was planned for whole decoding just less memory than that takes."""
    klein: Klein = last(Klein.load(ModelRegistry().resolve(str(NANO)), FP32))
    counted: list[int] = []
    monkeypatch.setattr(bands, "decode", lambda autoencoder, latent: counted.append(1) or autoencoder.decode(latent))
    job = Job("a red ball on a blue table", seed=3)
    shapes = (klein.variant, klein.transformer, klein.autoencoder, FP32.dtype)
    image = activation_memory(*shapes, pixels=SIDE**2, references=())
    assert 0 < image.banded < image.bytes
    whole = image.on(MemoryInfo("GPU", GB, GB, GB))
    for free, expected in ((whole, 0), (whole - 1, 1), (image.banded, 1)):
        counted.clear()
        monkeypatch.setattr(
            "engine.families.klein.pipeline.memory_info", lambda device, free=free: MemoryInfo("GPU", free, GB, GB)
        )
        last(klein.run(job))
        assert len(counted) == expected
    monkeypatch.setattr(
        "engine.families.klein.pipeline.memory_info", lambda device: MemoryInfo("GPU", image.banded - 1, GB, GB)
    )
    with pytest.raises(OutOfMemory, match=rf"{SIDE}×{SIDE} with 0 references takes 0\.0 GB besides the weights"):
        last(klein.run(job))


def test_graphs_are_freed_where_an_image_needs_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    klein: Klein = last(Klein.load(ModelRegistry().resolve(str(NANO)), FP32))
    counted: list[int] = []
    monkeypatch.setattr(bands, "decode", lambda autoencoder, latent: counted.append(1) or autoencoder.decode(latent))
    shapes = (klein.variant, klein.transformer, klein.autoencoder, FP32.dtype)
    image, pool = activation_memory(*shapes, pixels=SIDE**2, references=()), 1000
    whole = image.on(MemoryInfo("GPU", GB, GB, GB))
    # Free bytes with those of the graphs -> whether the graphs stay, and decodings in bands.
    for free, stay, in_bands in ((whole + pool, True, 0), (whole, False, 0), (whole - 1, True, 1),
                                 (image.banded + pool, True, 1), (image.banded, False, 1)):  # fmt: skip
        counted.clear()
        klein.runner.pool_bytes = pool
        monkeypatch.setattr(
            "engine.families.klein.pipeline.memory_info", lambda device, free=free: MemoryInfo("GPU", free, GB, GB)
        )
        last(klein.run(Job("a red ball on a blue table", seed=3)))
        assert (klein.runner.pool_bytes > 0, len(counted)) == (stay, in_bands), free


@pytest.mark.parametrize("shape", [AutoencoderShape(), SMALL], ids=["full", "small"])
@pytest.mark.parametrize("side", [512, 1024, 2048])
def test_bands_hold_no_more_than_planned(shape: AutoencoderShape, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: torch.empty_like(q))
    with torch.device("meta"):
        net = Autoencoder(shape).to(torch.bfloat16)
    planned = working(hidden=0, tokens=0, pixels=side**2, decoder=shape.decoder[1], itemsize=2, images=BANDED_IMAGES)
    with torch.inference_mode(), operations.chosen(norm_silu=ops.two_pass_norm_silu), Peak() as peak:
        bands.decode(net, empty(1, 128, side // 16, side // 16))
    assert 0.7 * planned < peak.bytes <= planned


def test_plan_decodes_in_bands_before_blocks_stream() -> None:
    four, image = needs("4b"), work()
    found = {tenth: fits(four, card(tenth / 10 + 0.7), image) for tenth in range(50, 200)}
    there = {tenth: plan for tenth, plan in found.items() if plan is not None}
    assert {plan.blocks for plan in there.values() if plan.banded} >= {len(four.blocks)}
    whole = [plan for plan in there.values() if not plan.banded and plan.blocks == len(four.blocks)]
    assert whole
    banded = [plan for plan in there.values() if plan.banded and plan.blocks == len(four.blocks)]
    assert max(plan.peak for plan in banded) < min(plan.peak for plan in whole)
    assert "decodes in bands" in banded[0].summary(four)
    for tenth, plan in there.items():
        assert plan.peak <= tenth / 10 * GB


def test_machine_without_a_gpu_decodes_in_bands_where_needed() -> None:
    four, image = needs("4b"), work(side=2048)
    enough = MemoryInfo("memory", 64 * GB, 64 * GB)
    plan = fits(four, enough, image)
    assert plan is not None
    assert not plan.banded
    tight = replace(enough, free=plan.peak - GB // 10)
    banded = fits(four, tight, image)
    assert banded is not None
    assert banded.banded
    assert banded.peak <= tight.free
