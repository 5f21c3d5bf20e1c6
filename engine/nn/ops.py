"""Operations of the networks, and the choice between implementations of them.

Networks call them through this module: `ops.attention(q, k, v)`. `choose` replaces the implementation of an operation
for the whole process. The plain one stays available as `PLAIN["attention"]`. Both compute the same function up to
rounding, and tests compare the two.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6
"""Epsilon of every LayerNorm and RMSNorm in the transformer. Source: diffusers Flux2Transformer2DModel config `eps`."""

Rope = tuple[Tensor, Tensor]
"""(cos, sin), each [tokens, head_dim / 2] in fp32."""


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Apply LayerNorm without weights, then scale and shift by the modulation."""
    return (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=EPS) + shift


def gated_residual(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """Add an update to the residual stream, gated by the timestep's modulation."""
    return x + gate * update


def swiglu(x: Tensor) -> Tensor:
    """Return SiLU of the first half times the second half."""
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate adjacent channel pairs by the angles of their token's position.

    x: [b, tokens, heads, head_dim].
    """
    # Adjacent pairs (2k, 2k+1), not halves as in Qwen3: halves would give noise, not an error.
    pairs = x.float().unflatten(-1, (-1, 2))
    if x.is_cpu and not torch.compiler.is_dynamo_compiling():
        # One kernel, the same bits: 192 × 6 × 32 numbers in 45 µs instead of 275 (one core of a Xeon).
        table = torch.complex(*rope)[:, None]
        return torch.view_as_real(torch.view_as_complex(pairs) * table).flatten(-2).to(x.dtype)
    cos, sin = (table[:, None, :, None] for table in rope)
    # (a, b) · cos + (b, a) · (-sin, sin). Stacking the two sums gives the same bits; compiled, it computes both for
    # each output, and in eager mode it takes up to twice the time on a CPU.
    turned = pairs.flip(-1).mul_(torch.cat((-sin, sin), dim=-1))
    return (pairs * cos).add_(turned).flatten(-2).to(x.dtype)


def qk_norm_rope(x: Tensor, weight: Tensor, rope: Rope) -> Tensor:
    """Apply RMSNorm over each head's channels, then rotary positions."""
    return rotate(F.rms_norm(x, weight.shape, weight, eps=EPS), rope)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute full attention without a mask.

    [b, s, heads, head_dim] -> [b, s, heads · head_dim].
    """
    return _chosen["attention"](q, k, v)


def norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """Apply GroupNorm to [b, c, h, w], then SiLU."""
    return _chosen["norm_silu"](x, weight, bias, groups, eps)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    return F.silu(F.group_norm(x, groups, weight, bias, eps))


def two_pass_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """Compute `norm_silu` in one reduction and one pass over the values.

    The statistics are computed in fp32.

    torch's GroupNorm gives each group to one thread block: 32 of an H200's 132 processors work, and 44.6 of the
    decoder's 84 ms at 1024² are this one kernel. This form took the decoder to 55 ms; Inductor fuses it to two kernels.
    """
    b, c = x.shape[:2]
    planes = x.reshape(b, groups, -1)
    # In parts, because eager mode would otherwise make an fp32 copy of the whole tensor. Compiled code makes none.
    # Not is_compiling(), which torch 2.13 sets for the whole process: a job beside a compiler would take this branch.
    parts = (planes,) if torch.compiler.is_dynamo_compiling() else planes.split(max(1, groups // 8), dim=1)
    moments = [torch.var_mean(part.float(), dim=-1, correction=0, keepdim=True) for part in parts]
    variance, mean = (torch.cat(values, dim=1) for values in zip(*moments, strict=True))
    scale = torch.rsqrt(variance + eps) * weight.float().view(1, groups, -1)
    shift = bias.float().view(1, groups, -1) - mean * scale
    scale, shift = (part.reshape(b, c, 1, 1).to(x.dtype) for part in (scale, shift))
    return F.silu((x * scale).add_(shift), inplace=True)


PLAIN: dict[str, Callable[..., Tensor]] = {"attention": _attention, "norm_silu": _norm_silu}
"""Operations that have more than one implementation."""

_chosen = dict(PLAIN)


def current(name: str) -> Callable[..., Tensor]:
    """Return the implementation of an operation that is in use."""
    return _chosen[name]


def choose(**implementations: Callable[..., Tensor]) -> None:
    """Use these implementations from now on, in the whole process.

    Raises KeyError for an unknown operation.
    """
    for name in implementations:
        PLAIN[name]
    _chosen.update(implementations)
