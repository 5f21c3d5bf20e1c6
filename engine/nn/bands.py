"""Decode an image in bands of rows, for little memory.

Layer by layer: the statistics of a norm are taken over the whole image first, then its values and the convolution
after it are computed a band at a time, with the neighbours' rows, so that the result is that of the whole image.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.diffusion.tokens import unpatchify
from engine.nn import ops
from engine.nn.autoencoder import Attention, Autoencoder, Decoder, ResnetBlock, Upsample

BANDS = 8
"""Bands of an image. Each takes an eighth of what a layer computes between two whole images."""


def decode(autoencoder: Autoencoder, latent: Tensor, bands: int = BANDS) -> Tensor:
    """Decode like Autoencoder.decode.

    [1, channels, h, w] -> [1, 3, p·h, p·w].
    """
    decoder = autoencoder.decoder
    x = decoder.conv_in(decoder.post_quant_conv(unpatchify(autoencoder.bn.restore(latent))))
    for part in _parts(decoder):
        x = _apply(part, x, bands)
    return _norm_convolution(decoder.norm_out, decoder.conv_out, x, bands)


def _parts(decoder: Decoder) -> Iterator[nn.Module]:
    """Yield the modules between the first and the last convolution, in order."""
    yield from decoder.mid.values()
    for level in reversed(decoder.up):
        assert isinstance(level, nn.ModuleDict)
        for part in level.values():
            yield from part if isinstance(part, nn.Sequential) else (part,)


def _apply(part: nn.Module, x: Tensor, bands: int) -> Tensor:
    match part:
        case ResnetBlock():
            return _residual(part, x, bands)
        case Upsample():
            return _upsample(part, x, bands)
        case Attention():
            return part(x)
    raise AssertionError(type(part).__name__)


def _residual(block: ResnetBlock, x: Tensor, bands: int) -> Tensor:
    """Compute a residual block, in the memory of x where possible."""
    h = _norm_convolution(block.norm1, block.conv1, x, bands)
    plain = isinstance(block.nin_shortcut, nn.Identity)
    # Rows of x are read only where they are written.
    out = x if plain else torch.empty_like(h)
    for rows, band in _norm_convolved(block.norm2, block.conv2, h, bands):
        out[:, :, rows] = block.nin_shortcut(x[:, :, rows]) + band
    return out


def _upsample(layer: Upsample, x: Tensor, bands: int) -> Tensor:
    """Double the size and convolve, band by band."""
    height, width = 2 * x.shape[2], 2 * x.shape[3]
    out = x.new_empty(x.shape[0], layer.conv.out_channels, height, width)
    for rows in _bands(x.shape[2], bands):
        first, last = max(0, rows.start - 1), min(x.shape[2], rows.stop + 1)
        larger = F.interpolate(x[:, :, first:last], scale_factor=2.0, mode="nearest")
        own = slice(2 * rows.start, 2 * rows.stop)
        out[:, :, own] = _rows_of(
            layer.conv, lambda a, b, f=first, y=larger: y[:, :, a - 2 * f : b - 2 * f], own, height
        )
    return out


def _norm_convolution(norm: nn.GroupNorm, conv: nn.Conv2d, x: Tensor, bands: int) -> Tensor:
    out = x.new_empty(x.shape[0], conv.out_channels, *x.shape[2:])
    for rows, band in _norm_convolved(norm, conv, x, bands):
        out[:, :, rows] = band
    return out


def _norm_convolved(norm: nn.GroupNorm, conv: nn.Conv2d, x: Tensor, bands: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield the bands of GroupNorm, SiLU and a convolution."""
    scale, shift = _statistics(norm, x)
    # torch's own norm rounds once, at its end; the other one rounds factor and summand too, which is faster.
    if ops.current("norm_silu") is ops.two_pass_norm_silu:
        scale, shift = scale.to(x.dtype), shift.to(x.dtype)

    def normed(begin: int, end: int) -> Tensor:
        return F.silu((x[:, :, begin:end] * scale).add_(shift).to(x.dtype), inplace=True)

    for rows in _bands(x.shape[2], bands):
        yield rows, _rows_of(conv, normed, rows, x.shape[2])


def _statistics(norm: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factor and the summand of each channel, in fp32."""
    b, c = x.shape[:2]
    # In parts, because they are computed on an fp32 copy.
    parts = x.reshape(b, norm.num_groups, -1).split(max(1, norm.num_groups // 8), dim=1)
    moments = [torch.var_mean(part.float(), dim=-1, correction=0, keepdim=True) for part in parts]
    variance, mean = (torch.cat(values, dim=1) for values in zip(*moments, strict=True))
    scale = torch.rsqrt(variance + norm.eps) * norm.weight.float().view(1, norm.num_groups, -1)
    shift = norm.bias.float().view(1, norm.num_groups, -1) - mean * scale
    return scale.reshape(b, c, 1, 1), shift.reshape(b, c, 1, 1)


def _rows_of(conv: nn.Conv2d, made: Callable[[int, int], Tensor], rows: slice, height: int) -> Tensor:
    """Return rows of a 3×3 convolution.

    made: returns any rows of its input.
    """
    first, last = max(0, rows.start - 1), min(height, rows.stop + 1)
    # At the edges of the image the convolution pads with zeros, between bands with the neighbours' rows.
    padded = F.pad(made(first, last), (1, 1, int(first == rows.start), int(last == rows.stop)))
    return F.conv2d(padded, conv.weight, conv.bias)


def _bands(height: int, bands: int) -> Iterator[slice]:
    step = -(-height // bands)
    for begin in range(0, height, step):
        yield slice(begin, min(height, begin + step))
