"""Read a job: its settings, its canvas and its references."""

from dataclasses import dataclass
from functools import cached_property

from engine.contract import (
    GRID,
    MAX_GUIDANCE,
    MAX_SEED,
    MAX_STEPS,
    Aspect,
    Exact,
    InvalidJob,
    Job,
    KeepSource,
    Rgb8,
    image_hash,
)
from engine.diffusion.canvas import ENOUGH, Canvas, fit_reference, size_for_aspect
from engine.families.klein.variants import Variant

NEARLY_SQUARE = 1.25
"""Longer to shorter side up to which a model of squares still puts things where they belong. On nano's 9 × 7 tokens a
car at the bottom was cut off, on 9 × 6 it was a smear, on 6 × 10 a second house began below the first."""
LEAST_SIDE = 16
"""Pixels of the shortest side of a size that is asked for. A canvas of larger tokens is cropped to it."""


@dataclass(frozen=True, eq=False)
class Reference:
    """A reference as the model sees it.

    original: before it was fitted. way: how it was fitted. known_hash: `image_hash` of the original, if known.
    grid: image pixels per token.
    """

    image: Rgb8
    original: Rgb8
    way: str
    known_hash: str = ""
    grid: int = GRID

    @classmethod
    def padded(cls, image: Rgb8, canvas: Canvas, known_hash: str = "") -> "Reference":
        """Put an image on a canvas."""
        # Contents of several sizes fill one canvas: padded ones, and those enlarged for a close-up.
        way = f"pad {canvas.content_width}x{canvas.content_height}"
        return cls(canvas.pad(image), image, way, known_hash, canvas.grid)

    @cached_property
    def key(self) -> str:
        """Identify its pixels in the cache.

        Hashing 1 MP takes 4 ms, so it waits for the first use, when a GPU may be computing.
        """
        key = self.known_hash or image_hash(self.original)
        # An image that kept its size keeps its pixels too.
        return key if self.image.shape == self.original.shape else f"{key} {self.way} {self.image.shape}"

    @property
    def tokens(self) -> tuple[int, int]:
        """Return the rows and columns of its tokens."""
        return self.image.shape[0] // self.grid, self.image.shape[1] // self.grid


def read_settings(job: Job, variant: Variant, warnings: list[str]) -> tuple[int, float]:
    """Validate the job and return its steps and guidance."""
    if len(job.references) > variant.max_references:
        raise InvalidJob(
            f"{len(job.references)} references; {variant.name} takes at most {variant.max_references}.",
            hint="Compose in two rounds.",
        )
    if job.find_change and not isinstance(job.size, KeepSource):
        raise InvalidJob("find_change needs KeepSource: only what lies in one frame can be compared.")
    if not 0 <= job.seed <= MAX_SEED:
        raise InvalidJob(f"seed is {job.seed}; it must lie in 0 … 2^63-1.")
    steps = variant.steps if job.steps is None else job.steps
    if not 1 <= steps <= MAX_STEPS:
        raise InvalidJob(f"steps is {steps}; it must lie in 1 … {MAX_STEPS}.")
    guidance = variant.guidance if job.guidance is None else job.guidance
    if not 0 <= guidance <= MAX_GUIDANCE:
        raise InvalidJob(f"guidance is {guidance:g}; it must lie in 0 … {MAX_GUIDANCE}.")
    if guidance > 1 and variant.distilled:
        warnings.append(f"guidance {guidance:g} is ignored: {variant.name} is distilled and needs none")
        guidance = 1.0
    return steps, guidance


def canvas_of(variant: Variant, width: int, height: int, *, close_up: bool = False) -> Canvas:
    """Return the canvas for an image of this size."""
    least = variant.native_size**2 if close_up else variant.least_size**2
    if not close_up and width * height >= ENOUGH * least:
        least = 0
    return Canvas.of(width, height, variant.max_size**2, least, variant.pixels_per_token)


def fit_images(job: Job, variant: Variant, warnings: list[str]) -> tuple[Canvas, list[Reference]]:
    """Return the canvas, and the references as the model sees them."""
    grid = variant.pixels_per_token
    references = list(job.references)
    hashes = job.hashes or ("",) * len(references)
    if isinstance(job.size, KeepSource):
        if not references:
            raise InvalidJob("KeepSource needs a reference, whose size the result keeps.")
        height, width = references[0].shape[:2]
        canvas = canvas_of(variant, width, height, close_up=job.size.close_up)
        fitted = [Reference.padded(references[0], canvas, hashes[0])]
    else:
        fitted, canvas = [], None
    for image, known in list(zip(references, hashes, strict=True))[len(fitted) :]:
        seen = fit_reference(image, variant.reference_size**2, grid, variant.least_size**2)
        fitted.append(Reference(seen, image, "fit", known, grid))
    if canvas is None:
        width, height = _size(job, fitted, variant)
        if min(width, height) < LEAST_SIDE:
            raise InvalidJob(f"The size is {width}×{height}; each side needs at least {LEAST_SIDE} pixels.")
        canvas = canvas_of(variant, width, height)
    if canvas.enlarges:
        warnings.append(
            f"painted at {canvas.content_width}×{canvas.content_height}, about the area {variant.name} was made for, "
            f"and resampled to {canvas.width}×{canvas.height}"
        )
    # What an image shows is in place in its own shape, whichever that is.
    own = references[0].shape[1] / references[0].shape[0] if references else 1.0
    change = canvas.width / canvas.height / own
    if variant.squares and not isinstance(job.size, KeepSource) and max(change, 1 / change) > NEARLY_SQUARE:
        practised = "edits in an image's own shape" if references else "on squares"
        warnings.append(
            f"{variant.name} practised {practised} alone: in {canvas.width}×{canvas.height} things may be cut off or "
            "out of place"
        )
    return canvas, fitted


def _size(job: Job, references: list[Reference], variant: Variant) -> tuple[int, int]:
    """Return the width and height of the result.

    Native is the first reference's size, and the model's own without one.
    """
    match job.size:
        case Exact(width, height):
            return width, height
        case Aspect(width, height):
            return size_for_aspect((width, height), variant.native_size**2, variant.pixels_per_token)
    height, width = references[0].image.shape[:2] if references else (variant.native_size, variant.native_size)
    return width, height
