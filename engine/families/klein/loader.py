"""From a checkpoint to networks that are ready: plan where the weights live, read them, change them by LoRAs."""

import hashlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from engine.checkpoints import quant
from engine.checkpoints.files.safetensors import Shape
from engine.checkpoints.loading import slots
from engine.checkpoints.quant import QuantLinear
from engine.contract import BadWeights, Fix, Loading, OutOfMemory
from engine.diffusion.canvas import GRID
from engine.families.klein import components, lora
from engine.families.klein.components import ComponentSpec
from engine.families.klein.lora import Lora, WeightDelta
from engine.families.klein.text_encoder import TextEncoder
from engine.families.klein.transformer import Transformer
from engine.families.klein.variants import VARIANTS, Variant
from engine.memory import plan
from engine.memory.device import Device, has_own_memory, host_memory
from engine.memory.offload import CpuEmbedding, OffloadRing, stream
from engine.memory.plan import ActivationMemory, MemoryInfo, PlacementPlan, WeightSizes
from engine.nn.autoencoder import Autoencoder
from engine.registry import Checkpoint

_EMBEDDING = "model.embed_tokens"


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to load. quant: format of the blocks, None for the file's. limit: bytes of the device that may be used."""

    quant: str | None = None
    loras: tuple[Lora, ...] = ()
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class Networks:
    """A model in memory. fingerprint: tells its weights from others. says: where they live."""

    transformer: Transformer
    autoencoder: Autoencoder
    text_encoder: TextEncoder
    fingerprint: str
    says: str


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model whose files are found to fit together and into memory, and of which nothing is read yet."""

    transformer: ComponentSpec[Transformer]
    text_encoder: ComponentSpec[TextEncoder]
    autoencoder: ComponentSpec[Autoencoder]
    changes: tuple[WeightDelta, ...]
    needs: WeightSizes
    plan: PlacementPlan

    @property
    def parts(self) -> tuple[ComponentSpec[Any], ...]:
        """In the order of use, so that a first prompt could be read before the transformer is there."""
        return self.text_encoder, self.transformer, self.autoencoder

    @property
    def bytes(self) -> int:
        """What will be read."""
        return sum(part.bytes for part in self.parts)


def prepare(
    checkpoint: Checkpoint, placement: Device, options: LoadOptions, held: int = 0, *, smaller: bool = False
) -> Prepared:
    """Look at the files and plan for a picture of the native size. held: bytes that will be given back first.

    smaller: where that does not fit, plan for a smaller one; a picture that is larger is refused when it is asked for.

    Raises BadWeights, InvalidJob, or OutOfMemory.
    """
    quant.check(options.quant)
    variant, device = checkpoint.variant, placement.device
    transformer = components.transformer(checkpoint.transformer, options.quant, device)
    text_encoder = components.text_encoder(checkpoint.text_encoder, variant.text_layers, device)
    autoencoder = components.autoencoder(checkpoint.vae)
    _match(transformer.module, text_encoder.module, autoencoder.module)
    changes = tuple(change for one in options.loras for change in lora.read(one, transformer.module))
    needs = _needs(variant, transformer, text_encoder, autoencoder, changes, placement.dtype)
    work = work_of(variant, transformer.module, autoencoder.module, placement.dtype)
    fewer = _alternatives(needs, transformer, options, placement)
    there, models = memory_info(placement, options.limit, held), _other_models(variant, placement)
    try:
        found = plan.plan(needs, there, work, fewer, models)
    except OutOfMemory:
        fitting = (plan.fits(needs, there, work.at(side)) for side in plan.SIDES if smaller and side < work.side)
        if (found := next(filter(None, fitting), None)) is None:
            raise
    return Prepared(transformer, text_encoder, autoencoder, changes, needs, found)


def load(checkpoint: Checkpoint, placement: Device, options: LoadOptions) -> Generator[Loading, None, Networks]:
    """Read a model, telling how far it is. Raises as `prepare`."""
    ready = prepare(checkpoint, placement, options, smaller=True)
    name, device, total = checkpoint.variant.name, placement.device, ready.bytes or 1
    done = 0
    yield Loading(name, 0.0)
    asleep = _asleep(ready)
    for part in ready.parts:
        for count in part.fill(placement, _home(device, asleep.get(part.what, frozenset()))):
            done += count
            yield Loading(name, min(1.0, done / total))
        part.module.eval().requires_grad_(False)
    ready.text_encoder.module.finish(device)
    lora.apply(ready.transformer.module, ready.changes)
    if any(asleep.values()):
        _let_sleep(ready, asleep, device)
    return Networks(
        transformer=ready.transformer.module,
        autoencoder=ready.autoencoder.module,
        text_encoder=ready.text_encoder.module,
        fingerprint=_fingerprint((ready.transformer, ready.text_encoder, ready.autoencoder), options),
        says=ready.plan.summary(ready.needs),
    )


def memory_info(placement: Device, limit: int | None = None, held: int = 0) -> MemoryInfo:
    """What is free now. held: bytes that count as free too."""
    free = placement.free_bytes() + placement.idle_bytes() + held
    return MemoryInfo(
        device=placement.label,
        free=free,
        total=placement.total_bytes(),
        host=placement.host_bytes(),
        limit=limit,
    )


def work_of(
    variant: Variant,
    transformer: Transformer,
    autoencoder: Autoencoder,
    dtype: torch.dtype,
    *,
    pixels: int | None = None,
    references: int | None = None,
) -> ActivationMemory:
    """Memory for one picture. pixels: of the canvas, else the native size. references: their pixels, else one such."""
    pixels = pixels or variant.native_size**2
    beside = (pixels if references is None else references) // GRID**2
    shape = transformer.shape
    needed = plan.working(
        hidden=shape.hidden,
        tokens=variant.text_length + pixels // GRID**2 + beside,
        pixels=pixels,
        decoder=autoencoder.shape.decoder[min(1, len(autoencoder.shape.decoder) - 1)],
        itemsize=dtype.itemsize,
        blocks=shape.double_blocks + shape.single_blocks if variant.kv else 0,
        references=beside,
    )
    return ActivationMemory(round(pixels**0.5), needed)


def _needs(
    variant: Variant,
    transformer: ComponentSpec[Transformer],
    text_encoder: ComponentSpec[TextEncoder],
    autoencoder: ComponentSpec[Autoencoder],
    changes: Sequence[WeightDelta],
    dtype: torch.dtype,
) -> WeightSizes:
    sizes = [_sizes(part.module, dtype) for part in (transformer, text_encoder, autoencoder)]
    blocks = tuple(sizes[0].pop(layer) for layer in transformer.layers)
    encoder = tuple(sizes[1].pop(layer) for layer in text_encoder.layers)
    embedding = sizes[1].pop(_EMBEDDING)
    beside = sum(
        dtype.itemsize * (change.up.numel() + change.down.numel())
        for change in changes
        if change.down is not None and isinstance(transformer.module.get_submodule(change.rows.layer), QuantLinear)
    )
    rest = beside + sum(size for part in sizes for size in part.values())
    return WeightSizes(variant.name, blocks, encoder, embedding, rest)


def _sizes(module: nn.Module, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of each submodule that holds tensors of its own."""
    found: dict[str, int] = {}
    for name, shape in slots(module).items():
        owner = name.rpartition(".")[0]
        layer = module.get_submodule(owner)
        size = (
            sum(buffer.nbytes for buffer in layer.buffers())
            if isinstance(layer, QuantLinear)
            else dtype.itemsize * torch.Size(shape).numel()
        )
        found[owner] = found.get(owner, 0) + size
    return found


