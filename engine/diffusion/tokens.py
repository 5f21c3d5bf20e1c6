"""Where each token sits: (t, h, w, l) positions of text, canvas and references; and latents as rows of tokens."""

import torch
from einops import rearrange
from torch import Tensor

PATCH = 2
"""Latent pixels a token spans on each side; with the autoencoder's 8 that is 16 image pixels."""


def patchify(latent: Tensor) -> Tensor:
    """[b, c, 2h, 2w] -> [b, 4c, h, w]; a channel's four neighbours lie side by side: c·4 + dy·2 + dx."""
    return rearrange(latent, "b c (h dy) (w dx) -> b (c dy dx) h w", dy=PATCH, dx=PATCH)


def unpatchify(latent: Tensor) -> Tensor:
    """[b, 4c, h, w] -> [b, c, 2h, 2w]."""
    return rearrange(latent, "b (c dy dx) h w -> b c (h dy) (w dx)", dy=PATCH, dx=PATCH)


def pack(latent: Tensor) -> Tensor:
    """[b, c, h, w] -> [b, h·w, c], row by row."""
    return rearrange(latent, "b c h w -> b (h w) c")


def unpack(tokens: Tensor, height: int) -> Tensor:
    """[b, h·w, c] -> [b, c, h, w]; height in tokens."""
    return rearrange(tokens, "b (h w) c -> b c h w", h=height)


def text_positions(length: int) -> Tensor:
    """[length, 4] int64: (0, 0, 0, i)."""
    positions = torch.zeros(length, 4, dtype=torch.long)
    positions[:, 3] = torch.arange(length)
    return positions


def grid_positions(height: int, width: int, time: int = 0) -> Tensor:
    """[height·width, 4] int64: (time, row, column, 0), row by row; height and width in tokens."""
    axes = (torch.tensor([time]), torch.arange(height), torch.arange(width), torch.tensor([0]))
    return torch.cartesian_prod(*axes)


def reference_time(index: int) -> int:
    """10, 20, 30 … for the 1st, 2nd, 3rd reference (index 0, 1, 2). Only the time tells them apart."""
    return 10 * (index + 1)
