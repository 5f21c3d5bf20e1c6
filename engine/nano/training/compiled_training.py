"""The transformer's velocity for training, in four compiled pieces.

Attention between the pieces is plain.

The weights are the model's own, in fp32; only products run in PRODUCTS. The pieces are the same for every block, number
of references, canvas and text length, so that each compiles once, with batch and length left open.
`Transformer.forward` is the reference that a test holds this to. Where compiling fails, the pieces run as written.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.families.klein.transformer import DoubleBlock, Modulations, SingleBlock, Transformer
from engine.nano.training.model import Nano
from engine.nn.layers import SelfAttention
from engine.nn.ops import EPS, Rope

PRODUCTS = torch.bfloat16 if torch.cuda.is_available() or torch.cpu._is_amx_tile_supported() else torch.float32
"""Of all products. Two cores of a Xeon with AVX-512 and no AMX multiply fp32 at 300 GFLOP/s and bf16 at 160."""

Heads = tuple[Tensor, Tensor, Tensor]
"""q, k, v: each [b, tokens, heads, head_dim]; q and k normed and rotated."""


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale)


def _rotated(x: Tensor, norm: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Norm and rotate [b, tokens, heads, head_dim].

    cos, sin: [tokens, 1, head_dim], see `_turns`.
    """
    x = _normed(x.contiguous(), norm)
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cos, swapped, sin)


def _normed(x: Tensor, norm: Tensor) -> Tensor:
    if not torch.compiler.is_compiling():
        return F.rms_norm(x, norm.shape, norm.to(x.dtype), eps=EPS)
    # Written out: on an H200 (torch 2.11) the compiled gradient of rms_norm, sizes left open, accessed illegal memory.
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype) * norm.to(x.dtype)


def _turns(rope: Rope) -> Rope:
    """Return tables for `x · cos + swapped(x) · sin`.

    rope: angles of adjacent pairs.
    """
    cos, sin = rope
    cos, sin = torch.stack((cos, cos), -1).flatten(-2), torch.stack((-sin, sin), -1).flatten(-2)
    return cos[:, None].to(PRODUCTS), sin[:, None].to(PRODUCTS)


def _heads(rows: Tensor, q_norm: Tensor, k_norm: Tensor, cos: Tensor, sin: Tensor) -> Heads:
    q, k, v = rows.unflatten(-1, (3, -1, q_norm.shape[0])).unbind(2)
    # A compiled piece expects gradients with the strides of its results, so none is a view.
    return _rotated(q, q_norm, cos, sin), _rotated(k, k_norm, cos, sin), v.contiguous()


def _double_in(
    x: Tensor, shift: Tensor, scale: Tensor, qkv: Tensor, q_norm: Tensor, k_norm: Tensor, cos: Tensor, sin: Tensor
) -> Heads:
    return _heads(F.linear(_modulate(x, shift, scale), qkv.to(PRODUCTS)), q_norm, k_norm, cos, sin)


def _double_out(
    x: Tensor, mixed: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, gate_mlp: Tensor, proj: Tensor, up: Tensor,
    down: Tensor
) -> Tensor:  # fmt: skip
    x = torch.addcmul(x, gate, F.linear(mixed, proj.to(PRODUCTS)))
    opening, value = F.linear(_modulate(x, shift, scale), up.to(PRODUCTS)).chunk(2, dim=-1)
    return torch.addcmul(x, gate_mlp, F.linear(F.silu(opening) * value, down.to(PRODUCTS)))


