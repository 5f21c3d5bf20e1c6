"""nano's four parts together: tokenizer, text encoder, transformer, autoencoder."""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from engine.diffusion.sampler import denoise
from engine.diffusion.schedule import sigmas
from engine.diffusion.tokens import grid_positions, pack, reference_time, text_positions, unpack
from engine.nano.training.folder import (
    load_autoencoder,
    load_extras,
    load_text_encoder,
    load_transformer,
    token_side,
)
from engine.nn.ops import Rope

LAYERS = (1, 2, 3)
"""Which states of the text encoder are stacked."""
STEPS = 4
END, PAD = "<|im_end|>", "<|endoftext|>"


class Tokenize:
    """Turns prompts into ids and masks of one length, without torch."""

    def __init__(self, folder: Path) -> None:
        self._file = str(folder / "tokenizer" / "tokenizer.json")
        self._load()

    def _load(self) -> None:
        self.tokenizer = Tokenizer.from_file(self._file)
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        vocabulary = self.tokenizer.get_vocab()
        self._end, self._pad = vocabulary[END], vocabulary[PAD]

    def length(self, prompt: str) -> int:
        """Return how many tokens the prompt has, without its end mark."""
        return len(self.tokenizer.encode(prompt, add_special_tokens=False).ids)

    def __call__(self, prompts: list[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and mask, [prompts, length] each: content, end mark, padding.

        A prompt that is too long loses its own end, never the mark.
        """
        ids = np.full((len(prompts), length), self._pad, np.int64)
        mask = np.zeros_like(ids)
        for i, encoding in enumerate(self.tokenizer.encode_batch(prompts, add_special_tokens=False)):
            row = [*encoding.ids[: length - 1], self._end]
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
        return ids, mask


class Nano(nn.Module):
    """The four modules on one device.

    References are computed as in KV models: they attend only to each other, at timestep 0.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.transformer = load_transformer(folder)
        self.text_encoder = load_text_encoder(folder)
        self.autoencoder = load_autoencoder(folder)
        self.tokenize = Tokenize(folder)
        extras = load_extras(folder)
        self.text_length: int = extras["text_length"]
        """Tokens a prompt is padded to. Pads are attended: the model is only itself at a length it was trained with."""
        self.native_size: int = extras["native_size"]
        self.token = token_side(folder)
        """Pixels a token spans on each side."""
        self._ropes = lru_cache(maxsize=None)(self._rope)

    @property
    def device(self) -> torch.device:
        return self.transformer.img_in.weight.device

    def states(self, prompts: list[str]) -> Tensor:
        """Return the stacked states of prompts, [b, text length, layers · width]."""
        ids, mask = (torch.from_numpy(array).to(self.device) for array in self.tokenize(prompts, self.text_length))
        return self.read(ids, mask)

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return stacked states, [b, length, layers · width].

        Pads are computed like words, as in klein.
        """
        length = ids.shape[1]
        # Made here, because transformers would wait for the device to see whether there are pads at all.
        seen = mask[:, None, None, :].bool() & torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        states = self.text_encoder(
            input_ids=ids, attention_mask=seen, output_hidden_states=True, use_cache=False
        ).hidden_states
        return torch.cat([states[layer] for layer in LAYERS], dim=-1)

    def rope(self, length: int, grid: tuple[int, int], references: int = 0) -> tuple[Rope, Rope | None]:
        """Return rotary tables for [text, canvas] and for references.

        grid: of the canvas and of each reference, across and down.
        """
        return self._ropes(length, grid, references)

    def _rope(self, length: int, grid: tuple[int, int], references: int) -> tuple[Rope, Rope | None]:
        across, down = grid
        canvas = self.transformer.rope(torch.cat((text_positions(length), grid_positions(down, across))))
        if not references:
            return canvas, None
        grids = [grid_positions(down, across, reference_time(i)) for i in range(references)]
        return canvas, self.transformer.rope(torch.cat(grids))

    def velocity(
        self, noisy: Tensor, sigma: Tensor, states: Tensor, grid: tuple[int, int], references: Tensor | None = None
    ) -> Tensor:
        """Return the velocity of canvas tokens, as the engine computes it.

        noisy: [b · n, tokens, channels], n noise levels an example, an example's levels beside each other.
        sigma: [b · n]. states: [b, length, width]. grid: tokens across and down. references: [b, references, tokens,
        channels]; text and references are read once for all n levels.
        """
        levels = noisy.shape[0] // states.shape[0]
        count = 0 if references is None else references.shape[1]
        rope, reference_rope = self.rope(states.shape[1], grid, count)
        kept = None
        if references is not None and reference_rope is not None:
            tokens = self.transformer.img_in(references.flatten(1, 2))
            kept = [
                (k.repeat_interleave(levels, 0), v.repeat_interleave(levels, 0))
                for k, v in self.transformer.prefill(tokens, reference_rope)
            ]
        text = self.transformer.txt_in(states).repeat_interleave(levels, 0)
        return self.transformer(noisy, text, self.transformer.modulations(sigma), rope, reference_kv=kept)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """[b, 3, h, w] in [-1, 1] -> [b, tokens, channels]."""
        return pack(self.autoencoder.encode(images))

    @torch.no_grad()
    def decode(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        """[b, tokens, channels] -> [b, 3, h, w] in [-1, 1].

        grid: tokens across and down.
        """
        return self.autoencoder.decode(unpack(latents, grid[1])).clamp(-1, 1)

    @torch.no_grad()
    def sample(
        self,
        prompts: list[str],
        seeds: list[int],
        references: Tensor | None = None,
        steps: int = STEPS,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Return images in [-1, 1], [b, 3, height, width].

        references: [b, references, 3, h, w], of the image's own size, which they give it. size: width and height of an
        image without references.
        """
        if size is None:
            size = self.native_size, self.native_size
            if references is not None:
                size = references.shape[-1], references.shape[-2]
        grid = size[0] // self.token, size[1] // self.token
        states = self.states(prompts)
        tokens = None
        if references is not None:
            tokens = self.encode(references.flatten(0, 1)).unflatten(0, references.shape[:2])
        shape = (1, self.transformer.shape.channels, grid[1], grid[0])
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        x = pack(torch.cat(noise)).to(self.device)

        def velocity(x: Tensor, sigma: float) -> Tensor:
            return self.velocity(x, torch.full((x.shape[0],), sigma, device=x.device), states, grid, tokens)

        *_, latents = denoise(velocity, x, sigmas(steps, grid[0] * grid[1]))
        return self.decode(latents, grid)
