"""nano's four parts together, as training and evaluation use them."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from engine.diffusion.sampler import denoise
from engine.diffusion.schedule import sigmas
from engine.diffusion.tokens import grid_positions, pack, reference_time, text_positions, unpack
from engine.nano.training.folder import load_autoencoder, load_text_encoder, load_transformer
from engine.nn.ops import Rope

TEXT_LENGTH = 64
"""Tokens a prompt is padded to. Pads are attended, so the model is only itself at the length it was trained with."""
LAYERS = (1, 2, 3)
"""Which states of the text encoder are stacked."""
STEPS = 4
GRID = 8
"""Tokens a side of the 128-pixel canvas."""
END, PAD = "<|im_end|>", "<|endoftext|>"


@dataclass
class Prompts:
    """Token ids and which of them are not padding: [b, length] each."""

    ids: Tensor
    mask: Tensor


class Nano(nn.Module):
    """The four modules on one device.

    References are computed as in KV models: they attend only to each other, at timestep 0.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.transformer = load_transformer(folder)
        self.text_encoder = load_text_encoder(folder)
        self.autoencoder = load_autoencoder(folder)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self._ropes = lru_cache(maxsize=None)(self._rope)

    @property
    def device(self) -> torch.device:
        return self.transformer.img_in.weight.device

    def tokenize(self, prompts: list[str], length: int = TEXT_LENGTH) -> Prompts:
        """Tokenize to content, end token and padding.

        A prompt that is too long loses its own end, never the end token.
        """
        vocabulary = self.tokenizer.get_vocab()
        end, pad = vocabulary[END], vocabulary[PAD]
        ids = torch.full((len(prompts), length), pad)
        mask = torch.zeros_like(ids)
        for i, encoding in enumerate(self.tokenizer.encode_batch(prompts, add_special_tokens=False)):
            row = [*encoding.ids[: length - 1], end]
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        return Prompts(ids.to(self.device), mask.to(self.device))

    def read(self, prompts: Prompts) -> Tensor:
        """Return stacked hidden states, [b, length, layers · width].

        Padding is computed like words, as in klein.
        """
        states = self.text_encoder(
            input_ids=prompts.ids, attention_mask=prompts.mask, output_hidden_states=True, use_cache=False
        ).hidden_states
        return torch.cat([states[layer] for layer in LAYERS], dim=-1)

    def _rope(self, length: int, references: int) -> tuple[Rope, Rope | None]:
        """For [text, canvas], and for the references."""
        canvas = self.transformer.rope(torch.cat((text_positions(length), grid_positions(GRID, GRID))))
        if not references:
            return canvas, None
        grids = [grid_positions(GRID, GRID, reference_time(i)) for i in range(references)]
        return canvas, self.transformer.rope(torch.cat(grids))

    def velocity(self, noisy: Tensor, sigma: Tensor, states: Tensor, references: Tensor | None = None) -> Tensor:
        """Velocity of canvas tokens.

        noisy: [b · n, tokens, channels], n noise levels an example, an example's levels beside each other.
        sigma: [b · n]. states: [b, length, width]. references: [b, images, tokens, channels]; text and
        references are read once for all n levels.
        """
        levels = noisy.shape[0] // states.shape[0]
        images = 0 if references is None else references.shape[1]
        rope, reference_rope = self._ropes(states.shape[1], images)
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
        """[b, 3, 128, 128] in [-1, 1] -> [b, tokens, channels]."""
        return pack(self.autoencoder.encode(images))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """[b, tokens, channels] -> [b, 3, 128, 128] in [-1, 1]."""
        return self.autoencoder.decode(unpack(latents, GRID)).clamp(-1, 1)

    @torch.no_grad()
    def paint(
        self, prompts: list[str], seeds: list[int], references: Tensor | None = None, steps: int = STEPS
    ) -> Tensor:
        """Generate images in [-1, 1], [b, 3, 128, 128].

        references: [b, images, 3, 128, 128].
        """
        states = self.read(self.tokenize(prompts))
        tokens = None
        if references is not None:
            tokens = self.encode(references.flatten(0, 1)).unflatten(0, references.shape[:2])
        shape = (1, self.transformer.shape.channels, GRID, GRID)
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        x = pack(torch.cat(noise)).to(self.device)

        def velocity(x: Tensor, sigma: float) -> Tensor:
            return self.velocity(x, torch.full((x.shape[0],), sigma, device=x.device), states, tokens)

        *_, latents = denoise(velocity, x, sigmas(steps, GRID * GRID))
        return self.decode(latents)
