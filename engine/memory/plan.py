"""Placement of weights: which stay on the device and which are offloaded.

A pure function from sizes to a plan. It refuses before loading, with numbers and the nearest thing that would fit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.contract import Fix, OutOfMemory

RESERVE = 500_000_000
"""Bytes of a device left free for workspaces of its libraries and fragmentation of its allocator. Chosen, not measured;
with it, planned peaks are 0.05 GB under to 0.11 over those allocated on an H200 (tests/engine/test_memory.py)."""

CONTEXT = 820_000_000
"""Bytes of a GPU that a process takes beside torch's own memory. Observed at the peak of an image within 8 and 6 GB:
0.82 GB, of which 0.65 are there before anything is computed (H200, torch 2.11). With 0.60 a limit of 6 GB was passed by
3.5 %."""

SIDES = (1024, 768, 512, 256)
"""Sides in pixels of the squares to try where the requested size does not fit."""

TRANSFORMER_ROWS = 21
"""Hidden-wide rows a token in memory while the transformer runs. Counted on the meta device at the real shapes
(tests/engine/test_memory.py): 16.9 to 20.6, most for the largest canvas."""

DECODED_IMAGES = 3
"""Decoder-wide images in memory while it decodes. Counted like them: 3, and 2 bytes a pixel (see PIXEL_BYTES)."""

BANDED_IMAGES = 2.4
"""Decoder-wide images in memory when it decodes in bands. Counted on the meta device (tests/engine/test_bands.py)."""

ENCODED_IMAGES = 5
"""Encoder-wide images in memory while a reference is encoded. Counted like them: 5, and 6 bytes a pixel."""

PIXEL_BYTES = 16
"""Bytes a pixel for the image itself beside the autoencoder's layers. Chosen, not measured; at most 6 were counted."""

BANDED_WORKSPACE = 1 / 4
"""Share of a convolution's workspace that bands need. Chosen, not measured: a workspace has the size of its input, of
which a band is an eighth."""

SLOTS = 2
"""Slots of the ring of offloaded layers: one computes while the next is copied."""


@dataclass(frozen=True, slots=True)
class WeightSizes:
    """Sizes in bytes of a model's weights in memory.

    blocks, encoder: of each linear layer in the blocks of the transformer and of the text encoder, in order of use;
    these can be offloaded. rest: all others. embedding: the encoder's table, of which a prompt needs a few rows.
    """

    name: str
    blocks: tuple[int, ...]
    encoder: tuple[int, ...]
    embedding: int
    rest: int

    @property
    def all(self) -> int:
        return sum(self.blocks) + sum(self.encoder) + self.embedding + self.rest


@dataclass(frozen=True, slots=True)
class MemoryInfo:
    """Memory that is free now, in bytes.

    total: of the device, used or free. host: free in host memory, None where the device computes in it.
    limit: set by the user, None without one. integrated: it is a GPU that computes in host memory.
    """

    device: str
    free: int
    total: int
    host: int | None = None
    limit: int | None = None
    integrated: bool = False

    @property
    def is_gpu(self) -> bool:
        """Whether the device is a GPU, with context and workspaces."""
        return self.integrated or self.host is not None

    @property
    def usable(self) -> int:
        """Bytes for weights and activations.

        On a GPU, the driver's context is subtracted from a limit.
        """
        return self.free if self.limit is None else min(self.free, max(0, self.limit - self.context))

    @property
    def context(self) -> int:
        """Bytes of a limit that the driver's context takes."""
        return CONTEXT if self.is_gpu else 0


