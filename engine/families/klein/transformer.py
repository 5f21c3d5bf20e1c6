"""The velocity field: double-stream blocks, then single-stream blocks, over text, canvas and reference tokens.

Parameter names and row orders are those of BFL's single file (fused qkv, final layer [shift; scale]), because the
quantised checkpoints come only in that layout; `engine.families.klein.key_maps` maps the diffusers names onto them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.nn.layers import (
    Modulation,
    QKNorm,
    Rope,
    SelfAttention,
    attend,
    gate,
    gated_mlp,
    modulate,
    rope_table,
    rotate,
    timestep_embedding,
)

KLEIN_THETA = 2000.0
"""Base of the rotary frequencies. Source: diffusers Flux2Transformer2DModel config `rope_theta`."""

KV = tuple[Tensor, Tensor]
"""One block's keys (normed and rotated) and values of the references: each [b, tokens, heads, head_dim].

Of their own storage: a view of the matrix they were cut from would keep four times their size in memory."""


@dataclass(frozen=True, slots=True)
class TransformerShape:
    """Everything that decides the parameters' shapes, and the two numbers of the rotary positions that do not."""

    hidden: int
    head_dim: int
    context: int
    double_blocks: int
    single_blocks: int
    mlp: int
    channels: int = 128
    time_channels: int = 256
    axes: tuple[int, ...] = (32, 32, 32, 32)
    theta: float = KLEIN_THETA


@dataclass(frozen=True, slots=True)
class Modulations:
    """What one timestep says to every block: computed once a step, shared by all blocks of a kind."""

    image: tuple[Tensor, ...]
    text: tuple[Tensor, ...]
    single: tuple[Tensor, ...]
    final: tuple[Tensor, ...]


def _keys(k: Tensor, v: Tensor, kept: KV | None) -> tuple[Tensor, Tensor]:
    """With the kept references' behind: the order of keys does not matter to attention."""
    if kept is None:
        return k, v
    return torch.cat((k, kept[0]), dim=1), torch.cat((v, kept[1]), dim=1)


