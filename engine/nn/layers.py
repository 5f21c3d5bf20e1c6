"""Layers of transformer blocks: attention projections, norms, modulation, gated MLP."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.nn import ops
from engine.nn.ops import Rope


def rope_table(positions: Tensor, axes: tuple[int, ...], theta: float) -> Rope:
    """Return cosines and sines of the rotary angles of positions.

    positions: [tokens, len(axes)]. axes: number of channels of a head that each axis rotates.

    Computed in fp64 on the CPU, as diffusers does: bf16 has no odd integers above 256, and some devices have no fp64.
    """
    angles = [
        torch.outer(positions[:, i].double(), theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width))
        for i, width in enumerate(axes)
    ]
    table = torch.cat(angles, dim=-1)
    return table.cos().float(), table.sin().float()


class RMSNorm(nn.Module):
    """Weight of an RMSNorm over a head's channels.

    `ops.qk_norm_rope` applies it.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))


class QKNorm(nn.Module):
    """Weights of the RMSNorms of queries and keys."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(head_dim)
        self.key_norm = RMSNorm(head_dim)


class Modulation(nn.Module):
    """Projects the timestep to `count` modulation vectors, each [b, 1, hidden]."""

    def __init__(self, hidden: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.lin = nn.Linear(hidden, count * hidden, bias=False)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self.lin(F.silu(vec))[:, None, :].chunk(self.count, dim=-1)


class SelfAttention(nn.Module):
    """Projections of one stream into and out of the joint attention."""

    def __init__(self, hidden: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.norm = QKNorm(head_dim)
        self.proj = nn.Linear(hidden, hidden, bias=False)

    def heads(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each [b, s, heads, head_dim].

        Queries and keys are normed and rotated.
        """
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv(x).chunk(3, dim=-1))
        return (
            ops.qk_norm_rope(q, self.norm.query_norm.scale, rope),
            ops.qk_norm_rope(k, self.norm.key_norm.scale, rope),
            v,
        )


def gated_mlp(hidden: int, width: int) -> nn.Sequential:
    """Return a SwiGLU MLP: hidden -> width -> hidden.

    The activation has index 1, so that the parameters are named `.0` and `.2`.
    """
    return nn.Sequential(nn.Linear(hidden, 2 * width, bias=False), SwiGLU(), nn.Linear(width, hidden, bias=False))


class SwiGLU(nn.Module):
    """Module around `ops.swiglu`."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.swiglu(x)


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Return the sinusoidal embedding of t: [b] -> [b, width], fp32.

    Cosines, then sines, of t (0 … 1000) at width/2 falling frequencies.
    """
    half = width // 2
    frequencies = torch.exp(-torch.arange(half, dtype=torch.float32, device=t.device) * (_LOG_10000 / half))
    angles = t.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


_LOG_10000 = 9.210340371976184
