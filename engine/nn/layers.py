"""The parts of a transformer block: attention, rotary positions, RMSNorm, modulation, gated MLP."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

EPS = 1e-6
"""Of every LayerNorm and RMSNorm in the transformer. Source: diffusers Flux2Transformer2DModel config `eps`."""

Rope = tuple[Tensor, Tensor]
"""(cos, sin), each [tokens, head_dim / 2] in fp32."""


def rope_table(positions: Tensor, axes: tuple[int, ...], theta: float) -> Rope:
    """Angles for positions [tokens, len(axes)]; axes: channels of a head that each axis turns.

    Computed in fp64 on the CPU, as diffusers does: bf16 cannot even count past 256, and some devices have no fp64.
    """
    angles = [
        torch.outer(positions[:, i].double(), theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width))
        for i, width in enumerate(axes)
    ]
    table = torch.cat(angles, dim=-1)
    return table.cos().float(), table.sin().float()


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn adjacent channel pairs of x [b, tokens, heads, head_dim] by their position's angles."""
    cos, sin = (table[:, None, :] for table in rope)
    # Adjacent pairs (2k, 2k+1), not halves as in Qwen3: halves would paint noise, not fail.
    a, b = rearrange(x.float(), "b s n (d pair) -> pair b s n d", pair=2)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention without a mask: [b, s, heads, head_dim] -> [b, s, heads · head_dim]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class RMSNorm(nn.Module):
    """x / rms(x) · scale over the last axis; statistics in fp32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.scale.shape, self.scale, eps=EPS)


class QKNorm(nn.Module):
    """RMSNorm of queries and keys over each head's channels."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(head_dim)
        self.key_norm = RMSNorm(head_dim)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q), self.key_norm(k)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, then scale and shift as the timestep says."""
    return (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=EPS) + shift


class Modulation(nn.Module):
    """What the timestep says to a stream: `count` vectors of the hidden width, each [b, 1, hidden]."""

    def __init__(self, hidden: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.lin = nn.Linear(hidden, count * hidden, bias=False)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self.lin(F.silu(vec))[:, None, :].chunk(self.count, dim=-1)


def gate(x: Tensor) -> Tensor:
    """SiLU of the first half times the second half."""
    opening, value = x.chunk(2, dim=-1)
    return F.silu(opening) * value


class SelfAttention(nn.Module):
    """One stream's way into and out of the joint attention."""

    def __init__(self, hidden: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.norm = QKNorm(head_dim)
        self.proj = nn.Linear(hidden, hidden, bias=False)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normed q, normed k, and v: each [b, s, heads, head_dim]."""
        q, k, v = rearrange(self.qkv(x), "b s (three n d) -> three b s n d", three=3, d=self.head_dim)
        return *self.norm(q, k), v


def gated_mlp(hidden: int, width: int) -> nn.Sequential:
    """hidden -> width (gated) -> hidden; index 1 is the gate, so that the names are `.0` and `.2`."""
    return nn.Sequential(nn.Linear(hidden, 2 * width, bias=False), SwiGLU(), nn.Linear(width, hidden, bias=False))


class SwiGLU(nn.Module):
    """`gate` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        return gate(x)


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """[b] -> [b, width]: cosines, then sines, of t (0 … 1000) at width/2 falling frequencies; fp32."""
    half = width // 2
    frequencies = torch.exp(-torch.arange(half, dtype=torch.float32, device=t.device) * (_LOG_10000 / half))
    angles = t.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


_LOG_10000 = 9.210340371976184
