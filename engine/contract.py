"""What crosses the border of the engine: a Job in, Events out, and the errors in between. numpy only, no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Rgb8 = npt.NDArray[np.uint8]
else:
    # A door knows this contract from its first moment, and numpy (80 ms) only from its first picture on.
    Rgb8 = "numpy.typing.NDArray[numpy.uint8]"
"""A picture: uint8, [height, width, 3], sRGB, upright, opaque."""

CacheUse = Literal["hit", "miss", "none"]
"""Whether remembered work was used: "none" when the job had nothing of the kind to remember."""


def _same(a: object, b: object) -> bool:
    if hasattr(a, "shape") or hasattr(b, "shape"):
        import numpy as np

        return np.array_equal(np.asarray(a), np.asarray(b))
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b


class _ByValue:
    """Equality that looks into arrays: numpy's own == answers with an array, which no dataclass can use."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and all(
            _same(getattr(self, f.name), getattr(other, f.name))
            for f in fields(self)  # type: ignore[arg-type] - only dataclasses inherit this
        )

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True, eq=False)
class Job(_ByValue):
    """One picture to paint: text-to-image with no reference, editing with one, composition with several.

    width, height: pixels of the picture that comes back. None: the size of the first reference as the
        model sees it, without references the model's native size. Multiples of 16 unless `align` is set.
    align: the first reference and the canvas are one frame, so that an edit keeps every pixel in its place:
        both are scaled and padded alike, and the picture comes back at exactly the reference's size.
    close_up: with `align`, of a reference that is a part of a larger picture: what is smaller than the model's native
        area is painted enlarged to it, at most four times a side, as the model paints small things badly.
    aspect: (width, height) of which only the ratio counts: a picture of this shape at the model's native area,
        where no size is given. Only the engine knows what "auto" will be, and so what is native.
    seed: 0 … 2**63 - 1; the same job with the same seed gives the same picture.
    model: a variant's name, a diffusers folder, a single file, or "auto".
    steps, guidance: None for what the variant was made for.
    """

    prompt: str
    references: tuple[Rgb8, ...] = ()
    width: int | None = None
    height: int | None = None
    align: bool = False
    close_up: bool = False
    aspect: tuple[int, int] | None = None
    seed: int = 0
    model: str = "auto"
    steps: int | None = None
    guidance: float | None = None


@dataclass(frozen=True, slots=True)
class Queued:
    """Waiting; `position` jobs are ahead of this one, and its picture is about `seconds` away, where that is known."""

    position: int
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Loading:
    """Weights are on their way into memory; fraction is 0 … 1."""

    model: str
    fraction: float


@dataclass(frozen=True, slots=True)
class Stage:
    """This stage begins now."""

    name: Literal["prompt", "references", "denoise", "decode"]


@dataclass(frozen=True, slots=True, eq=False)
class Step(_ByValue):
    """Euler step `done` of `total` is finished.

    preview: the image the sampler is heading for, at most 128 pixels a side; None while nobody watches.
    """

    done: int
    total: int
    preview: "Rgb8 | None" = None


@dataclass(frozen=True, slots=True, eq=False)
class Result(_ByValue):
    """The finished picture and what it was really made with.

    model, fingerprint: the variant's name and a hash of the weights (LoRAs included) it was painted with.
    ms: milliseconds of wall time by stage: load, prompt, references, denoise, decode.
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


Event = Queued | Loading | Stage | Step | Result


class EngineError(Exception):
    """Something the caller can be told in one line: what happened, the limit, and (hint) the next step."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class InvalidJob(EngineError):
    """The job asks for something no model could do: a size, a step count, too many references."""


class ModelNotFound(EngineError):
    """The job names a model that is not installed."""


class BadWeights(EngineError):
    """The model's files are missing, cut short, or of another architecture."""


class OutOfMemory(EngineError):
    """The device has not enough memory for this job."""


class Busy(EngineError):
    """The queue is full. retry_after: seconds until a place should be free."""

    def __init__(self, message: str, *, hint: str = "", retry_after: float = 1.0) -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class EngineFailed(EngineError):
    """The engine broke off: a bug or a crash, not the caller's doing."""
