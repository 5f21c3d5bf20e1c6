"""Memory needs of a klein: weights, activations, smaller choices."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from engine.checkpoints import quant
from engine.checkpoints.loading import param_shapes
from engine.checkpoints.narrow import NarrowLinear, held_dtype
from engine.checkpoints.quant import QuantLinear
from engine.contract import Fix, OutOfMemory
from engine.families.klein.components import ComponentSpec
from engine.families.klein.lora import WeightDelta
from engine.families.klein.text_encoder import TextEncoder
from engine.families.klein.transformer import Transformer
from engine.families.klein.variants import VARIANTS, Variant
from engine.memory import plan
from engine.memory.device import Device, has_own_memory
from engine.memory.plan import ActivationMemory, MemoryInfo, WeightSizes
from engine.nn.autoencoder import Autoencoder

EMBEDDING = "model.embed_tokens"
"""The text encoder's table, of which a prompt needs a few rows."""


def memory_info(device: Device, limit: int | None = None, held: int = 0) -> MemoryInfo:
    """Return the memory that is free now, with `held` bytes."""
    host = device.host_bytes()
    return MemoryInfo(
        device=device.label,
        free=device.free_bytes() + device.idle_bytes() + held,
        total=device.total_bytes(),
        host=host,
        limit=limit,
        integrated=device.is_cuda and host is None,
    )


def activation_memory(
    variant: Variant,
    transformer: Transformer,
    autoencoder: Autoencoder,
    dtype: torch.dtype,
    *,
    pixels: int | None = None,
    references: Sequence[int] | None = None,
) -> ActivationMemory:
    """Return the memory for one image.

    pixels: of the canvas, by default the native size. references: pixels of each, by default one of the canvas's size.
    """
    pixels = pixels or variant.native_size**2
    references = [pixels] if references is None else references
    token = variant.pixels_per_token**2
    reference_tokens = sum(references) // token
    shape = transformer.shape
    decoder = autoencoder.shape.decoder[min(1, len(autoencoder.shape.decoder) - 1)]
    whole, banded = (
        plan.working(
            hidden=shape.hidden,
            tokens=variant.text_length + pixels // token + reference_tokens,
            pixels=pixels,
            decoder=decoder,
            itemsize=dtype.itemsize,
            blocks=shape.double_blocks + shape.single_blocks if variant.kv else 0,
            references=reference_tokens,
            images=images,
            encoder=autoencoder.shape.encoder[0],
            encoded=max(references, default=0),
        )
        for images in (plan.DECODED_IMAGES, plan.BANDED_IMAGES)
    )
    # Observed: 0.5 GB at 1024² beyond what was counted, H200, bf16: one decoder-wide image.
    workspace = decoder * dtype.itemsize * pixels
    # Bands take less workspace also where the encoder or the transformer decides about the rest.
    return ActivationMemory(round(pixels**0.5), whole, workspace, banded)


def does_not_fit(
    size: tuple[int, int],
    references: int,
    device: str,
    free: int,
    work: Callable[[int], ActivationMemory],
    *,
    limited: bool,
) -> OutOfMemory:
    """Return the error for an image larger than `free` bytes.

    work: returns the memory for a canvas of so many pixels. limited: the user's limit is what leaves no more.
    """
    width, height = size
    least = work(width * height).least
    side = next((side for side in plan.SIDES if side**2 < width * height and work(side**2).least <= free), None)
    status = "allowed" if limited else "free"
    return OutOfMemory(
        f"{width}×{height} with {references} references takes {plan.gb(least)} besides the weights; {plan.gb(free)} of "
        f"the {device} are {status}.",
        hint=f"{side}×{side} would fit." if side else "Use fewer references, or end what else uses the device.",
    )


