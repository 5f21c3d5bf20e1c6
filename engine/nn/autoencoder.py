"""Autoencoder between images and normalised latents.

Parameter names are those of BFL's single file.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.diffusion.tokens import PATCH, patchify, unpatchify
from engine.nn import ops

NORM_EPS = 1e-6
"""Epsilon of every GroupNorm. Source: diffusers AutoencoderKLFlux2."""
BN_EPS = 1e-4
"""Epsilon of the latent statistics. Source: diffusers AutoencoderKLFlux2 config `batch_norm_eps`."""


@dataclass(frozen=True, slots=True)
class AutoencoderShape:
    """Hyperparameters of the autoencoder.

    All but `groups`, the number of norm groups, determine shapes of parameters.

    encoder, decoder: channels from the image's level to the latent's. layers: residual blocks a level when
    encoding; the decoder has one more.
    """

    encoder: tuple[int, ...] = (128, 256, 512, 512)
    decoder: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2
    latent: int = 32
    groups: int = 32
    attention: bool = True

    @property
    def pixels_per_latent(self) -> int:
        """Return the image pixels of a latent pixel on each side.

        Every level but the last halves the size: 8 for klein's four.
        """
        return 2 ** (len(self.encoder) - 1)

    @property
    def pixels_per_token(self) -> int:
        """Return the image pixels of a token on each side."""
        return PATCH * self.pixels_per_latent


def _norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return ops.norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps)


class ResnetBlock(nn.Module):
    """Residual block: norm, SiLU and convolution twice, plus a shortcut."""

    def __init__(self, ins: int, outs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, ins, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(ins, outs, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outs, eps=NORM_EPS)
        self.conv2 = nn.Conv2d(outs, outs, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(ins, outs, 1) if ins != outs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(_norm_silu(self.norm1, x))
        h = self.conv2(_norm_silu(self.norm2, h))
        return self.nin_shortcut(x) + h


class Attention(nn.Module):
    """Self-attention with one head over all latent pixels."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=NORM_EPS)
        self.q = nn.Linear(channels, channels)
        self.k = nn.Linear(channels, channels)
        self.v = nn.Linear(channels, channels)
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = (part(pixels)[:, None] for part in (self.q, self.k, self.v))
        mixed = self.proj_out(F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + mixed.transpose(1, 2).unflatten(2, x.shape[2:])


class Downsample(nn.Module):
    """Halve the size with a strided convolution.

    Padded at the right and bottom only: symmetric padding would shift the image.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the size by nearest-neighbour interpolation and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _middle(channels: int, shape: AutoencoderShape) -> nn.ModuleDict:
    parts: dict[str, nn.Module] = {"block_1": ResnetBlock(channels, channels, shape.groups)}
    if shape.attention:
        parts["attn_1"] = Attention(channels, shape.groups)
    parts["block_2"] = ResnetBlock(channels, channels, shape.groups)
    return nn.ModuleDict(parts)


def _level(ins: int, outs: int, layers: int, groups: int, **sampler: nn.Module) -> nn.ModuleDict:
    blocks = [ResnetBlock(ins if i == 0 else outs, outs, groups) for i in range(layers)]
    return nn.ModuleDict({"block": nn.Sequential(*blocks), **sampler})


def _through(parts: nn.ModuleDict, x: Tensor) -> Tensor:
    for part in parts.values():
        x = part(x)
    return x


class Encoder(nn.Module):
    """Encodes images to the mean of their latent distribution.

    [b, 3, p·h, p·w] -> [b, latent, h, w], p being `pixels_per_latent`.
    """

    def __init__(self, shape: AutoencoderShape) -> None:
        super().__init__()
        widths = shape.encoder
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        for i, (ins, outs) in enumerate(pairwise((widths[0], *widths))):
            sampler: dict[str, nn.Module] = {"downsample": Downsample(outs)} if i < len(widths) - 1 else {}
            self.down.append(_level(ins, outs, shape.layers, shape.groups, **sampler))
        self.mid = _middle(widths[-1], shape)
        self.norm_out = nn.GroupNorm(shape.groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * shape.latent, 3, padding=1)
        self.quant_conv = nn.Conv2d(2 * shape.latent, 2 * shape.latent, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = _through(level, x)  # type: ignore[arg-type] - a ModuleList does not say what it holds
        x = self.quant_conv(self.conv_out(_norm_silu(self.norm_out, _through(self.mid, x))))
        # The second half is the posterior's log-variance; klein always takes the mean.
        return x.chunk(2, dim=1)[0]


class Decoder(nn.Module):
    """[b, latent, h, w] -> [b, 3, p·h, p·w], p being `pixels_per_latent`."""

    def __init__(self, shape: AutoencoderShape) -> None:
        super().__init__()
        widths = shape.decoder
        self.post_quant_conv = nn.Conv2d(shape.latent, shape.latent, 1)
        self.conv_in = nn.Conv2d(shape.latent, widths[-1], 3, padding=1)
        self.mid = _middle(widths[-1], shape)
        # `up` is numbered from the image's level, yet runs from the latent's: last first.
        above = (*widths[1:], widths[-1])
        self.up = nn.ModuleList()
        for i, (outs, ins) in enumerate(zip(widths, above, strict=True)):
            sampler: dict[str, nn.Module] = {"upsample": Upsample(outs)} if i > 0 else {}
            self.up.append(_level(ins, outs, shape.layers + 1, shape.groups, **sampler))
        self.norm_out = nn.GroupNorm(shape.groups, widths[0], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = _through(self.mid, self.conv_in(self.post_quant_conv(z)))
        for level in reversed(self.up):
            x = _through(level, x)  # type: ignore[arg-type] - a ModuleList does not say what it holds
        return self.conv_out(_norm_silu(self.norm_out, x))


class LatentStatistics(nn.Module):
    """Mean and variance of each latent channel over the training images.

    Stored as buffers with the names of a BatchNorm.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def _of(self, z: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = self.running_mean, torch.sqrt(self.running_var + BN_EPS)
        return mean.to(z.dtype)[:, None, None], std.to(z.dtype)[:, None, None]

    def normalise(self, z: Tensor) -> Tensor:
        mean, std = self._of(z)
        return (z - mean) / std

    def restore(self, z: Tensor) -> Tensor:
        mean, std = self._of(z)
        return z * std + mean


class Autoencoder(nn.Module):
    """Maps between images in [-1, 1] and the transformer's normalised latents."""

    def __init__(self, shape: AutoencoderShape) -> None:
        super().__init__()
        self.shape = shape
        self.encoder = Encoder(shape)
        self.decoder = Decoder(shape)
        self.bn = LatentStatistics(4 * shape.latent)

    def encode(self, images: Tensor) -> Tensor:
        """Encode images to normalised latents.

        [b, 3, p·h, p·w] in [-1, 1] -> [b, 4·latent, h, w], p being `pixels_per_token`.
        """
        return self.bn.normalise(patchify(self.encoder(images)))

    def decode(self, latent: Tensor) -> Tensor:
        """Decode normalised latents to images.

        [b, 4·latent, h, w] -> [b, 3, p·h, p·w], about [-1, 1], p being `pixels_per_token`.
        """
        return self.decoder(unpatchify(self.bn.restore(latent)))