def _alternatives(
    needs: WeightSizes, transformer: ComponentSpec[Transformer], options: LoadOptions, placement: Device
) -> list[tuple[Fix, WeightSizes]]:
    """Ways to load the model in fewer bits, and their sizes."""
    if (
        options.quant is not None
        or transformer.tensors.quantised
        or quant.target(None, "fp8", placement.device) is None
    ):
        return []
    values = [size // placement.dtype.itemsize for size in needs.blocks]
    fewer = {"fp8": [count + 4 for count in values], "nvfp4": [count // 2 + count // 16 + 4 for count in values]}
    return [
        (Fix("set", "quant", choices=(kind,)), replace(needs, blocks=tuple(sizes))) for kind, sizes in fewer.items()
    ]


def _other_models(variant: Variant, placement: Device) -> list[tuple[str, WeightSizes]]:
    """What smaller models of the same kind would take, by their rows: bf16, and 2 GB of them working memory."""
    rows = [
        row
        for row in VARIANTS.values()
        if row.repo and row.distilled == variant.distilled and row.memory_gb < variant.memory_gb
    ]
    bytes_per_gb = round(1e9) * placement.dtype.itemsize // 2
    return [(row.name, WeightSizes(row.name, (), (), 0, round((row.memory_gb - 2) * bytes_per_gb))) for row in rows]


def _asleep(ready: Prepared) -> dict[str, frozenset[str]]:
    """The layers that sleep, by part."""
    table = (_EMBEDDING,) if ready.plan.embedding_asleep else ()
    encoder, transformer = ready.text_encoder, ready.transformer
    return {
        transformer.what: frozenset(transformer.layers[ready.plan.blocks :]),
        encoder.what: frozenset((*encoder.layers[ready.plan.encoder :], *table)),
    }


def _home(device: torch.device, asleep: frozenset[str]) -> Any:
    def home(name: str, shape: Shape, dtype: torch.dtype) -> Tensor:
        layer = name.partition(":")[0].rpartition(".")[0]
        if layer in asleep:
            return host_memory(shape, dtype, device)
        return torch.empty(shape, dtype=dtype, device=device)

    return home


def _let_sleep(ready: Prepared, asleep: dict[str, frozenset[str]], device: torch.device) -> None:
    conveyor = OffloadRing(device)
    for part in (ready.text_encoder, ready.transformer):
        names = asleep[part.what]
        stream(part.module, tuple(name for name in part.layers if name in names), conveyor)
        if _EMBEDDING in names:
            table = part.module.get_submodule(_EMBEDDING)
            assert isinstance(table, nn.Embedding)
            part.module.set_submodule(_EMBEDDING, CpuEmbedding(table, device))


def held_bytes(networks: Sequence[nn.Module], device: torch.device) -> int:
    """Bytes of weights on the device; what sleeps in the host's memory counts only where that is the same."""
    tensors = (tensor for net in networks for tensor in (*net.parameters(), *net.buffers()))
    return sum(tensor.nbytes for tensor in tensors if not has_own_memory(device) or tensor.device.type == device.type)


def _fingerprint(read: tuple[ComponentSpec[Any], ...], options: LoadOptions) -> str:
    """By part, 16 letters each; what changes the weights on their way into memory changes the first."""
    prints = [part.tensors.fingerprint()[:16] for part in read]
    if options.quant or options.loras:
        own = ":".join((prints[0], options.quant or "", *(one.fingerprint() for one in options.loras)))
        prints[0] = hashlib.sha256(own.encode()).hexdigest()[:16]
    return "-".join(prints)


def _match(transformer: Transformer, text_encoder: TextEncoder, autoencoder: Autoencoder) -> None:
    """Refuse parts of different models."""
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
