"""Token positions (t, h, w, l), and conversion of latents to tokens."""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

PATCH = 2
"""Latent pixels per token on each side. An autoencoder that downsamples by 8 makes them 16 image pixels."""


def patchify(latent: Tensor) -> Tensor:
    """Fold patches of 2 × 2 latent pixels into channels.

    [b, c, 2h, 2w] -> [b, 4c, h, w]. The channel index is c·4 + dy·2 + dx.
    """
    return rearrange(latent, "b c (h dy) (w dx) -> b (c dy dx) h w", dy=PATCH, dx=PATCH)


def unpatchify(latent: Tensor) -> Tensor:
    """Undo `patchify`: [b, 4c, h, w] -> [b, c, 2h, 2w]."""
    return rearrange(latent, "b (c dy dx) h w -> b c (h dy) (w dx)", dy=PATCH, dx=PATCH)


def pack(latent: Tensor) -> Tensor:
    """Flatten a latent to tokens, row by row.

    [b, c, h, w] -> [b, h·w, c].
    """
    return rearrange(latent, "b c h w -> b (h w) c")


def unpack(tokens: Tensor, height: int) -> Tensor:
    """Undo `pack`: [b, h·w, c] -> [b, c, h, w].

    height: in tokens.
    """
    return rearrange(tokens, "b (h w) c -> b c h w", h=height)


def text_positions(length: int) -> Tensor:
    """Return positions (0, 0, 0, i) of text tokens, [length, 4] int64."""
    positions = torch.zeros(length, 4, dtype=torch.long)
    positions[:, 3] = torch.arange(length)
    return positions


def grid_positions(height: int, width: int, time: int = 0) -> Tensor:
    """Return positions (time, row, column, 0) of image tokens, row by row.

    [height·width, 4] int64. height, width: in tokens.
    """
    axes = (torch.tensor([time]), torch.arange(height), torch.arange(width), torch.tensor([0]))
    return torch.cartesian_prod(*axes)


def reference_time(index: int) -> int:
    """Return the time coordinate of a reference.

    10, 20, 30 … for the 1st, 2nd, 3rd reference (index 0, 1, 2). No other coordinate distinguishes references.
    """
    return 10 * (index + 1)


def reference_positions(sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Return the positions of references in their order, by rows and columns."""
    return [grid_positions(h, w, reference_time(i)) for i, (h, w) in enumerate(sizes)]
