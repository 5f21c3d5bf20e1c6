"""Turns a request with library handles into jobs for the engine. Blocking."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.contract import Aspect, Job, KeepSource, Result, Rgb8
from engine.families.klein.variants import VARIANTS
from klein_mcp.images import alpha, mask, region
from klein_mcp.images.alpha import Pixels, Rgba8
from klein_mcp.images.library import Record, Store
from klein_mcp.images.pixels import PixelCache
from klein_mcp.images.region import EditRegion
from klein_mcp.jobs.request import ImageRequest

ASPECT_TOLERANCE = 0.03
"""Share by which a result's shape may miss the requested one without a warning: what a small model's few sizes miss."""


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request with everything its jobs need.

    hashes: `image_hash` of each reference that is sent as it is, "" for a part of one.
    parents: records of the references; a mask is no parent. original, region: of an edit that keeps its size.
    original_rgba: the original with its alpha, if it has any; `original` is that over the grey `backing`.
    affinity: names the lineage, so that its jobs meet on the machine that caches its references.
    """

    request: ImageRequest
    references: tuple[Rgb8, ...]
    hashes: tuple[str, ...]
    parents: tuple[Record, ...]
    warnings: tuple[str, ...]
    affinity: str = ""
    original: "Rgb8 | None" = None
    region: EditRegion | None = None
    original_rgba: Rgba8 | None = None
    backing: int = 255

    def job(self, index: int) -> Job:
        """Make the job of image number `index`.

        All are alike but for their seeds.
        """
        request, size = self.request, self.request.size
        if isinstance(size, KeepSource):
            size = KeepSource(close_up=self.region is not None and self.region.is_partial)
        return Job(
            prompt=request.prompt,
            references=self.references,
            size=size,
            seed=request.seed + index,
            model=request.model,
            steps=request.steps,
            guidance=request.guidance,
            find_change=isinstance(size, KeepSource) and request.preserve == "auto",
            partials=request.partials,
            hashes=self.hashes,
            affinity=self.affinity,
            mode=request.mode if index == 0 else None,  # the other seeds are new
            place=self.region.place if self.region else "",
        )

    def composite(self, image: Rgb8) -> Rgb8:
        """Put a result back into the image that is edited."""
        if self.original is None or self.region is None:
            return image
        return self.region.composite(image, self.original)

    def aspect_warnings(self, result: Result) -> tuple[str, ...]:
        """Warn if the result's aspect ratio misses the requested one."""
        size = self.request.size
        if not isinstance(size, Aspect):
            return ()
        height, width = result.image.shape[:2]
        if abs(width / height * size.height / size.width - 1) <= ASPECT_TOLERANCE:
            return ()
        missed = f"{width}×{height}, not quite {size.width}:{size.height}"
        row = VARIANTS.get(result.model)  # a model of one's own has none
        steps = f"steps of {row.pixels_per_token} pixels" if row else "coarser steps"
        return (f"the image is {missed}: {result.model} paints in {steps}",)


def prepare(request: ImageRequest, store: Store, pixels: PixelCache) -> PreparedRequest:
    """Load references and mask by handle, and crop the edited region.

    Raises RequestError.
    """
    records = [store.get(handle) for handle in request.images]
    stored = [pixels.read(record) for record in records]
    allowed = mask.of_image(pixels.read(store.get(request.mask)), "The mask") if request.mask else None
    prepared = prepare_pixels(request, stored, allowed)
    # What the engine gets of a transparent image, or of one that is cropped, has another hash.
    hashes = ["" if image.shape[2] == 4 else record.pixels for image, record in zip(stored, records, strict=True)]
    if prepared.original is not None and prepared.references[0].shape != prepared.original.shape:
        hashes[0] = ""
    return replace(
        prepared,
        hashes=tuple(hashes),
        parents=tuple(records),
        affinity=f"{request.model} {store.lineage.root(records[0].handle)}" if records else "",
    )


def prepare_pixels(request: ImageRequest, stored: Sequence[Pixels], allowed: "Rgb8 | None" = None) -> PreparedRequest:
    """Prepare a request from the pixels of its references. Raises RequestError.

    allowed: the mask.
    """
    backings = [alpha.plain_backing(image) if image.shape[2] == 4 else 255 for image in stored]
    images = tuple(alpha.flat(image, backing) for image, backing in zip(stored, backings, strict=True))
    keeps_size = isinstance(request.size, KeepSource)
    prepared = PreparedRequest(
        request,
        images,
        ("",) * len(images),
        (),
        (
            *request.warnings,
            *(region.mask_warnings(allowed) if allowed is not None else ()),
            *_flattened([*zip(request.images, stored, strict=True)][1 if keeps_size else 0 :]),
        ),
    )
    if not keeps_size:
        return prepared
    part = region.edit_region(images[0], request.region, allowed)
    return replace(
        prepared,
        references=(part.crop(images[0]), *images[1:]),
        original=images[0],
        region=part,
        original_rgba=stored[0] if stored[0].shape[2] == 4 else None,
        backing=backings[0],
    )


def _flattened(references: Sequence[tuple[str, Pixels]]) -> list[str]:
    """Warn of references whose transparency the result cannot keep."""
    return [f"{name} is transparent, and was shown to the model on one grey" for name, image in references
            if image.shape[2] == 4]  # fmt: skip
