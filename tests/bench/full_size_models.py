"""Full-size models with random weights, created on the device.

diffusers' modules share the memory of our weights.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinKVPipeline, Flux2KleinPipeline
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from engine.checkpoints.key_map import KeyMap
from engine.families.klein.compiler import CompileOptions
from engine.families.klein.key_maps import diffusers_autoencoder, diffusers_transformer
from engine.families.klein.loader import Networks
from engine.families.klein.operations import choose_operations
from engine.families.klein.pipeline import Klein
from engine.families.klein.text_encoder import Prompt, TextEncoder, Tokenizer
from engine.families.klein.transformer import Transformer, TransformerShape
from engine.families.klein.variants import VARIANTS, Variant
from engine.memory.cache import TensorCache
from engine.memory.device import Device
from engine.nn.autoencoder import Autoencoder, AutoencoderShape

REMEMBER = 16 << 30
"""Cache bytes of our engine on the device: four references' keys and values are 8.6 GB in the 9B, 5.0 GB in the 4B."""
WORDS = 0.125
"""Share of the text length that is prompt; the rest is padding. 64 of 512 tokens is a prompt of some 50 words."""


KLEIN_AUTOENCODER = AutoencoderShape()


@dataclass(frozen=True, slots=True)
class Giant:
    """All settings that determine shapes.

    encoder: Qwen3's config, all layers. large, small, reference: sides in pixels.
    """

    name: str
    variant: Variant
    transformer: TransformerShape
    encoder: dict[str, Any]
    autoencoder: AutoencoderShape = KLEIN_AUTOENCODER
    large: int = 1024
    small: int = 512
    reference: int = 1024

    def cut(self) -> "Giant":
        """Return the same widths with few layers.

        It is small enough for fp32 and deep enough for errors to accumulate.
        """
        variant = replace(self.variant, text_layers=(1, 2, 3))
        double, single = min(2, self.transformer.double_blocks), min(3, self.transformer.single_blocks)
        transformer = replace(self.transformer, double_blocks=double, single_blocks=single)
        encoder = {**self.encoder, "num_hidden_layers": 4}
        return replace(self, variant=variant, transformer=transformer, encoder=encoder)


# Source of the shapes: the published configs of FLUX.2 [klein] 4B and 9B, Qwen3-4B and Qwen3-8B.
_QWEN3: dict[str, Any] = {
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "max_position_embeddings": 40960,
}
_KLEIN_4B = TransformerShape(hidden=3072, head_dim=128, context=7680, double_blocks=5, single_blocks=20, mlp=9216)
_KLEIN_9B = TransformerShape(hidden=4096, head_dim=128, context=12288, double_blocks=8, single_blocks=24, mlp=12288)
_TOY = TransformerShape(
    hidden=96, head_dim=32, context=96, double_blocks=1, single_blocks=2, mlp=288, axes=(8, 8, 8, 8)
)

