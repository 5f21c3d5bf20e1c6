"""The velocity field: double-stream, then single-stream blocks.

The blocks run over text, canvas and reference tokens.
Parameter names and row orders are those of BFL's single file (fused qkv, final layer [shift; scale]), because the
quantised checkpoints come only in that layout; `engine.families.klein.key_maps` maps the diffusers names onto them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.diffusion.parts import Parts, result_of
from engine.nn import ops
from engine.nn.layers import Modulation, QKNorm, SelfAttention, gated_mlp, rope_table, timestep_embedding
from engine.nn.ops import Rope

KLEIN_THETA = 2000.0
"""Base of the rotary frequencies. Source: diffusers Flux2Transformer2DModel config `rope_theta`."""

KVPair = tuple[Tensor, Tensor]
"""One block's keys (normed and rotated) and values of the references: each [b, tokens, heads, head_dim].

They own their storage: a view of the matrix they were cut from would keep four times their size in memory."""


@dataclass(frozen=True, slots=True)
class TransformerShape:
    """Everything that decides the parameters' shapes, and the rotary constants."""

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
    """Shifts, scales and gates of one timestep.

    They are computed once a step, and all blocks of a kind share them.
    """

    image: tuple[Tensor, ...]
    text: tuple[Tensor, ...]
    single: tuple[Tensor, ...]
    final: tuple[Tensor, ...]


def _with_references(k: Tensor, v: Tensor, reference_kv: KVPair | None) -> tuple[Tensor, Tensor]:
    """Append the keys and values of the references.

    Their order does not matter to attention.
    """
    if reference_kv is None:
        return k, v
    return torch.cat((k, reference_kv[0]), dim=1), torch.cat((v, reference_kv[1]), dim=1)


class DoubleBlock(nn.Module):
    """Block with separate weights for text and image, joined only in attention."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.img_attn = SelfAttention(shape.hidden, shape.head_dim)
        self.txt_attn = SelfAttention(shape.hidden, shape.head_dim)
        self.img_mlp = gated_mlp(shape.hidden, shape.mlp)
        self.txt_mlp = gated_mlp(shape.hidden, shape.mlp)

    def forward(
        self, text: Tensor, image: Tensor, mods: Modulations, rope: Rope, reference_kv: KVPair | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return both streams after the block. rope covers [text, image]."""
        shift, scale, gate_attn, shift_mlp, scale_mlp, gate_mlp = mods.image
        t_shift, t_scale, t_gate_attn, t_shift_mlp, t_scale_mlp, t_gate_mlp = mods.text
        count = text.shape[1]
        text_rope, image_rope = (rope[0][:count], rope[1][:count]), (rope[0][count:], rope[1][count:])
        pairs = zip(
            self.txt_attn.heads(ops.norm_modulate(text, t_shift, t_scale), text_rope),
            self.img_attn.heads(ops.norm_modulate(image, shift, scale), image_rope),
            strict=True,
        )
        # Text comes first: the single blocks drop it by count, so [image, text] would give noise, not an error.
        q, k, v = (torch.cat(pair, dim=1) for pair in pairs)
        mixed = ops.attention(q, *_with_references(k, v, reference_kv))
        text_mixed, image_mixed = mixed[:, :count], mixed[:, count:]
        image = ops.gated_residual(image, gate_attn, self.img_attn.proj(image_mixed))
        image = ops.gated_residual(image, gate_mlp, self.img_mlp(ops.norm_modulate(image, shift_mlp, scale_mlp)))
        text = ops.gated_residual(text, t_gate_attn, self.txt_attn.proj(text_mixed))
        text = ops.gated_residual(text, t_gate_mlp, self.txt_mlp(ops.norm_modulate(text, t_shift_mlp, t_scale_mlp)))
        return text, image

    def prefill(self, references: Tensor, mods: Modulations, rope: Rope) -> tuple[Tensor, KVPair]:
        """Return the stream after the block, and the keys and values.

        The references attend only to each other.
        """
        shift, scale, gate_attn, shift_mlp, scale_mlp, gate_mlp = mods.image
        q, k, v = self.img_attn.heads(ops.norm_modulate(references, shift, scale), rope)
        references = ops.gated_residual(references, gate_attn, self.img_attn.proj(ops.attention(q, k, v)))
        update = self.img_mlp(ops.norm_modulate(references, shift_mlp, scale_mlp))
        return ops.gated_residual(references, gate_mlp, update), (k, v.contiguous())


