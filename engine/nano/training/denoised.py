"""Latents as the transformer makes them, with the images they stand for."""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.diffusion.schedule import sigmas
from engine.diffusion.tokens import unpack, unpatchify
from engine.nano.training.compiled_training import TrainingVelocity, multiplies_bf16
from engine.nano.training.data_loader import BatchEncoder, BatchKind, DataLoader, render
from engine.nano.training.folder import load_extras
from engine.nano.training.frames import canvases
from engine.nano.training.model import STEPS, Nano, Tokenize
from engine.nano.training.shards import load_shards

OTHER_SHAPES = 0.2
"""Of a decoder's batches. Squares are what is asked for most, and its convolutions learn from any shape."""


@dataclass(frozen=True)
class _Plan:
    """Draws kinds of batches, most of them at the native size."""

    examples: int
    text_length: int
    native_size: int

    def __call__(self, done: float, draws: random.Random) -> BatchKind:
        square, shapes = canvases(self.native_size)
        frame = draws.choice(shapes) if draws.random() < OTHER_SHAPES else square
        task, references = draws.choice((("generate", 0), ("edit", 1)))
        return BatchKind(frame, task, references, self.text_length, self.examples)


class Denoised:
    """Draws scenes and denoises them with the transformer's last two steps.

    Earlier steps decide what is painted, and would paint another scene than the one drawn.
    """

    def __init__(self, folder: Path, files: Path, device: str, examples: int, workers: int) -> None:
        own = load_extras(folder)
        square, shapes = canvases(own["native_size"])
        frames = (square, *shapes)
        plan = _Plan(examples, own["text_length"], own["native_size"])
        seed, nouns = random.randrange(2**31), len(own["nouns"])
        self._loader = DataLoader(plan, Tokenize(folder), frames, workers, seed, nouns)
        nano = Nano(folder)
        with torch.no_grad():
            load_shards(nano, files)
        self._nano = nano.to(device).eval()
        self._encoder = BatchEncoder(self._nano.autoencoder, frames)
        self._velocity = TrainingVelocity(self._nano, compiled=False)

    @torch.no_grad()
    def __call__(self) -> tuple[Tensor, Tensor]:
        """Return images and the latents that should be decoded to them.

        images: [n, 3, h, w] in [-1, 1].
        """
        raw = self._loader.next(1.0)
        frame, nano = raw.kind.frame, self._nano
        every = 1 + raw.kind.references
        images = render(self._encoder.compositors[frame.scale], raw.scenes, frame)
        latents = self._encoder.latents(images).unflatten(0, (raw.kind.count, every))
        ids, mask = (torch.as_tensor(array).to(nano.device) for array in (raw.ids, raw.mask))
        with torch.autocast(nano.device.type, torch.bfloat16, enabled=multiplies_bf16(nano.device)):
            states = nano.read(ids, mask)
        references = latents[:, 1:] if raw.kind.references else None
        *_, high, low, end = sigmas(STEPS, frame.tokens[0] * frame.tokens[1])
        x = (1 - high) * latents[:, 0] + high * torch.randn_like(latents[:, 0])
        for sigma, after in ((high, low), (low, end)):
            levels = torch.full((len(x),), sigma, device=x.device)
            x = x + (after - sigma) * self._velocity(x, levels, states, frame.tokens, references)
        bn = self._nano.autoencoder.bn
        return images.unflatten(0, (-1, every))[:, 0], unpatchify(bn.restore(unpack(x, frame.tokens[1])))

    def close(self) -> None:
        """Stop the worker processes."""
        self._loader.close()