GIANTS = {
    giant.name: giant
    for giant in (
        Giant(
            name="4B",
            variant=VARIANTS["klein-4b"],
            transformer=_KLEIN_4B,
            encoder={**_QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
        ),
        Giant(
            name="9B",
            variant=VARIANTS["klein-9b"],
            transformer=_KLEIN_9B,
            encoder={**_QWEN3, "hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False},
        ),
        Giant(
            name="toy",
            variant=replace(VARIANTS["klein-4b"], text_length=24, text_layers=(1, 2, 3), reference_size=96),
            transformer=_TOY,
            encoder={
                **_QWEN3, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
                "vocab_size": 2048, "hidden_size": 32, "intermediate_size": 64, "tie_word_embeddings": True,
            },
            autoencoder=AutoencoderShape(encoder=(16,) * 4, decoder=(16,) * 4, layers=1, groups=8),
            large=80,
            small=64,
            reference=64,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Nets:
    """Our three networks."""

    transformer: Transformer
    autoencoder: Autoencoder
    text_encoder: TextEncoder

    def __iter__(self) -> Iterator[nn.Module]:
        return iter((self.text_encoder, self.transformer, self.autoencoder))


def device_of(giant: Giant) -> Device:
    """Return the best device in its own number format, the CPU in fp32 for the toy."""
    return Device.choose("cpu", "float32") if giant.name == "toy" else Device.choose()


def empty(giant: Giant, dtype: torch.dtype) -> Nets:
    """Create the networks on the meta device, without weights."""
    with torch.device("meta"):
        nets = Nets(
            Transformer(giant.transformer),
            Autoencoder(giant.autoencoder),
            TextEncoder(giant.encoder, giant.variant.text_layers),
        )
    for net in nets:
        net.to(dtype).eval().requires_grad_(False)
    return nets


def grown(giant: Giant, placement: Device, seed: int = 0) -> Nets:
    """Create the networks with random weights, drawn on the device."""
    nets = empty(giant, placement.dtype)
    generator = torch.Generator(placement.device).manual_seed(seed)
    for net in nets:
        net.to_empty(device=placement.device)
        for name, tensor in chain(net.named_parameters(), net.named_buffers()):
            _draw(name, tensor, generator)
    nets.text_encoder.finish(placement.device)
    return nets


def _draw(name: str, tensor: Tensor, generator: torch.Generator) -> None:
    """Draw random weights whose outputs stay finite and non-zero.

    Zeros and NaN would change the speed of matrix products.
    """
    if name.endswith("running_var"):
        tensor.uniform_(0.5, 2.0, generator=generator)
    elif tensor.ndim > 1:
        fan_in = tensor.numel() // tensor.shape[0]
        tensor.normal_(0.0, fan_in**-0.5, generator=generator)
    elif "norm" in name and name.endswith(("weight", "scale")):
        # Twice the scale: attention then selects tokens instead of averaging them all.
        tensor.normal_(2.0 if "query_norm" in name or "key_norm" in name else 1.0, 0.1, generator=generator)
    else:
        tensor.normal_(0.0, 0.1, generator=generator)


def cast(nets: Nets, giant: Giant, placement: Device) -> Nets:
    """Convert the weights to another number format."""
    other = empty(giant, placement.dtype)
    for ours, theirs in zip(nets, other, strict=True):
        weights = {name: tensor.to(placement.dtype) for name, tensor in ours.state_dict().items()}
        theirs.load_state_dict(weights, assign=True)
        theirs.requires_grad_(False)
    other.text_encoder.finish(placement.device)
    return other


def ours(
    nets: Nets,
    giant: Giant,
    placement: Device,
    *,
    kv: bool = False,
    remember: int = REMEMBER,
    options: CompileOptions | None = None,
) -> Klein:
    """Create the engine's model from these networks.

    kv: treat it as a KV model. Speed does not depend on training.
    """
    variant = replace(giant.variant, kv=kv)
    tokenizer = FixedTokenizer(variant.text_length, giant.encoder["vocab_size"])
    networks = Networks(nets.transformer, nets.autoencoder, nets.text_encoder, fingerprint="random", placement="")
    attention = choose_operations(variant, nets.transformer, placement)
    cache = TensorCache(remember)
    return Klein(variant, networks, tokenizer, placement, cache, compile_options=options, attention=attention)


def diffusers(nets: Nets, giant: Giant, placement: Device, *, kv: bool = False, beside: Any = None) -> Any:
    """Create diffusers' pipeline with views of our weights.

    Its additional text layers have their own weights. beside: another such pipeline, whose text encoder is reused.
    """
    kind = Flux2KleinKVPipeline if kv else Flux2KleinPipeline
    pipe: Any = kind(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_autoencoder(nets.autoencoder, giant),
        text_encoder=beside.text_encoder if beside else _text_encoder(nets.text_encoder, giant, placement),
        tokenizer=_Tokens(giant.encoder["vocab_size"]),  # type: ignore[arg-type]
        transformer=_transformer(nets.transformer, giant),
        is_distilled=True,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _transformer(net: Transformer, giant: Giant) -> Any:
    shape = giant.transformer
    with torch.device("meta"):
        theirs = Flux2Transformer2DModel(
            in_channels=shape.channels,
            num_layers=shape.double_blocks,
            num_single_layers=shape.single_blocks,
            attention_head_dim=shape.head_dim,
            num_attention_heads=shape.hidden // shape.head_dim,
            joint_attention_dim=shape.context,
            timestep_guidance_channels=shape.time_channels,
            mlp_ratio=shape.mlp / shape.hidden,
            axes_dims_rope=shape.axes,
            rope_theta=int(shape.theta),
            guidance_embeds=False,
        )
    views = _views(net, diffusers_transformer(max(shape.double_blocks, shape.single_blocks)))
    return _filled(theirs, views)


def _autoencoder(net: Autoencoder, giant: Giant) -> Any:
    shape = giant.autoencoder
    with torch.device("meta"):
        theirs = AutoencoderKLFlux2(
            block_out_channels=shape.encoder,
            down_block_types=("DownEncoderBlock2D",) * len(shape.encoder),
            up_block_types=("UpDecoderBlock2D",) * len(shape.decoder),
            layers_per_block=shape.layers,
            latent_channels=shape.latent,
            norm_num_groups=shape.groups,
        )
    views = _views(net, diffusers_autoencoder(len(shape.encoder), shape.layers + 1))
    return _filled(theirs, {**views, "bn.num_batches_tracked": torch.tensor(0)})


def _text_encoder(net: TextEncoder, giant: Giant, placement: Device) -> Any:
    """Create diffusers' text encoder, with all layers and the head.

    Ours does not need them, but diffusers runs them.
    """
    config = Qwen3Config(**giant.encoder)
    with torch.device("meta"):
        theirs = Qwen3ForCausalLM(config).to(placement.dtype)  # type: ignore[arg-type]
    weights = net.state_dict()
    generator = torch.Generator(placement.device).manual_seed(1)
    for name, tensor in theirs.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            weights[name] = weights["model.embed_tokens.weight"]
        elif name not in weights:
            weights[name] = torch.empty_like(tensor, device=placement.device)
            _draw(name, weights[name], generator)
    _filled(theirs, weights)
    theirs.model.rotary_emb = Qwen3RotaryEmbedding(config=config).to(placement.device)
    return theirs


def _views(net: nn.Module, table: KeyMap) -> dict[str, Tensor]:
    """Return our weights under the names of a published layout.

    They are row ranges of ours, not copies, except for swapped halves.
    """
    found = {}
    weights = net.state_dict()
    for their, place in table.items():
        if place.name in weights:
            rows = weights[place.name].tensor_split(place.parts)[place.part]
            found[their] = torch.cat(tuple(reversed(rows.chunk(2)))) if place.swap else rows
    return found


def _filled(module: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """Load weights strictly.

    With a missing weight, two different models would be compared.
    """
    names = module.state_dict().keys()
    module.load_state_dict({name: weight for name, weight in weights.items() if name in names}, assign=True)
    return module.eval().requires_grad_(False)


PARTS = ("blocks", "encoder", "decoder")
"""Parts of diffusers' pipeline that are compiled."""


def compiled(nets: Nets, giant: Giant, placement: Device, backend: str, *, beside: Any = None) -> Any:
    """Compile a pipeline as diffusers' documentation advises.

    The repeated blocks are compiled, and the autoencoder is channels-last. Each shape is compiled separately: faster
    than one program for all, and slow only before timing starts.
    """
    return compile_parts(diffusers(nets, giant, placement, beside=beside), backend)


def compile_parts(pipe: Any, backend: str, parts: Sequence[str] = PARTS) -> Any:
    """Compile parts of a pipeline in place, for each shape separately."""
    options = {"fullgraph": True, "dynamic": False, "backend": backend}
    pipe.vae.to(memory_format=torch.channels_last)
    if "blocks" in parts:
        pipe.transformer.compile_repeated_blocks(**options)
    for part in {"encoder", "decoder"} & set(parts):
        getattr(pipe.vae, part).compile(**options)
    return pipe


def weight_bytes(*modules: nn.Module) -> int:
    """Return the bytes of the modules' weights, with shared tensors counted once."""
    tensors = chain.from_iterable((*module.parameters(), *module.buffers()) for module in modules)
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


class FixedTokenizer(Tokenizer):
    """Tokenizer that derives ids from the prompt without a vocabulary."""

    def __init__(self, length: int, vocabulary: int) -> None:
        self.length = length
        self.vocabulary = vocabulary

    def __call__(self, prompt: str) -> Prompt:
        return Prompt(*_ids(prompt, self.length, self.vocabulary), cut=0)


class _Tokens:
    """The same ids behind the interface that diffusers expects."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return messages[0]["content"]

    def __call__(self, text: str, *, max_length: int, **_: Any) -> dict[str, Tensor]:
        ids, mask = _ids(text, max_length, self.vocabulary)
        return {"input_ids": ids, "attention_mask": mask}


def _ids(prompt: str, length: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Return ids and mask, [1, length], always the same for a prompt."""
    count = max(1, int(WORDS * length))
    ids = np.zeros((1, length), np.int64)
    ids[0, :count] = np.random.default_rng(list(prompt.encode())).integers(1, vocabulary, count)
    return torch.from_numpy(ids), (torch.arange(length) < count).long()[None]


@contextmanager
def finite(klein: Klein) -> Iterator[None]:
    """Check in this context that all network outputs are finite.

    NaN would run fast and still give an image.
    """

    def look(net: nn.Module, _: object, out: Tensor) -> None:
        assert torch.isfinite(out).all(), f"{type(net).__name__} gave numbers that are not finite"

    nets = (klein.text_encoder, klein.transformer, klein.autoencoder.encoder, klein.autoencoder.decoder)
    hooks = [net.register_forward_hook(look) for net in nets]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