def weight_sizes(
    variant: Variant,
    transformer: ComponentSpec[Transformer],
    text_encoder: ComponentSpec[TextEncoder],
    autoencoder: ComponentSpec[Autoencoder],
    deltas: Sequence[WeightDelta],
    dtype: torch.dtype,
) -> WeightSizes:
    """Return the bytes of a model's weights in memory."""
    modules = (transformer.module, text_encoder.module, autoencoder.module)
    sizes = [layer_sizes(module, dtype) for module in modules]
    blocks = tuple(sizes[0].pop(layer) for layer in transformer.layers)
    encoder = tuple(sizes[1].pop(layer) for layer in text_encoder.layers)
    embedding = sizes[1].pop(EMBEDDING)
    side_branches = sum(_delta_bytes(transformer.module.get_submodule(d.rows.layer), d, dtype) for d in deltas)
    # One narrow matrix at a time is there in full width too.
    narrow = (layer for module in modules for layer in module.modules() if isinstance(layer, NarrowLinear))
    widest = dtype.itemsize * max((layer.weight.numel() for layer in narrow), default=0)
    rest = side_branches + widest + sum(size for part in sizes for size in part.values())
    return WeightSizes(variant.name, blocks, encoder, embedding, rest)


def _delta_bytes(layer: nn.Module, delta: WeightDelta, dtype: torch.dtype) -> int:
    """Return the bytes that a change adds to a layer."""
    if isinstance(layer, NarrowLinear) and not delta.is_factored:
        return (dtype.itemsize - layer.held.itemsize) * layer.weight.numel()
    return delta.branch_bytes(dtype.itemsize) if isinstance(layer, QuantLinear | NarrowLinear) else 0


def layer_sizes(module: nn.Module, dtype: torch.dtype) -> dict[str, int]:
    """Return the bytes of each submodule that holds tensors of its own."""
    found: dict[str, int] = {}
    for name, shape in param_shapes(module).items():
        owner = name.rpartition(".")[0]
        layer = module.get_submodule(owner)
        size = (
            sum(buffer.nbytes for buffer in layer.buffers())
            if isinstance(layer, QuantLinear)
            else held_dtype(layer, dtype).itemsize * torch.Size(shape).numel()
        )
        found[owner] = found.get(owner, 0) + size
    return found


def alternatives(
    sizes: WeightSizes, half: WeightSizes, transformer: ComponentSpec[Transformer], wanted: str | None, device: Device
) -> list[tuple[Fix, WeightSizes]]:
    """Return ways to load the model in fewer bits, and their sizes.

    half: its sizes in bf16, which is named last, since products in bf16 may be slow on this device.
    """
    found: list[tuple[Fix, WeightSizes]] = []
    if wanted is None and not transformer.tensors.quantised:
        layers = map(transformer.module.get_submodule, transformer.layers)
        # Every named layer is a linear one; get_submodule promises a Module only.
        weights = [math.prod(quant.shape_of(layer)) for layer in layers]  # type: ignore[arg-type]
        found = [
            (Fix("set", "quant", choices=(name,)), replace(sizes, blocks=tuple(map(scheme.bytes_for, weights))))
            for name, scheme in quant.MEMORY_SCHEMES.items()
            if quant.memory_scheme(None, name, device.device) is not None
        ]
    if half.all < 0.9 * sizes.all:
        found.append((Fix("set", "dtype", choices=("bfloat16",)), half))
    return found


def smaller_models(variant: Variant) -> list[tuple[str, WeightSizes]]:
    """Return smaller models of the same kind, and their sizes."""
    rows = [
        row
        for row in VARIANTS.values()
        if row.repo and row.distilled == variant.distilled and row.memory_gb < variant.memory_gb
    ]
    # The rows count weights of 16 bits, which they have in memory on every device, and 2 GB of working memory.
    return [(row.name, WeightSizes(row.name, (), (), 0, round((row.memory_gb - 2) * 1e9))) for row in rows]


def device_bytes(networks: Sequence[nn.Module], device: torch.device) -> int:
    """Return the bytes of weights on the device.

    Host memory counts only where it is the device's.
    """
    tensors = (tensor for net in networks for tensor in (*net.parameters(), *net.buffers()))
    return sum(tensor.nbytes for tensor in tensors if not has_own_memory(device) or tensor.device.type == device.type)