@dataclass(frozen=True, slots=True)
class ActivationMemory:
    """Memory of one image besides weights.

    side: of the square image it is planned for, in pixels. banded: bytes if it is decoded in bands, 0 where that takes
    no less.
    """

    side: int
    bytes: int
    workspace: int = 0
    banded: int = 0

    def on(self, memory: MemoryInfo) -> int:
        """Return the bytes on this device.

        On a GPU, convolutions also need a workspace.
        """
        return self.bytes + (self.workspace if memory.is_gpu else 0)

    @property
    def least(self) -> int:
        """Bytes of the way that takes the least."""
        return self.banded or self.bytes

    def in_bands(self) -> "ActivationMemory | None":
        """Return the memory when decoding in bands, None without a gain."""
        workspace = int(self.workspace * BANDED_WORKSPACE)
        return replace(self, bytes=self.banded, workspace=workspace, banded=0) if self.banded else None

    def at(self, side: int) -> "ActivationMemory":
        """Scale to a smaller square, in proportion to the area."""
        sizes = (self.bytes, self.workspace, self.banded)
        return ActivationMemory(side, *(size * side**2 // self.side**2 for size in sizes))


@dataclass(frozen=True, slots=True)
class PlacementPlan:
    """Placement of weights on the device and in host memory.

    blocks, encoder: number of first layers that stay on the device. The others are offloaded.
    embedding_on_cpu: the table stays in host memory. peak: bytes on the device while an image is generated.
    offloaded_bytes: bytes in host memory. banded: images are decoded in bands.
    """

    blocks: int
    encoder: int
    embedding_on_cpu: bool
    peak: int
    offloaded_bytes: int
    banded: bool = False

    def summary(self, needs: WeightSizes) -> str:
        """Describe the placement in words."""
        streamed = [
            f"{what} {resident} of {total} layers"
            for what, resident, total in (
                ("transformer", self.blocks, len(needs.blocks)),
                ("text encoder", self.encoder, len(needs.encoder)),
            )
            if resident < total
        ]
        where = f"on the device: {', '.join(streamed)}; the rest streams" if streamed else "all on the device"
        bands = "; decodes in bands" if self.banded else ""
        return f"{where}{bands}; {gb(self.peak)} at the peak"


def working(
    *,
    hidden: int,
    tokens: int,
    pixels: int,
    decoder: int,
    itemsize: int,
    blocks: int = 0,
    references: int = 0,
    images: float = DECODED_IMAGES,
    encoder: int = 0,
    encoded: int = 0,
) -> int:
    """Return the bytes besides weights while an image is generated.

    The largest of transformer, decoder and encoder counts.

    tokens: text, canvas and references together. decoder: its width at full size. blocks, references: keys and
    values of so many reference tokens are cached in so many blocks. images: decoder-wide ones in memory, fewer when
    it decodes in bands. encoder: its width at full size. encoded: pixels of the largest reference.
    """
    kept = 2 * blocks * references * hidden * itemsize
    return kept + max(
        TRANSFORMER_ROWS * hidden * itemsize * tokens,
        round(images * decoder * itemsize * pixels) + PIXEL_BYTES * pixels,
        ENCODED_IMAGES * encoder * itemsize * encoded + PIXEL_BYTES * encoded,
    )


def plan(
    needs: WeightSizes,
    memory: MemoryInfo,
    work: ActivationMemory,
    alternatives: Sequence[tuple[Fix, WeightSizes]] = (),
    models: Sequence[tuple[str, WeightSizes]] = (),
) -> PlacementPlan:
    """Return the fastest plan that fits.

    The order: all on the device, the encoder offloaded, or also as few blocks as possible.
    alternatives: (fix, needs) of ways to load the model with less memory, in order of preference. The error names the
    first that fits. models: (name, needs) of other models, named if no alternative fits.
    Raises OutOfMemory.
    """
    found = fits(needs, memory, work)
    if found is not None:
        return found
    least = _minimum_bytes(needs, memory, work)
    hint, fix = _nearest(needs, memory, work, alternatives, models)
    raise OutOfMemory(
        f"{needs.name} needs {gb(least)} of the {memory.device} for {work.side}×{work.side}; {_describe_free(memory)}",
        hint=hint,
        fix=fix,
    )


def fits(needs: WeightSizes, memory: MemoryInfo, work: ActivationMemory) -> PlacementPlan | None:
    """Return the fastest plan that fits, or None.

    Decoding in bands is slower than an encoder that streams, and faster than blocks that do.
    """
    whole, in_bands = _fits(needs, memory, work), work.in_bands()
    if in_bands is None or (whole is not None and whole.blocks == len(needs.blocks)):
        return whole
    banded = _fits(needs, memory, in_bands)
    if banded is None or (whole is not None and banded.blocks < len(needs.blocks)):
        return whole
    return replace(banded, banded=True)


def _fits(needs: WeightSizes, memory: MemoryInfo, work: ActivationMemory) -> PlacementPlan | None:
    fixed = needs.rest + work.on(memory) + RESERVE
    if memory.host is None:
        peak = needs.all + work.on(memory) + RESERVE
        return PlacementPlan(len(needs.blocks), len(needs.encoder), False, peak, 0) if peak <= memory.usable else None
    blocks, encoder = sum(needs.blocks), sum(needs.encoder)
    # The table is always offloaded: a prompt looks up 512 rows of 150,000.
    if fixed + blocks + encoder <= memory.usable:
        return _if_host_fits(
            PlacementPlan(len(needs.blocks), len(needs.encoder), True, fixed + blocks + encoder, needs.embedding),
            memory,
        )
    ring = SLOTS * max((*needs.encoder, 0))
    if fixed + blocks + ring <= memory.usable:
        return _if_host_fits(
            PlacementPlan(len(needs.blocks), 0, True, fixed + blocks + ring, needs.embedding + encoder), memory
        )
    ring = SLOTS * max((*needs.encoder, *needs.blocks, 0))
    resident = _resident_layers(needs.blocks, memory.usable - fixed - ring)
    if resident is None:
        return None
    resident_bytes = sum(needs.blocks[:resident])
    offloaded_bytes = needs.embedding + encoder + blocks - resident_bytes
    return _if_host_fits(PlacementPlan(resident, 0, True, fixed + ring + resident_bytes, offloaded_bytes), memory)


def _if_host_fits(found: PlacementPlan, memory: MemoryInfo) -> PlacementPlan | None:
    """Return the plan if its offloaded weights fit into host memory."""
    return found if memory.host is not None and found.offloaded_bytes <= memory.host else None


def _resident_layers(layers: Sequence[int], free: int) -> int | None:
    """Count the first layers that fit, None if `free` is negative."""
    if free < 0:
        return None
    for count, size in enumerate(layers):
        free -= size
        if free < 0:
            return count
    return len(layers)


def _minimum_bytes(needs: WeightSizes, memory: MemoryInfo, work: ActivationMemory) -> int:
    """Return the least device memory any plan needs."""
    work = work.in_bands() or work
    if memory.host is None:
        return needs.all + work.on(memory) + RESERVE
    return needs.rest + work.on(memory) + RESERVE + SLOTS * max((*needs.encoder, *needs.blocks, 0))


def _describe_free(memory: MemoryInfo) -> str:
    """Describe the free memory and the cause of its shortage.

    That is the user's own limit, or other programs that hold much of the device.
    """
    if memory.usable < memory.free:
        return f"the memory limit is {gb(memory.limit or 0)}."
    others = f" Other programs hold {gb(memory.total - memory.free)}." if _is_shared(memory) else ""
    return f"{gb(memory.free)} of {gb(memory.total)} are free.{others}"


def _is_shared(memory: MemoryInfo) -> bool:
    return memory.host is not None and memory.total - memory.free > memory.total // 4


def _nearest(
    needs: WeightSizes,
    memory: MemoryInfo,
    work: ActivationMemory,
    alternatives: Sequence[tuple[Fix, WeightSizes]],
    models: Sequence[tuple[str, WeightSizes]],
) -> tuple[str, Fix | None]:
    """Return a hint or fix for the nearest thing that would fit."""
    if memory.usable < memory.free and fits(needs, replace(memory, limit=None), work) is not None:
        return "", Fix(
            "set", "memory", effect=f"with {gb(_minimum_bytes(needs, memory, work) + memory.context)} it would fit"
        )
    if _is_shared(memory) and fits(needs, replace(memory, free=memory.total), work) is not None:
        return "End the other program, or choose another device.", Fix("set", "device")
    for way, other in alternatives:
        if (less := fits(other, memory, work)) is not None:
            return "", replace(way, effect=f"it would fit, with {gb(less.peak)}")
    if smaller := next((side for side in SIDES if side < work.side and fits(needs, memory, work.at(side))), None):
        return f"{smaller}×{smaller} would fit.", None
    if memory.host is not None and _minimum_bytes(needs, memory, work) <= memory.usable:
        return f"Host memory is short: {gb(memory.host)} are free for the layers that would be offloaded.", None
    for name, other in models:
        if (less := fits(other, memory, work)) is not None:
            return f"{name} would fit: it needs about {gb(less.peak)}.", None
    return "The embedded model (nano) fits anywhere.", None


def gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