class DoubleBlock(nn.Module):
    """Text and image each with weights of their own, joined only in attention."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.img_attn = SelfAttention(shape.hidden, shape.head_dim)
        self.txt_attn = SelfAttention(shape.hidden, shape.head_dim)
        self.img_mlp = gated_mlp(shape.hidden, shape.mlp)
        self.txt_mlp = gated_mlp(shape.hidden, shape.mlp)

    def forward(self, text: Tensor, image: Tensor, mods: Modulations, rope: Rope, kept: KV | None = None):
        """Both streams after the block. rope covers [text, image]."""
        shift, scale, gate_attn, shift_mlp, scale_mlp, gate_mlp = mods.image
        t_shift, t_scale, t_gate_attn, t_shift_mlp, t_scale_mlp, t_gate_mlp = mods.text
        here = zip(
            self.txt_attn.heads(modulate(text, t_shift, t_scale)),
            self.img_attn.heads(modulate(image, shift, scale)),
            strict=True,
        )
        # Text first: the single blocks drop it by count, so [image, text] would yield noise, not an error.
        q, k, v = (torch.cat(pair, dim=1) for pair in here)
        mixed = attend(rotate(q, rope), *_keys(rotate(k, rope), v, kept))
        text_mixed, image_mixed = mixed.split((text.shape[1], image.shape[1]), dim=1)
        image = image + gate_attn * self.img_attn.proj(image_mixed)
        image = image + gate_mlp * self.img_mlp(modulate(image, shift_mlp, scale_mlp))
        text = text + t_gate_attn * self.txt_attn.proj(text_mixed)
        text = text + t_gate_mlp * self.txt_mlp(modulate(text, t_shift_mlp, t_scale_mlp))
        return text, image

    def keep(self, references: Tensor, mods: Modulations, rope: Rope) -> tuple[Tensor, KV]:
        """References that see only each other: the stream after the block, and what later steps read of it."""
        shift, scale, gate_attn, shift_mlp, scale_mlp, gate_mlp = mods.image
        q, k, v = self.img_attn.heads(modulate(references, shift, scale))
        k = rotate(k, rope)
        references = references + gate_attn * self.img_attn.proj(attend(rotate(q, rope), k, v))
        references = references + gate_mlp * self.img_mlp(modulate(references, shift_mlp, scale_mlp))
        return references, (k, v.contiguous())


class SingleBlock(nn.Module):
    """One stream; attention and MLP side by side between one matrix in and one out."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.widths = (shape.hidden, shape.hidden, shape.hidden, 2 * shape.mlp)
        self.linear1 = nn.Linear(shape.hidden, sum(self.widths), bias=False)
        self.linear2 = nn.Linear(shape.hidden + shape.mlp, shape.hidden, bias=False)
        self.norm = QKNorm(shape.head_dim)

    def forward(self, x: Tensor, mods: Modulations, rope: Rope, kept: KV | None = None) -> Tensor:
        """The stream after the block."""
        shift, scale, opening = mods.single
        q, k, v, mlp = self.linear1(modulate(x, shift, scale)).split(self.widths, dim=-1)
        mixed = attend(self._query(q, rope), *_keys(*self._key(k, v, rope), kept))
        return x + opening * self.linear2(torch.cat((mixed, gate(mlp)), dim=-1))

    def last(self, x: Tensor, mods: Modulations, rope: Rope, kept: KV | None, read: slice) -> Tensor:
        """Only the tokens `read` of the stream after the block: of the others, only keys and values are needed."""
        if not self._splits:
            return self(x, mods, rope, kept)[:, read]
        shift, scale, opening = mods.single
        n = modulate(x, shift, scale)
        k, v = self._rows(n, 1, 3).chunk(2, dim=-1)
        q, mlp = self._rows(n[:, read], 0, 1), self._rows(n[:, read], 3, 4)
        there = (rope[0][read], rope[1][read])
        mixed = attend(self._query(q, there), *_keys(*self._key(k, v, rope), kept))
        return x[:, read] + opening * self.linear2(torch.cat((mixed, gate(mlp)), dim=-1))

    def keep(self, references: Tensor, mods: Modulations, rope: Rope) -> tuple[Tensor, KV]:
        """As DoubleBlock.keep."""
        shift, scale, opening = mods.single
        q, k, v, mlp = self.linear1(modulate(references, shift, scale)).split(self.widths, dim=-1)
        k, v = self._key(k, v, rope)
        mixed = attend(self._query(q, rope), k, v)
        return references + opening * self.linear2(torch.cat((mixed, gate(mlp)), dim=-1)), (k, v.contiguous())

    def keep_last(self, references: Tensor, mods: Modulations, rope: Rope) -> KV:
        """What later steps read of the last block: nothing comes after it, so its stream is not needed."""
        if not self._splits:
            return self.keep(references, mods, rope)[1]
        shift, scale, _ = mods.single
        k, v = self._rows(modulate(references, shift, scale), 1, 3).chunk(2, dim=-1)
        k, v = self._key(k, v, rope)
        return k, v.contiguous()

    @property
    def _splits(self) -> bool:
        """Whether some rows of the matrix can be used alone; a quantised one only multiplies as a whole."""
        return type(self.linear1) is nn.Linear

    def _rows(self, n: Tensor, first: int, end: int) -> Tensor:
        """Parts first … end - 1 of [q | k | v | mlp]."""
        return F.linear(n, self.linear1.weight[sum(self.widths[:first]) : sum(self.widths[:end])])

    def _query(self, q: Tensor, rope: Rope) -> Tensor:
        return rotate(self.norm.query_norm(q.unflatten(-1, (-1, self.head_dim))), rope)

    def _key(self, k: Tensor, v: Tensor, rope: Rope) -> KV:
        k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (k, v))
        return rotate(self.norm.key_norm(k), rope), v