def _single_in(
    x: Tensor, shift: Tensor, scale: Tensor, linear1: Tensor, q_norm: Tensor, k_norm: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden = x.shape[-1]
    rows = F.linear(_modulate(x, shift, scale), linear1.to(PRODUCTS))
    qkv, opening, value = rows.split((3 * hidden, *[(rows.shape[-1] - 3 * hidden) // 2] * 2), dim=-1)
    q, k, v = _heads(qkv, q_norm, k_norm, cos, sin)
    return q, k, v, F.silu(opening) * value


def _single_out(x: Tensor, mixed: Tensor, mlp: Tensor, gate: Tensor, linear2: Tensor) -> Tensor:
    # One product of the joined inputs. Two products with parts of the matrix copy less, but their compiled gradient
    # had uninitialised numbers in it (torch 2.13, CPU).
    return torch.addcmul(x, gate, F.linear(torch.cat((mixed, mlp), dim=-1), linear2.to(PRODUCTS)))


class _CpuAttention(torch.autograd.Function):
    """Attention that keeps its weights for the backward pass.

    torch's own is slow in bf16 on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.softmax(q @ k.transpose(-1, -2), -1)
        ctx.save_for_backward(q, k, v, weights)
        return weights @ v

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (mixed,) = gradients
        q, k, v, weights = ctx.saved_tensors
        scores = torch._softmax_backward_data(mixed @ v.transpose(-1, -2), weights, -1, weights.dtype)
        return scores @ k, scores.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ mixed


BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Attention on CUDA, the fastest first; cuDNN's is left out."""


def leave_out_backends(count: int) -> None:
    """Do without the `count` fastest attention back ends."""
    del BACKENDS[:count]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention without a mask.

    [b, tokens, heads, head_dim] -> [b, tokens, heads · head_dim].
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.is_cuda:
        with sdpa_kernel(BACKENDS):
            mixed = F.scaled_dot_product_attention(q, k, v)
    else:
        mixed = _CpuAttention.apply(q * q.shape[-1] ** -0.5, k, v)
    return mixed.transpose(1, 2).flatten(2)  # type: ignore[union-attr] - apply is untyped


class _DenseGradient(torch.autograd.Function):
    """Identity whose gradient is contiguous, as compiled code expects it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].contiguous()


def _open_sizes(*tensors: Tensor) -> None:
    """Tell the compiler that batch and length vary."""
    for tensor in tensors:
        for dim in range(tensor.ndim - 1):
            if tensor.shape[dim] > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)


class TrainingVelocity:
    """Velocity of canvas tokens, equal to `Nano.velocity` but for rounding."""

    def __init__(self, nano: Nano, compiled: bool) -> None:
        self.nano = nano
        self.compiled = compiled
        torch._dynamo.config.cache_size_limit = 32
        self._pieces: dict[Callable, Callable] = {}
        self._ropes: dict[tuple, tuple[Rope, Rope | None]] = {}

    def _run(self, piece: Callable, *args: Tensor) -> Any:
        if not self.compiled:
            return piece(*args)
        if piece not in self._pieces:
            self._pieces[piece] = torch.compile(piece)
        _open_sizes(*(arg for arg in args if not isinstance(arg, nn.Parameter)))
        results = self._pieces[piece](*args)
        if isinstance(results, Tensor):
            return _DenseGradient.apply(results)
        return tuple(_DenseGradient.apply(result) for result in results)

    def _turned(self, length: int, grid: tuple[int, int], count: int) -> tuple[Rope, Rope | None]:
        key = (length, grid, count)
        if key not in self._ropes:
            rope, reference_rope = self.nano.rope(*key)
            self._ropes[key] = _turns(rope), _turns(reference_rope) if reference_rope else None
        return self._ropes[key]

    def __call__(
        self, noisy: Tensor, sigma: Tensor, states: Tensor, grid: tuple[int, int], references: Tensor | None = None
    ) -> Tensor:
        transformer = self.nano.transformer
        levels = noisy.shape[0] // states.shape[0]
        count = 0 if references is None else references.shape[1]
        rope, reference_rope = self._turned(states.shape[1], grid, count)
        kept: list[Any] = [None] * (len(transformer.double_blocks) + len(transformer.single_blocks))
        if references is not None and reference_rope is not None:
            tokens = _linear(references.flatten(1, 2), transformer.img_in)
            kept = self._prefill(transformer, tokens, reference_rope, levels)
        text = _linear(states, transformer.txt_in).repeat_interleave(levels, 0)
        image = _linear(noisy, transformer.img_in)
        mods = _as_products(transformer.modulations(sigma))
        for block, kv in zip(transformer.double_blocks, kept, strict=False):
            text, image = self._double(block, text, image, mods, rope, kv)  # type: ignore[arg-type] - a ModuleList
        x = torch.cat((text, image), dim=1)
        for block, kv in zip(transformer.single_blocks, kept[len(transformer.double_blocks) :], strict=True):
            x = self._single(block, x, mods.single, rope, kv)[0]  # type: ignore[arg-type] - a ModuleList
        shift, scale = mods.final
        x = _modulate(x[:, text.shape[1] :].contiguous(), shift, scale)
        return _linear(x, transformer.final_layer.linear).float()

    def _prefill(self, transformer: Transformer, x: Tensor, rope: Rope, levels: int) -> list[tuple[Tensor, Tensor]]:
        mods = _as_products(transformer.modulations(torch.zeros(x.shape[0], device=x.device)))
        kept = []
        for block in transformer.double_blocks:
            assert isinstance(block, DoubleBlock)
            shift, scale = mods.image[:2]
            q, k, v = self._stream_in(block.img_attn, x, shift, scale, rope)
            kept.append((k, v))
            x = self._stream_out(block.img_attn, block.img_mlp, x, attend(q, k, v), mods.image[2:])
        for block in transformer.single_blocks:
            x, k, v = self._single(block, x, mods.single, rope, None)  # type: ignore[arg-type] - a ModuleList
            kept.append((k, v))
        return [(k.repeat_interleave(levels, 0), v.repeat_interleave(levels, 0)) for k, v in kept]

    def _stream_in(self, attention: SelfAttention, x: Tensor, shift: Tensor, scale: Tensor, rope: Rope) -> Heads:
        norms = attention.norm.query_norm.scale, attention.norm.key_norm.scale
        return self._run(_double_in, x, shift, scale, attention.qkv.weight, *norms, *rope)

    def _stream_out(
        self, attention: SelfAttention, mlp: nn.Sequential, x: Tensor, mixed: Tensor, mods: Sequence[Tensor]
    ) -> Tensor:
        up, down = mlp.get_parameter("0.weight"), mlp.get_parameter("2.weight")
        return self._run(_double_out, x, mixed, *mods, attention.proj.weight, up, down)

    def _double(
        self, block: DoubleBlock, text: Tensor, image: Tensor, mods: Modulations, rope: Rope, kv: Any
    ) -> tuple[Tensor, Tensor]:
        length = text.shape[1]
        cos, sin = rope
        shift, scale, *text_mods = mods.text
        words = self._stream_in(block.txt_attn, text, shift, scale, (cos[:length], sin[:length]))
        shift, scale, *image_mods = mods.image
        # Copies: a compiled piece would be compiled anew for a table that begins inside another.
        of_canvas = cos[length:].clone(), sin[length:].clone()
        canvas = self._stream_in(block.img_attn, image, shift, scale, of_canvas)
        q = torch.cat((words[0], canvas[0]), dim=1)
        k, v = (torch.cat([words[i], canvas[i], *((kv[i - 1],) if kv else ())], dim=1) for i in (1, 2))
        mixed = attend(q, k, v)
        text = self._stream_out(block.txt_attn, block.txt_mlp, text, mixed[:, :length].contiguous(), text_mods)
        image = self._stream_out(block.img_attn, block.img_mlp, image, mixed[:, length:].contiguous(), image_mods)
        return text, image

    def _single(
        self, block: SingleBlock, x: Tensor, mods: tuple[Tensor, ...], rope: Rope, kv: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        shift, scale, gate = mods
        norms = block.norm.query_norm.scale, block.norm.key_norm.scale
        q, k, v, mlp = self._run(_single_in, x, shift, scale, block.linear1.weight, *norms, *rope)
        keys, values = (torch.cat((k, kv[0]), 1), torch.cat((v, kv[1]), 1)) if kv else (k, v)
        return self._run(_single_out, x, attend(q, keys, values), mlp, gate, block.linear2.weight), k, v


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return F.linear(x.to(PRODUCTS), layer.weight.to(PRODUCTS))


def _as_products(mods: Modulations) -> Modulations:
    parts = (mods.image, mods.text, mods.single, mods.final)
    return Modulations(*(tuple(part.to(PRODUCTS) for part in group) for group in parts))


def multiplies_bf16(device: torch.device) -> bool:
    """Return whether bf16 products are fast here: CUDA, or AMX."""
    return device.type == "cuda" or torch.cpu._is_amx_tile_supported()


def quiet() -> None:
    """Silence the compiler's hints, which are about other programs."""
    warnings.filterwarnings("ignore", message=".*TensorFloat32.*|.*lru_cache.*|.*Online softmax.*")
