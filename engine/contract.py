"""Types of the engine's interface: jobs, events, configuration, status and errors.

This module imports no torch.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Rgb8 = npt.NDArray[np.uint8]
    Grey8 = npt.NDArray[np.uint8]
else:
    # A front end imports this module at its start, and numpy (80 ms) only with its first image.
    Rgb8 = Grey8 = "numpy.typing.NDArray[numpy.uint8]"
"""An image: uint8, [height, width, 3], sRGB, upright, opaque."""


def image_hash(image: Rgb8) -> str:
    """Return the hash of an image's size and pixels.

    It does not depend on the file. The image library and the caches both use it.
    """
    import hashlib

    import numpy as np

    digest = hashlib.blake2b(b"%d %d " % image.shape[:2], digest_size=16)
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()


GRID = 16
"""Image pixels per token on each side, in every published model. Every size a model sees is a multiple of its own."""

MIN_SIDE = 64
"""Pixels of the shortest side of a reference and, rounded up to whole tokens, of a canvas. Source: diffusers
Flux2ImageProcessor.check_image_input."""

MAX_STEPS = 200
"""Limit of steps. No published klein needs more than 50, so a larger number is probably a typing error."""

MAX_GUIDANCE = 100
"""Limit of guidance. Chosen, not measured: base models are published with 4."""

MAX_SEED = 2**63 - 1
"""The largest seed: the largest number of 64 bits with a sign. torch's generators would take twice as many."""

CacheUse = Literal["hit", "miss", "none"]
"""Whether cached tensors were used; "none" when the job has nothing of the kind."""

Mode = Literal["eager", "compiled"]
"""Which implementation computed an image. Both compute the same function; rounding may differ between them."""


def _same(a: object, b: object) -> bool:
    if hasattr(a, "shape") or hasattr(b, "shape"):
        import numpy as np

        return np.array_equal(np.asarray(a), np.asarray(b))
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b


class _ByValue:
    """Base class for dataclasses that compare by value, arrays included.

    The == of numpy returns an array, which the generated `__eq__` of a dataclass cannot use.
    """

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and all(
            _same(getattr(self, f.name), getattr(other, f.name))
            for f in fields(self)  # type: ignore[arg-type] - only dataclasses inherit this
        )

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class Native:
    """The size of the first reference as the model sees it.

    Without references, the model's own size.
    """


@dataclass(frozen=True, slots=True)
class Exact:
    """The size of the result in pixels."""

    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Aspect:
    """A shape at the model's native area.

    Only the ratio of the two numbers counts. Only the engine knows what "auto" resolves to, and so the area.
    """

    width: int
    height: int


@dataclass(frozen=True, slots=True)
class KeepSource:
    """Exactly the first reference's size, with every pixel in its place.

    Reference and canvas share one frame: both are scaled and padded alike.

    close_up: the reference is a part of a larger image: below the model's native area it is enlarged to it, at
        most four times a side, because the model is poor at small areas.
    """

    close_up: bool = False


Size = Native | Exact | Aspect | KeepSource


@dataclass(frozen=True, slots=True, eq=False)
class Job(_ByValue):
    """One image to generate, from a prompt and any number of references.

    Text-to-image without references, an edit with one, a composition with several.

    seed: 0 … 2**63 - 1; the same job with the same seed gives the same image.
    model: a variant's name, a diffusers folder, a single file, or "auto".
    steps, guidance: None for the variant's defaults.
    find_change: with `KeepSource`, return where the result differs from the first reference.
    partials: how many steps also return the image they head for, decoded at full size. Never changes the result.
    mode: the implementation to use where it can be had, as a replay asks for it; None leaves it to the engine.
    hashes: `image_hash` of each reference, "" where unknown; caches use them instead of hashing again.
    affinity: an opaque name; jobs that share it share references, and run best where those are cached.
    place: where in the first reference the change is kept, such as "at the top"; "" for anywhere. It is added to a
        prompt that adds a thing and names no place, for models that list their words.
    """

    prompt: str
    references: tuple[Rgb8, ...] = ()
    size: Size = field(default_factory=Native)
    seed: int = 0
    model: str = "auto"
    steps: int | None = None
    guidance: float | None = None
    find_change: bool = False
    partials: int = 0
    hashes: tuple[str, ...] = ()
    affinity: str = ""
    mode: Mode | None = None
    place: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class ChangeMask(_ByValue):
    """Mask of the pixels that an edit at its source's size changed.

    The edit is compared with the round trip of its reference through the autoencoder.

    opacity: uint8, [height, width] of the image: 0 where nothing changed, rising to 255 inside the change.
    whole: the edit changed the whole image, or so much of it that no original pixel should be kept.
    faint, faint_box: share and box (x, y, width, height) of pixels just below the threshold, left out of the mask.
    shift: pixels (right, down) by which the model had moved the image, undone in the result.
    drift: mean change of colour outside the change, of 255, undone in the result.
    """

    opacity: Grey8
    whole: bool = False
    faint: float = 0.0
    faint_box: tuple[int, int, int, int] | None = None
    shift: tuple[int, int] = (0, 0)
    drift: float = 0.0


