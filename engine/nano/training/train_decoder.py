"""Trains the decoder on the computed encoder's latents, slightly noised."""

import copy
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from engine.diffusion.tokens import unpatchify
from engine.nano.training import compiled_training
from engine.nano.training.compositor import BACKGROUNDS, CANVAS, Compositor
from engine.nano.training.pca_encoder import as_one_convolution, fit_encoder
from engine.nano.training.sprites import KINDS, SIZES
from engine.nano.words import NOUNS
from engine.nn.autoencoder import Autoencoder

RATE = 2e-3
LATENT_NOISE = 0.1
"""Added to the normalised latents, so that what the transformer gets slightly wrong still decodes well."""
EMA = 0.998


def crowded(painter: Compositor, count: int, things: int, generator: torch.Generator) -> Tensor:
    """Render images with objects anywhere.

    They have more outlines a pixel than scenes of the world.
    """

    def draw(high: int, *shape: int, low: int = 0) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    nouns = torch.rand(count, things, generator=generator) < 0.7
    kind = torch.where(nouns, draw(len(NOUNS), count, things), draw(len(KINDS), count, things, low=len(NOUNS)))
    size = torch.tensor([0, 0, 1, 1, 1, len(SIZES) - 1])[draw(6, count, things)]
    centre = draw(CANVAS - 20, count, things, 2, low=20)
    device = painter.sprites.device
    return painter(*(x.to(device) for x in (draw(len(BACKGROUNDS), count), kind, size, centre)))


def reconstruction_loss(image: Tensor, decoded: Tensor) -> Tensor:
    """Colours by both norms, and outlines: the differences between neighbouring pixels."""
    error = decoded - image
    outlines = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 2 * error.pow(2).mean() + 0.5 * outlines


def psnr(image: Tensor, decoded: Tensor) -> float:
    """Mean over images in [-1, 1], in dB."""
    error = ((image - decoded.clamp(-1, 1)) / 2).pow(2).mean(dim=(1, 2, 3))
    return (-10 * torch.log10(error)).mean().item()


def train_decoder(autoencoder: Autoencoder, minutes: float, device: str, save: Callable[[Autoencoder], None]) -> None:
    """Train in place, ending with the average of the weights.

    save: gets that average every minute.

    The latents stay what they are, so that a trained transformer goes on fitting.
    """
    generator = torch.Generator().manual_seed(time.time_ns() % 2**31)
    painter = Compositor().to(device)
    batch = 256 if device.startswith("cuda") else 8
    held = crowded(painter, 24, 2, torch.Generator().manual_seed(1))
    autoencoder.requires_grad_(False)
    encode = as_one_convolution(autoencoder)
    decoder = autoencoder.decoder.requires_grad_(True)
    average = copy.deepcopy(autoencoder)
    optimiser = torch.optim.AdamW(decoder.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)
    # Noise in proportion to each channel's spread: that is how the transformer errs.
    deviation = unpatchify((autoencoder.bn.running_var.sqrt() * LATENT_NOISE)[None, :, None, None])[..., :1, :1]
    start = reported = time.monotonic()
    step = 0
    while (done := (time.monotonic() - start) / (60 * minutes)) < 1:
        rate = RATE * min(1.0, (step + 1) / 100)
        optimiser.param_groups[0]["lr"] = rate * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))
        image = torch.cat([crowded(painter, batch // 2, things, generator) for things in (2, 4)])
        with torch.no_grad():
            latent = encode(image)
            latent += deviation * torch.randn(latent.shape, generator=generator).to(device)
        with compiled_training.products(image.device):
            decoded = decoder(latent)
        loss = reconstruction_loss(image, decoded.float())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimiser.step()
        step += 1
        keep = min(EMA, (step + 1) / (step + 20))
        with torch.no_grad():
            for old, new in zip(average.decoder.parameters(), decoder.parameters(), strict=True):
                old.lerp_(new, 1 - keep)
        if time.monotonic() - reported > 60:
            reported = time.monotonic()
            with torch.no_grad():
                decibels = psnr(held, average.decode(average.encode(held)))
            print(f"step {step}, {done:.0%}: held-out {decibels:.2f} dB", flush=True)
            save(average)
    decoder.load_state_dict(average.decoder.state_dict())
    decoder.requires_grad_(False)


def fit(autoencoder: Autoencoder, device: str) -> None:
    """Compute the encoder and latent statistics from images of all objects."""
    generator = torch.Generator().manual_seed(0)
    painter = Compositor().to(device)
    fit_encoder(autoencoder, torch.cat([crowded(painter, 32, 2, generator) for _ in range(16)]))
