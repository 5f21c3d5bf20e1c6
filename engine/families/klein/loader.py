"""Load a checkpoint: plan the placement, read the weights, apply LoRAs."""

import hashlib
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine.checkpoints import quant
from engine.checkpoints.files import Shape
from engine.checkpoints.loading import Allocator
from engine.contract import BadWeights, Loading, OutOfMemory
from engine.families.klein import components, footprint, lora
from engine.families.klein.checkpoint import Checkpoint
from engine.families.klein.components import ComponentSpec, QuantPolicy
from engine.families.klein.footprint import EMBEDDING
from engine.families.klein.lora import Lora, WeightDelta
from engine.families.klein.text_encoder import TextEncoder
from engine.families.klein.transformer import Transformer
from engine.families.klein.variants import Variant
from engine.memory import plan
from engine.memory.arena import ALIGN, HostArena, aligned
from engine.memory.device import DTYPES, Device
from engine.memory.layout import arrange_for_cpu
from engine.memory.offload import CpuEmbedding, OffloadRing, stream
from engine.memory.plan import PlacementPlan, WeightSizes
from engine.nn.autoencoder import Autoencoder


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """Options of loading.

    quant: scheme of the blocks, None for the file's. limit: bytes of the device that may be used.
    """

    quant: str | None = None
    loras: tuple[Lora, ...] = ()
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class Networks:
    """A model in memory.

    fingerprint: tells its weights from others. placement: where they are, in words. warnings: for every result.
    banded: images are decoded in bands.
    """

    transformer: Transformer
    autoencoder: Autoencoder
    text_encoder: TextEncoder
    fingerprint: str
    placement: str
    warnings: tuple[str, ...] = ()
    banded: bool = False


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model that is complete and fits into memory, not yet read.

    warnings: what of the LoRAs is not applied.
    """

    transformer: ComponentSpec[Transformer]
    text_encoder: ComponentSpec[TextEncoder]
    autoencoder: ComponentSpec[Autoencoder]
    deltas: tuple[WeightDelta, ...]
    needs: WeightSizes
    plan: PlacementPlan
    warnings: tuple[str, ...] = ()

    @property
    def components(self) -> tuple[ComponentSpec[Any], ...]:
        """The components in the order of use."""
        return self.text_encoder, self.transformer, self.autoencoder

    @property
    def bytes(self) -> int:
        """Bytes that will be read."""
        return sum(part.bytes for part in self.components)

    @property
    def is_resident(self) -> bool:
        """Whether all of the transformer stays on the device."""
        return self.plan.blocks == len(self.needs.blocks)


def prepare(
    checkpoint: Checkpoint, device: Device, options: LoadOptions, held: int = 0, *, smaller: bool = False
) -> Prepared:
    """Verify the files and plan for an image of the native size.

    held: bytes that will be given back first. smaller: where that does not fit, plan for a smaller image; a larger
    one is refused when it is asked for. Layers in a scheme that cannot be computed with are widened to the model's
    dtype where all of them then fit, and to fp8 otherwise.
    Raises BadWeights, InvalidJob, or OutOfMemory.
    """
    quant.check(options.quant)
    try:
        prepared = _prepare(checkpoint, device, options, held, smaller=smaller, compact=False)
        if prepared.is_resident or not _has_widened(prepared):
            return prepared
    except _DoesNotFit as error:
        if not error.widened:
            raise
    return _prepare(checkpoint, device, options, held, smaller=smaller, compact=True)


class _DoesNotFit(OutOfMemory):
    """A model that does not fit.

    widened: whether holding some layers in fewer bits could help.
    """

    def __init__(self, error: OutOfMemory, *, widened: bool) -> None:
        super().__init__(error.message, hint=error.hint, fix=error.fix)
        self.widened = widened


def _prepare(
    checkpoint: Checkpoint, device: Device, options: LoadOptions, held: int, *, smaller: bool, compact: bool
) -> Prepared:
    variant = checkpoint.variant
    narrow = device.narrows
    policy = QuantPolicy(options.quant, compact=compact, narrow=narrow)
    transformer = components.transformer(checkpoint.transformer, policy, device.device)
    text_encoder = components.text_encoder(
        checkpoint.text_encoder, variant.text_layers, device.device, compact=compact, narrow=narrow
    )
    autoencoder = components.autoencoder(checkpoint.vae)
    _check_match(variant, transformer.module, text_encoder.module, autoencoder.module)
    for part in (transformer, text_encoder, autoencoder):
        part.verify()
    loras = [lora.read(one, transformer.module) for one in options.loras]
    deltas = tuple(delta for one in loras for delta in one.deltas)
    sizes = (variant, transformer, text_encoder, autoencoder, deltas)
    needs = footprint.weight_sizes(*sizes, device.dtype)
    half = footprint.weight_sizes(*sizes, DTYPES["bfloat16"])
    work = footprint.activation_memory(variant, transformer.module, autoencoder.module, device.dtype)
    fewer = footprint.alternatives(needs, half, transformer, options.quant, device)
    free, models = footprint.memory_info(device, options.limit, held), footprint.smaller_models(variant)
    try:
        found = plan.plan(needs, free, work, fewer, models)
    except OutOfMemory as error:
        fitting = (plan.fits(needs, free, work.at(side)) for side in plan.SIDES if smaller and side < work.side)
        if (found := next(filter(None, fitting), None)) is None:
            widened = (transformer.widened and options.quant is None) or text_encoder.widened
            raise _DoesNotFit(error, widened=widened and not compact) from None
    warnings = tuple(warning for one in loras for warning in one.warnings)
    return Prepared(transformer, text_encoder, autoencoder, deltas, needs, found, warnings)


def _has_widened(prepared: Prepared) -> bool:
    return prepared.transformer.widened or prepared.text_encoder.widened


def load(checkpoint: Checkpoint, device: Device, options: LoadOptions) -> Generator[Loading, None, Networks]:
    """Read a model, with progress events. Raises as `prepare`."""
    prepared = prepare(checkpoint, device, options, smaller=True)
    name, total = checkpoint.variant.name, prepared.bytes or 1
    done = 0
    yield Loading(name, 0.0)
    offloaded = _offloaded(prepared)
    arena = HostArena(_offloaded_bytes(prepared, offloaded, device.dtype), device.device)
    for part in prepared.components:
        for count in part.load(device, _allocator(device.device, offloaded.get(part.what, frozenset()), arena)):
            done += count
            yield Loading(name, min(1.0, done / total))
        part.module.eval().requires_grad_(False)
    prepared.text_encoder.module.finish(device.device)
    lora.apply(prepared.transformer.module, prepared.deltas)
    if device.is_cpu:
        for part in prepared.components:
            arrange_for_cpu(part.module)
    if any(offloaded.values()):
        arena.lock()
        _offload(prepared, offloaded, device, arena)
    return Networks(
        transformer=prepared.transformer.module,
        autoencoder=prepared.autoencoder.module,
        text_encoder=prepared.text_encoder.module,
        fingerprint=_fingerprint((prepared.transformer, prepared.text_encoder, prepared.autoencoder), options),
        placement=prepared.plan.summary(prepared.needs),
        warnings=prepared.warnings,
        banded=prepared.plan.banded,
    )


def _offloaded(prepared: Prepared) -> dict[str, frozenset[str]]:
    """Return the layers that the plan keeps in host memory, by component."""
    table = (EMBEDDING,) if prepared.plan.embedding_on_cpu else ()
    encoder, transformer = prepared.text_encoder, prepared.transformer
    return {
        transformer.what: frozenset(transformer.layers[prepared.plan.blocks :]),
        encoder.what: frozenset((*encoder.layers[prepared.plan.encoder :], *table)),
    }


def _offloaded_bytes(prepared: Prepared, offloaded: dict[str, frozenset[str]], dtype: torch.dtype) -> int:
    """Return the bytes of host memory that the offloaded layers take."""
    total = 0
    for part in prepared.components:
        names = offloaded.get(part.what, frozenset())
        sizes = footprint.layer_sizes(part.module, dtype)
        # Up to four tensors a layer, each of which begins at an aligned place; a file's own scales may be more.
        total += sum(aligned(sizes[name]) + 4 * ALIGN for name in names)
    return total


def _allocator(device: torch.device, offloaded: frozenset[str], arena: HostArena) -> Allocator:
    def allocate(name: str, shape: Shape, dtype: torch.dtype) -> Tensor:
        layer = name.partition(":")[0].rpartition(".")[0]
        if layer in offloaded:
            return arena.take(shape, dtype)
        return torch.empty(shape, dtype=dtype, device=device)

    return allocate


def _offload(prepared: Prepared, offloaded: dict[str, frozenset[str]], device: Device, arena: HostArena) -> None:
    ring = OffloadRing(device.device, arena)
    for part in (prepared.text_encoder, prepared.transformer):
        names = offloaded[part.what]
        stream(part.module, tuple(name for name in part.layers if name in names), ring)
        if EMBEDDING in names:
            table = part.module.get_submodule(EMBEDDING)
            assert isinstance(table, nn.Embedding)
            part.module.set_submodule(EMBEDDING, CpuEmbedding(table, device.device, device.dtype))


def _fingerprint(read: tuple[ComponentSpec[Any], ...], options: LoadOptions) -> str:
    """Return 16 hex digits per component.

    Quantisation and LoRAs alter the first.
    """
    prints = [part.tensors.fingerprint()[:16] for part in read]
    if options.quant or options.loras:
        own = ":".join((prints[0], options.quant or "", *(one.fingerprint() for one in options.loras)))
        prints[0] = hashlib.sha256(own.encode()).hexdigest()[:16]
    return "-".join(prints)


def _check_match(
    variant: Variant, transformer: Transformer, text_encoder: TextEncoder, autoencoder: Autoencoder
) -> None:
    """Raise BadWeights for components of different models."""
    if text_encoder.width != transformer.shape.context:
        raise BadWeights(
            f"The text encoder gives {text_encoder.width} numbers a token, the transformer reads "
            f"{transformer.shape.context}: they belong to different models.",
            hint="klein 4B goes with Qwen3-4B, klein 9B with Qwen3-8B.",
        )
    if 4 * autoencoder.shape.latent != transformer.shape.channels:
        raise BadWeights(
            f"The autoencoder has {4 * autoencoder.shape.latent} channels, the transformer "
            f"{transformer.shape.channels}: they belong to different models."
        )
    # Its latents may have as many channels, and would be decoded to an image of another size.
    if (own := autoencoder.shape.pixels_per_token) != (wanted := variant.pixels_per_token):
        raise BadWeights(
            f"A token of the autoencoder is {own}×{own} pixels, one of {variant.name} {wanted}×{wanted}: they belong "
            "to different models."
        )
