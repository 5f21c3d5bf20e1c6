"""Qwen3, the language model that reads prompts.

Parameter names, order of operations and roundings are those of transformers 5, whose results it equals bit for bit.
Importing that model takes 3 s of processor time, as long as everything else until the first image.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Turns = tuple[Tensor, Tensor]
"""Cosines and sines of the rotary positions: each [1, tokens, head_dim], both halves alike."""


@dataclass(frozen=True, slots=True)
class Qwen3Shape:
    """Hyperparameters of a Qwen3."""

    vocabulary: int
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    theta: float
    bias: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read a model's config.json, of transformers 4 or 5.

        Raises KeyError for a missing number, ValueError for what this model does not compute. Defaults are those of
        transformers' Qwen3Config.
        """
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(rope, Mapping):
            raise ValueError(f"the rotary positions are {rope!r}")
        kind = rope.get("rope_type", rope.get("type", "default"))
        activation = config.get("hidden_act", "silu")
        if kind != "default" or activation != "silu":
            raise ValueError(f"{kind} rotary positions with {activation}; Qwen3 has default ones with silu")
        heads = _size(config, "num_attention_heads")
        shape = cls(
            vocabulary=_size(config, "vocab_size"),
            hidden=_size(config, "hidden_size"),
            mlp=_size(config, "intermediate_size"),
            layers=_size(config, "num_hidden_layers"),
            heads=heads,
            kv_heads=_size(config, "num_key_value_heads", heads),
            head_dim=_size(config, "head_dim", 128),
            eps=float(config.get("rms_norm_eps", 1e-6)),
            theta=float(rope.get("rope_theta", config.get("rope_theta", 10_000.0))),
            bias=bool(config.get("attention_bias", False)),
        )
        if shape.heads % shape.kv_heads:
            raise ValueError(f"num_attention_heads {shape.heads}, num_key_value_heads {shape.kv_heads}")
        return shape


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config[key] if default is None else config.get(key)
    size = default if value is None else value
    if type(size) is not int or size < 1:
        raise ValueError(f"{key} is {size!r}")
    return size


class QwenNorm(nn.Module):
    """RMSNorm that rounds to the input's dtype before it applies the weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class GroupedAttention(nn.Module):
    """Attention whose heads share keys and values in groups."""

    def __init__(self, shape: Qwen3Shape) -> None:
        super().__init__()
        self.head_dim, self.group = shape.head_dim, shape.heads // shape.kv_heads
        width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, width, bias=shape.bias)
        self.k_proj = nn.Linear(shape.hidden, kv_width, bias=shape.bias)
        self.v_proj = nn.Linear(shape.hidden, kv_width, bias=shape.bias)
        self.o_proj = nn.Linear(width, shape.hidden, bias=shape.bias)
        self.q_norm = QwenNorm(shape.head_dim, shape.eps)
        self.k_norm = QwenNorm(shape.head_dim, shape.eps)

    def forward(self, x: Tensor, attended: Tensor, turns: Turns) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (
            _rotate_halves(self.q_norm(q).transpose(1, 2), turns),
            _rotate_halves(self.k_norm(k).transpose(1, 2), turns),
        )
        k, v = self._repeat(k), self._repeat(v.transpose(1, 2))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attended, scale=self.head_dim**-0.5)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def _repeat(self, x: Tensor) -> Tensor:
        """Repeat each head for the queries that share it."""
        # torch's own grouped attention takes its slowest path on CUDA if there is a mask.
        if self.group == 1:
            return x
        return x[:, :, None].expand(-1, -1, self.group, -1, -1).flatten(1, 2)


class MLP(nn.Module):
    """Gated MLP with SiLU."""

    def __init__(self, shape: Qwen3Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.mlp, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.mlp, bias=False)
        self.down_proj = nn.Linear(shape.mlp, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Decoder layer: attention and MLP, each behind a norm."""

    def __init__(self, shape: Qwen3Shape) -> None:
        super().__init__()
        self.self_attn = GroupedAttention(shape)
        self.mlp = MLP(shape)
        self.input_layernorm = QwenNorm(shape.hidden, shape.eps)
        self.post_attention_layernorm = QwenNorm(shape.hidden, shape.eps)

    def forward(self, x: Tensor, attended: Tensor, turns: Turns) -> Tensor:
        """Return the states [b, tokens, hidden] after the layer.

        attended: [b, 1, tokens, tokens], true where a row's token reads a column's.
        """
        x = x + self.self_attn(self.input_layernorm(x), attended, turns)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen3(nn.Module):
    """Qwen3 without its language model head.

    layers: how many are built, None for all. The final norm belongs to the last of all.
    """

    frequencies: Tensor

    def __init__(self, shape: Qwen3Shape, layers: int | None = None) -> None:
        super().__init__()
        count = shape.layers if layers is None else layers
        self.shape = shape
        # Without a given weight torch draws one, and a draw on the meta device imports torch._dynamo: 1.3 s.
        table = torch.empty(shape.vocabulary, shape.hidden)
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden, _weight=table)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(count))
        self.norm = QwenNorm(shape.hidden, shape.eps) if count == shape.layers else nn.Identity()
        self.register_buffer("frequencies", torch.empty(0), persistent=False)

    def compute_frequencies(self, device: torch.device) -> None:
        """Fill the rotary frequencies: computed on the CPU, held on `device`."""
        width = self.shape.head_dim
        exponents = torch.arange(0, width, 2, dtype=torch.float, device="cpu") / width
        self.frequencies = (1.0 / self.shape.theta**exponents).to(device)

    def turns(self, states: Tensor) -> Turns:
        """Return the rotary table for states [b, tokens, hidden], in their dtype."""
        positions = torch.arange(states.shape[1], device=states.device)[None, :, None].float()
        angles = positions * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(states.dtype), angles.sin().to(states.dtype)


def _rotate_halves(x: Tensor, turns: Turns) -> Tensor:
    """Rotate channel i with channel i + head_dim / 2.

    x: [b, heads, tokens, head_dim].
    """
    # Halves, not adjacent pairs as in the transformer.
    cos, sin = (table[:, None] for table in turns)
    first, second = x.chunk(2, dim=-1)
    return (x * cos) + (torch.cat((-second, first), dim=-1) * sin)