@dataclass(frozen=True, slots=True)
class Queued:
    """The job waits in the queue behind `position` others.

    seconds: estimated time until the result, None where unknown.
    """

    position: int
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Loading:
    """Weights are being loaded, `fraction` (0 … 1) of them so far."""

    model: str
    fraction: float


StageName = Literal["prompt", "references", "denoise", "decode"]


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of the pipeline begins, or goes on.

    fraction: share of the stage that is done. seconds: estimated time until the result, None where unknown.
    """

    name: StageName
    fraction: float = 0.0
    seconds: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Step(_ByValue):
    """Euler step `done` of `total` is finished.

    preview: the predicted final image, at most 128 pixels a side; None while no client wants previews.
    partial: that image at full size, for some steps of a job with `partials`.
    seconds: estimated time until the result, None where unknown.
    """

    done: int
    total: int
    preview: "Rgb8 | None" = None
    partial: "Rgb8 | None" = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Result(_ByValue):
    """The finished image and the settings that produced it.

    model, fingerprint: the variant's name and a hash of the weights, LoRAs included.
    ms: milliseconds of wall time by stage: load, prompt, references, denoise, decode, change.
    dtype: number format of the matrix products, such as bfloat16. mode: the implementation. A replay needs both.
    change: the change mask, where `find_change` was asked for.
    read_as: the prompt as a small model read it, "" where it equals the prompt.
    painted: (width, height) that was computed, None where the image was not resampled from it.
    """

    image: Rgb8
    seed: int
    model: str
    fingerprint: str
    steps: int
    guidance: float
    ms: Mapping[str, float] = field(default_factory=dict)
    cache: Mapping[str, CacheUse] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    dtype: str = ""
    mode: Mode = "eager"
    change: ChangeMask | None = None
    read_as: str = ""
    painted: tuple[int, int] | None = None


Event = Queued | Loading | Stage | Step | Result


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Configuration of an engine.

    It can be pickled. None leaves a choice to the engine.

    models, hub: folders and files to search for models, and the hub's cache.
    model: name or path of the model that a user prefers.
    variant: the variant a single file holds, where the file itself does not show it. It overrules the name of `model`.
    text_encoder, vae: name or path of the companion that a single file uses; None: the one that suits best.
    answers: file in which answers about model files are kept, such as their hashes.
    quant: fp8 or nvfp4 for the transformer's blocks; None keeps the format of the files.
    loras: names or paths, each with an optional :scale.
    memory_limit: bytes of the device the process may use.
    cache_bytes, spill_bytes: kept between jobs on the device and in host memory; None: a share of what is free.
    compile: "auto" compiles in idle time where that pays, "off" never does. compile_cache: its folder on disk.
    """

    models: tuple[Path, ...] = ()
    hub: Path | None = None
    device: str | None = None
    dtype: str | None = None
    threads: int | None = None
    model: str | None = None
    variant: str | None = None
    text_encoder: str | None = None
    vae: str | None = None
    answers: Path | None = None
    quant: str | None = None
    loras: tuple[str, ...] = ()
    decoder: Literal["full", "small"] = "full"
    memory_limit: int | None = None
    cache_bytes: int | None = None
    spill_bytes: int | None = None
    compile: Literal["auto", "off"] = "auto"
    compile_cache: Path | None = None


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Counters of the tensor cache.

    bytes: on the device. spilled_bytes: in host memory.
    """

    entries: int = 0
    bytes: int = 0
    spilled_bytes: int = 0
    hits: int = 0
    misses: int = 0


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A known variant.

    path: None where it is not installed.
    obstacle: why auto passed it over when it last chose, such as "does not load: …"; "" where it did not.
    """

    name: str
    licence: str
    path: str | None
    obstacle: str = ""


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """One of several machines behind an executor.

    error: "" while it answers. running: jobs that this daemon has there. hits: of its cache.
    """

    url: str
    error: str = ""
    loaded: str | None = None
    device: str = ""
    free_bytes: int = 0
    running: int = 0
    waiting: int = 0
    hits: int = 0

    def with_engine(self, engine: "EngineStatus") -> "NodeStatus":
        """Return this node with its engine's model, device, memory and hits."""
        return replace(
            self, loaded=engine.loaded, device=engine.device, free_bytes=engine.free_bytes, hits=engine.cache.hits
        )


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """State of an engine.

    loaded: the model in memory. placement: where its weights are, in words. tuning: the state of compiling, in words.
    """

    device: str
    dtype: str
    threads: int
    free_bytes: int
    loaded: str | None = None
    placement: str | None = None
    weights_bytes: int = 0
    cache: CacheStats = CacheStats()
    models: tuple[KnownModel, ...] = ()
    mode: Mode = "eager"
    tuning: str = ""
    nodes: tuple[NodeStatus, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        values = asdict(self) | {"models": [asdict(model) for model in self.models]}
        values["nodes"] = [asdict(node) for node in self.nodes]
        return values if self.nodes else {name: value for name, value in values.items() if name != "nodes"}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "EngineStatus":
        """Build the status from `to_json`."""
        nodes = tuple(NodeStatus(**node) for node in data.get("nodes", ()))
        models = tuple(KnownModel(**model) for model in data["models"])
        return cls(**{**data, "cache": CacheStats(**data["cache"]), "models": models, "nodes": nodes})


Action = Literal["set", "pull", "list"]


@dataclass(frozen=True, slots=True)
class Fix:
    """A suggested next step in machine-readable form.

    Each front end turns it into a sentence for its reader.

    action: "set" a setting (to one of `choices`, if any), "pull" a model, or "list" the models there are.
    effect: the consequence, where it is known: "it needs 6.4 GB".
    """

    action: Action
    setting: str = ""
    choices: tuple[str, ...] = ()
    model: str = ""
    effect: str = ""

    def __str__(self) -> str:
        effect = f": {self.effect}" if self.effect else ""
        if self.action == "pull":
            return f"Pull {self.model}{effect}."
        if self.action == "list":
            return "List the installed models."
        choices = f" to {' or '.join(self.choices)}" if self.choices else ""
        return f"Set {self.setting}{choices}{effect}."


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """An installed model and its fit into the memory now free.

    bytes: to read from disk, None where unknown. text_encoder, vae: the files or folders that are taken for it.
    placement: where its weights would be, "" where it cannot be loaded;
    `error` and `fix` then give the reason and the next step.
    """

    name: str
    format: str
    path: str
    licence: str
    bytes: int | None = None
    text_encoder: str = ""
    vae: str = ""
    placement: str = ""
    error: str = ""
    fix: Fix | None = None

    @property
    def fits(self) -> bool:
        """Whether the model could be loaded now."""
        return not self.error


class EngineError(Exception):
    """Base class of the engine's errors.

    message: the failure and the limit it met, in one line. hint, fix: the next step.
    """

    def __init__(self, message: str, *, hint: str = "", fix: Fix | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.fix = fix

    def __str__(self) -> str:
        return " ".join(filter(None, (self.message, self.hint, str(self.fix or ""))))


class InvalidJob(EngineError):
    """The job asks for something no model can do.

    Examples are an impossible size, an impossible number of steps, or too many references.
    """


class ModelNotFound(EngineError):
    """The job names a model that is not installed."""


class BadWeights(EngineError):
    """The model's files are missing, cut short, or of another architecture."""


class OutOfMemory(EngineError):
    """The device has not enough memory for this job."""


class Busy(EngineError):
    """The queue is full.

    retry_after: seconds until a place should be free.
    """

    def __init__(self, message: str, *, hint: str = "", fix: Fix | None = None, retry_after: float = 1.0) -> None:
        super().__init__(message, hint=hint, fix=fix)
        self.retry_after = retry_after


class EngineFailed(EngineError):
    """The engine failed through a bug or a crash of its own."""


class DeviceLost(EngineFailed):
    """The device fails whatever this process asks of it.

    A new process may reach it.
    """
