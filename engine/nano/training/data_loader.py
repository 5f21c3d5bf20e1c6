"""Training batches: scenes drawn, rendered and encoded on the training device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.diffusion.tokens import pack, patchify
from engine.nano.training.compositor import CANVAS, Compositor
from engine.nano.training.model import GRID, Nano
from engine.nano.training.pca_encoder import as_one_convolution
from engine.nano.training.prompts import Example, PromptSampler, training_prompts
from engine.nano.training.scenes import MAX_THINGS, Scene

OBJECT_WEIGHT = 4.0
"""How much more a token counts that shows an object, or that an edit must repaint: backgrounds are learned first and
fill most of an image, outlines last."""


def paint_scenes(painter: Compositor, scenes: Sequence[Scene]) -> Tensor:
    """[scenes, 3, side, side] in [-1, 1]."""
    device = painter.sprites.device
    kinds, sizes, centres = [], [], []
    for scene in scenes:
        missing = MAX_THINGS - len(scene.things)
        kinds.append([*(thing.kind for thing in scene.things), *[-1] * missing])
        sizes.append([*(thing.size for thing in scene.things), *[0] * missing])
        centres.append([*(thing.centre for thing in scene.things), *[(0, 0)] * missing])
    grounds = [scene.background for scene in scenes]
    return painter(*(torch.tensor(x, device=device) for x in (grounds, kinds, sizes, centres)))


def token_weights(example: Example) -> Tensor:
    """[tokens], mean 1: what the loss looks at."""
    weights = torch.ones(GRID, GRID)
    cell = CANVAS // GRID
    for left, top, right, bottom in (*(thing.box for thing in example.target.things), *example.touched):
        weights[max(top, 0) // cell : -(-bottom // cell), max(left, 0) // cell : -(-right // cell)] = OBJECT_WEIGHT
    return (weights / weights.mean()).flatten()


@dataclass
class Item:
    """One encoded example.

    target: [tokens, channels]. references: [images, tokens, channels].
    """

    prompt: str
    target: Tensor
    references: Tensor
    weights: Tensor


class DataLoader:
    """Items of each task, never twice the same."""

    def __init__(self, nano: Nano, seed: int) -> None:
        self.nano = nano
        self.painter = Compositor().to(nano.device)
        self.sampler = PromptSampler(seed)
        self.patches = as_one_convolution(nano.autoencoder)

    @torch.no_grad()
    def _encode(self, images: Tensor) -> Tensor:
        return pack(self.nano.autoencoder.bn.normalise(patchify(self.patches(images))))

    def take(self, task: str, images: int, count: int) -> list[Item]:
        """A batch of one task, all with the same number of references."""
        examples = [training_prompts(self.sampler, task, images) for _ in range(count)]
        scenes = [scene for example in examples for scene in (example.target, *example.references)]
        latents = self._encode(paint_scenes(self.painter, scenes)).unflatten(0, (count, 1 + images))
        return [
            Item(example.prompt, latent[0], latent[1:], token_weights(example).to(latent.device))
            for example, latent in zip(examples, latents, strict=True)
        ]