class SingleBlock(nn.Module):
    """Block of one stream, with attention and MLP in parallel.

    One matrix leads into both, and one leads out of both.
    """

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.widths = (shape.hidden, shape.hidden, shape.hidden, 2 * shape.mlp)
        self.linear1 = nn.Linear(shape.hidden, sum(self.widths), bias=False)
        self.linear2 = nn.Linear(shape.hidden + shape.mlp, shape.hidden, bias=False)
        self.norm = QKNorm(shape.head_dim)

    def forward(self, x: Tensor, mods: Modulations, rope: Rope, reference_kv: KVPair | None = None) -> Tensor:
        """Return the stream after the block."""
        shift, scale, gate = mods.single
        q, k, v, mlp = self.linear1(ops.norm_modulate(x, shift, scale)).split(self.widths, dim=-1)
        mixed = ops.attention(self._query(q, rope), *_with_references(*self._key(k, v, rope), reference_kv))
        return ops.gated_residual(x, gate, self.linear2(torch.cat((mixed, ops.swiglu(mlp)), dim=-1)))

    def forward_rows(
        self,
        x: Tensor,
        rows: Tensor,
        mods: Modulations,
        rope: Rope,
        rows_rope: Rope,
        reference_kv: KVPair | None = None,
    ) -> Tensor:
        """Return only the tokens `rows` of x after the block.

        The other tokens give keys and values alone.
        """
        shift, scale, gate = mods.single
        k, v = self._project(ops.norm_modulate(x, shift, scale), 1, 3).chunk(2, dim=-1)
        n = ops.norm_modulate(rows, shift, scale)
        q, mlp = self._project(n, 0, 1), self._project(n, 3, 4)
        keys = _with_references(*self._key(k, v, rope), reference_kv)
        mixed = ops.attention(self._query(q, rows_rope), *keys)
        return ops.gated_residual(rows, gate, self.linear2(torch.cat((mixed, ops.swiglu(mlp)), dim=-1)))

    def prefill(self, references: Tensor, mods: Modulations, rope: Rope) -> tuple[Tensor, KVPair]:
        """Return the stream and the keys and values, like DoubleBlock.prefill."""
        shift, scale, gate = mods.single
        q, k, v, mlp = self.linear1(ops.norm_modulate(references, shift, scale)).split(self.widths, dim=-1)
        k, v = self._key(k, v, rope)
        mixed = ops.attention(self._query(q, rope), k, v)
        update = self.linear2(torch.cat((mixed, ops.swiglu(mlp)), dim=-1))
        return ops.gated_residual(references, gate, update), (k, v.contiguous())

    def prefill_last(self, references: Tensor, mods: Modulations, rope: Rope) -> KVPair:
        """Return the keys and values of the last block.

        Nothing comes after it, so its stream is not needed.
        """
        if not self.can_split:
            return self.prefill(references, mods, rope)[1]
        shift, scale, _ = mods.single
        k, v = self._project(ops.norm_modulate(references, shift, scale), 1, 3).chunk(2, dim=-1)
        k, v = self._key(k, v, rope)
        return k, v.contiguous()

    @property
    def can_split(self) -> bool:
        """Return whether single row ranges of the matrix can be used.

        A quantised matrix only multiplies as a whole.
        """
        return isinstance(self.linear1, nn.Linear)

    def _project(self, n: Tensor, first: int, end: int) -> Tensor:
        """Return the parts `first` to `end - 1` of the projection.

        The parts are [q | k | v | mlp].
        """
        weight = self.linear1.weight[sum(self.widths[:first]) : sum(self.widths[:end])]
        return F.linear(n, weight.to(n.dtype))  # a narrow weight is widened, another stays itself

    def _query(self, q: Tensor, rope: Rope) -> Tensor:
        return ops.qk_norm_rope(q.unflatten(-1, (-1, self.head_dim)), self.norm.query_norm.scale, rope)

    def _key(self, k: Tensor, v: Tensor, rope: Rope) -> KVPair:
        k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (k, v))
        return ops.qk_norm_rope(k, self.norm.key_norm.scale, rope), v


@dataclass(frozen=True, slots=True)
class BlockFunctions:
    """Functions of the repeated blocks, plain or compiled."""

    double: Callable[..., tuple[Tensor, Tensor]] = DoubleBlock.forward
    single: Callable[..., Tensor] = SingleBlock.forward
    rows: Callable[..., Tensor] = SingleBlock.forward_rows


