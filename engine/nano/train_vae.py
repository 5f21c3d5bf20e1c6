"""Teach the autoencoder: pictures in, the same pictures out, through latents that bear a little noise."""

import copy
import math
import time

import torch
from torch import Tensor

from engine.model.autoencoder import Autoencoder
from engine.nano.paint import BACKGROUNDS, CANVAS, Painter
from engine.nano.sprites import KINDS, SIZES
from engine.nano.words import NOUNS
from engine.tokens import patchify

RATE = 2e-3
LATENT_NOISE = 0.08
"""Added to the latents, so that what the transformer gets slightly wrong still decodes well."""
EMA = 0.998


def crowded(painter: Painter, count: int, things: int, generator: torch.Generator) -> Tensor:
    """Pictures with objects anywhere: more outlines a pixel than the scenes of the world have."""

    def draw(high: int, *shape: int, low: int = 0) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    nouns = torch.rand(count, things, generator=generator) < 0.7
    kind = torch.where(nouns, draw(len(NOUNS), count, things), draw(len(KINDS), count, things, low=len(NOUNS)))
    size = torch.tensor([0, 1, 1, 2, 2, 2, len(SIZES) - 1])[draw(7, count, things)]
    centre = draw(CANVAS - 20, count, things, 2, low=20)
    device = painter.sprites.device
    return painter(*(x.to(device) for x in (draw(len(BACKGROUNDS), count), kind, size, centre)))


def reconstruction_loss(picture: Tensor, decoded: Tensor) -> Tensor:
    """Colours by both norms, and outlines: the differences between neighbouring pixels."""
    error = decoded - picture
    outlines = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 2 * error.pow(2).mean() + 0.5 * outlines


def psnr(picture: Tensor, decoded: Tensor) -> float:
    """Mean over pictures in [-1, 1], in dB."""
    error = ((picture - decoded.clamp(-1, 1)) / 2).pow(2).mean(dim=(1, 2, 3))
    return (-10 * torch.log10(error)).mean().item()


def train_vae(autoencoder: Autoencoder, decoder_only: bool, minutes: float, device: str) -> None:
    """In place; ends with the average of the weights and fresh latent statistics.

    decoder_only: the latents stay what they are, so that a trained transformer goes on fitting.
    """
    generator = torch.Generator().manual_seed(time.time_ns() % 2**31)
    painter = Painter().to(device)
    batch = 256 if device.startswith("cuda") else 4
    held = crowded(painter, 24, 2, torch.Generator().manual_seed(1))
    autoencoder.requires_grad_(True)
    learned = autoencoder.decoder if decoder_only else autoencoder
    average = copy.deepcopy(autoencoder)
    optimiser = torch.optim.AdamW(learned.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)
    start = told = time.monotonic()
    step = 0
    while (done := (time.monotonic() - start) / (60 * minutes)) < 1:
        rate = RATE * (0.5 if decoder_only else 1.0) * min(1.0, (step + 1) / 100)
        optimiser.param_groups[0]["lr"] = rate * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))
        half = batch // 2
        picture = torch.cat([crowded(painter, half, things, generator) for things in (2, 4)])
        with torch.set_grad_enabled(not decoder_only):
            mean = autoencoder.encoder(picture)
        latent = mean + LATENT_NOISE * torch.randn(mean.shape, generator=generator).to(device)
        loss = reconstruction_loss(picture, autoencoder.decoder(latent)) + 5e-4 * mean.pow(2).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned.parameters(), 1.0)
        optimiser.step()
        step += 1
        keep = min(EMA, (step + 1) / (step + 20))
        with torch.no_grad():
            for old, new in zip(average.parameters(), autoencoder.parameters(), strict=True):
                old.lerp_(new, 1 - keep)
        if time.monotonic() - told > 60:
            told = time.monotonic()
            with torch.no_grad():
                print(f"step {step}, {done:.0%}: held-out {psnr(held, average.decode(average.encode(held))):.2f} dB",
                      flush=True)  # fmt: skip
    autoencoder.load_state_dict(average.state_dict())
    autoencoder.requires_grad_(False)
    if not decoder_only:
        measure_latents(autoencoder, torch.cat([crowded(painter, 32, 2, generator) for _ in range(8)]))


@torch.no_grad()
def measure_latents(autoencoder: Autoencoder, pictures: Tensor) -> None:
    """Mean and variance of each latent channel, by which latents are normalised."""
    latents = torch.cat([patchify(autoencoder.encoder(part)) for part in pictures.split(32)])
    autoencoder.bn.running_mean.copy_(latents.mean(dim=(0, 2, 3)))
    autoencoder.bn.running_var.copy_(latents.var(dim=(0, 2, 3)))