class TimeEmbedder(nn.Module):
    """The timestep as a vector of the hidden width."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(channels, hidden, bias=False)
        self.out_layer = nn.Linear(hidden, hidden, bias=False)

    def forward(self, t: Tensor) -> Tensor:
        e = timestep_embedding(t, self.in_layer.in_features).to(t.dtype)
        return self.out_layer(F.silu(self.in_layer(e)))


class FinalLayer(nn.Module):
    """Out of the hidden width, back to latent channels."""

    def __init__(self, hidden: int, channels: int) -> None:
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden, bias=False))
        self.linear = nn.Linear(hidden, channels, bias=False)

    def forward(self, x: Tensor, mods: Modulations) -> Tensor:
        shift, scale = mods.final
        return self.linear(modulate(x, shift, scale))


class Transformer(nn.Module):
    """klein's velocity field. Velocity is noise minus picture."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.shape = shape
        self.img_in = nn.Linear(shape.channels, shape.hidden, bias=False)
        self.txt_in = nn.Linear(shape.context, shape.hidden, bias=False)
        self.time_in = TimeEmbedder(shape.time_channels, shape.hidden)
        self.double_stream_modulation_img = Modulation(shape.hidden, 6)
        self.double_stream_modulation_txt = Modulation(shape.hidden, 6)
        self.single_stream_modulation = Modulation(shape.hidden, 3)
        self.double_blocks = nn.ModuleList(DoubleBlock(shape) for _ in range(shape.double_blocks))
        self.single_blocks = nn.ModuleList(SingleBlock(shape) for _ in range(shape.single_blocks))
        self.final_layer = FinalLayer(shape.hidden, shape.channels)

    def rope(self, positions: Tensor) -> Rope:
        """Rotary table for positions [tokens, 4]; on the device of the weights."""
        device = self.img_in.weight.device
        cos, sin = rope_table(positions, self.shape.axes, self.shape.theta)
        return cos.to(device), sin.to(device)

    def modulations(self, sigma: Tensor) -> Modulations:
        """sigma: [b], noise levels in 0 … 1, in the weights' dtype."""
        # The network was trained on 1000·sigma; in bf16 that product rounds, officially so.
        vec = self.time_in(sigma * 1000)
        return Modulations(
            image=self.double_stream_modulation_img(vec),
            text=self.double_stream_modulation_txt(vec),
            single=self.single_stream_modulation(vec),
            final=self.final_layer.adaLN_modulation(vec)[:, None, :].chunk(2, dim=-1),
        )

    def forward(
        self,
        canvas: Tensor,
        text: Tensor,
        mods: Modulations,
        rope: Rope,
        references: Tensor | None = None,
        kept: Sequence[KV] | None = None,
    ) -> Tensor:
        """Velocity of the canvas: [b, canvas tokens, channels].

        canvas: [b, canvas tokens, channels]. text: prompt states after `txt_in`, [b, text tokens, hidden].
        references: tokens after `img_in` that take part in every step (plain klein). kept: what `prefill` gave
        (KV klein). rope covers [text, canvas, references].
        """
        image = self.img_in(canvas)
        if references is not None:
            image = torch.cat((image, references), dim=1)
        each = iter(kept) if kept is not None else iter([None] * (len(self.double_blocks) + len(self.single_blocks)))
        for block in self.double_blocks:
            text, image = block(text, image, mods, rope, next(each))
        x = torch.cat((text, image), dim=1)
        # A ModuleList does not say what it holds.
        *blocks, last = self.single_blocks
        for block in blocks:
            x = block(x, mods, rope, next(each))
        read = slice(text.shape[1], text.shape[1] + canvas.shape[1])
        return self.final_layer(last.last(x, mods, rope, next(each), read), mods)  # type: ignore[operator] - as above

    def prefill(self, references: Tensor, rope: Rope) -> list[KV]:
        """Keys and values of the references in every block, for KV klein: they see only each other, at timestep 0.

        They depend on nothing else, so they can be kept for any prompt, seed, size and step.
        references: [b, tokens, hidden] after `img_in`; rope covers them alone.
        """
        mods = self.modulations(torch.zeros(references.shape[0], dtype=references.dtype, device=references.device))
        kept: list[KV] = []
        *blocks, last = [*self.double_blocks, *self.single_blocks]
        for block in blocks:
            assert isinstance(block, DoubleBlock | SingleBlock)
            references, kv = block.keep(references, mods, rope)
            kept.append(kv)
        assert isinstance(last, SingleBlock)
        return [*kept, last.keep_last(references, mods, rope)]