PLAIN_BLOCKS = BlockFunctions()


class TimeEmbedder(nn.Module):
    """Embedding of the timestep as a vector of the hidden width."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(channels, hidden, bias=False)
        self.out_layer = nn.Linear(hidden, hidden, bias=False)

    def forward(self, t: Tensor) -> Tensor:
        e = timestep_embedding(t, self.in_layer.in_features).to(t.dtype)
        return self.out_layer(F.silu(self.in_layer(e)))


class FinalLayer(nn.Module):
    """Projection from the hidden width back to latent channels."""

    def __init__(self, hidden: int, channels: int) -> None:
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden, bias=False))
        self.linear = nn.Linear(hidden, channels, bias=False)

    def forward(self, x: Tensor, mods: Modulations) -> Tensor:
        shift, scale = mods.final
        return self.linear(ops.norm_modulate(x, shift, scale))


class Transformer(nn.Module):
    """klein's velocity field. Velocity is noise minus image."""

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
        """Return the rotary table for positions [tokens, 4].

        It is on the device of the weights.
        """
        device = self.img_in.weight.device
        cos, sin = rope_table(positions, self.shape.axes, self.shape.theta)
        return cos.to(device), sin.to(device)

    def modulations(self, sigma: Tensor) -> Modulations:
        """Return the modulations of sigma: [b], noise levels in 0 … 1.

        sigma has the weights' dtype.
        """
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
        reference_kv: Sequence[KVPair] | None = None,
        blocks: BlockFunctions = PLAIN_BLOCKS,
    ) -> Tensor:
        """Return the velocity of the canvas: [b, canvas tokens, channels].

        canvas: [b, canvas tokens, channels]. text: prompt states after `txt_in`, [b, text tokens, hidden].
        references: tokens after `img_in` that take part in every step (plain klein). reference_kv: result of `prefill`
        (KV klein). rope covers [text, canvas, references].
        """
        return result_of(self.in_parts(canvas, text, mods, rope, references, reference_kv, blocks))

    def in_parts(
        self,
        canvas: Tensor,
        text: Tensor,
        mods: Modulations,
        rope: Rope,
        references: Tensor | None = None,
        reference_kv: Sequence[KVPair] | None = None,
        blocks: BlockFunctions = PLAIN_BLOCKS,
    ) -> Parts[Tensor]:
        """Compute `forward` and yield the share that is done between blocks."""
        image = self.img_in(canvas)
        if references is not None:
            image = torch.cat((image, references), dim=1)
        count = len(self.double_blocks) + len(self.single_blocks)
        pairs: Any = iter(reference_kv or [None] * count)
        for number, block in enumerate(self.double_blocks, start=1):
            text, image = blocks.double(block, text, image, mods, rope, next(pairs))
            yield number / count
        x = torch.cat((text, image), dim=1)
        *singles, last = self.single_blocks
        for number, block in enumerate(singles, start=1 + len(self.double_blocks)):
            x = blocks.single(block, x, mods, rope, next(pairs))
            yield number / count
        rows = slice(text.shape[1], text.shape[1] + canvas.shape[1])
        if last.can_split:
            rows_rope = (rope[0][rows], rope[1][rows])
            x = blocks.rows(last, x, x[:, rows], mods, rope, rows_rope, next(pairs))
        else:
            x = blocks.single(last, x, mods, rope, next(pairs))[:, rows]
        return self.final_layer(x, mods)

    def prefill(self, references: Tensor, rope: Rope) -> list[KVPair]:
        """Return the references' keys and values in every block, for KV klein.

        The references attend to each other, at timestep 0.

        They depend on nothing else, so they can be kept for any prompt, seed, size and step.
        references: [b, tokens, hidden] after `img_in`; rope covers them alone.
        """
        mods = self.modulations(torch.zeros(references.shape[0], dtype=references.dtype, device=references.device))
        pairs: list[KVPair] = []
        *blocks, last = [*self.double_blocks, *self.single_blocks]
        for block in blocks:
            assert isinstance(block, DoubleBlock | SingleBlock)
            references, pair = block.prefill(references, mods, rope)
            pairs.append(pair)
        assert isinstance(last, SingleBlock)
        return [*pairs, last.prefill_last(references, mods, rope)]
