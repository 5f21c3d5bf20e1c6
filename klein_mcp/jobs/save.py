"""Puts a result back into its original and saves it in the library, with its provenance. Blocking."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from engine.contract import Result, Rgb8, image_hash
from klein_mcp.images import codec
from klein_mcp.images.library import Store
from klein_mcp.images.provenance import Provenance
from klein_mcp.jobs.execute import PreparedRequest
from klein_mcp.jobs.request import ImageRequest
from klein_mcp.jobs.results import SavedImage


@dataclass(frozen=True, slots=True)
class FinishedImage:
    """A result as it will be stored: for an edit, every pixel outside the region is the original's.

    changed: the share of pixels that differ from the original; None where there is none.
    """

    pixels: Rgb8
    changed: float | None = None


def finish(prepared: PreparedRequest, result: Result) -> FinishedImage:
    """Composite the result of an edit into its original."""
    original, region = prepared.original, prepared.region
    if original is None or region is None:
        return FinishedImage(result.image)
    image = region.composite(result.image, original)
    return FinishedImage(image, round(float(np.mean(np.any(image != original, axis=2))), 4))


def provenance_of(request: ImageRequest, result: Result, parents: Sequence[str] = (), handle: str = "") -> Provenance:
    """Describe how the image of `result` was made. parents: handles; paths outside a library."""
    height, width = result.image.shape[:2]
    return Provenance(
        seed=result.seed,
        model=result.model,
        fingerprint=result.fingerprint,
        steps=result.steps,
        guidance=result.guidance,
        width=width,
        height=height,
        dtype=result.dtype,
        mode=result.mode,
        image=handle,
        parents=tuple(parents),
        request=replace(request, count=1, seed=result.seed, warnings=()).to_json(),
    )


def save(
    store: Store, handle: str, image: FinishedImage, prepared: PreparedRequest, result: Result, client: str
) -> tuple[SavedImage, str]:
    """Store the image under `handle`. Returns it and its pixel hash; then it survives the machine going down."""
    result = replace(result, image=image.pixels)
    provenance = provenance_of(prepared.request, result, [parent.handle for parent in prepared.parents], handle)
    recipe, pixels = provenance.to_json(), image_hash(image.pixels)
    width, height = provenance.width, provenance.height
    store.put(
        codec.encode(image.pixels, "png", recipe),
        handle=handle,
        pixels=pixels,
        size=(width, height),
        client=client,
        tool=prepared.request.tool,
        recipe=recipe,
        parents=provenance.parents,
        prompt=provenance.prompt,
    )
    saved = SavedImage(
        handle=handle,
        seed=result.seed,
        width=width,
        height=height,
        model=result.model,
        fingerprint=result.fingerprint,
        steps=result.steps,
        guidance=result.guidance,
        dtype=result.dtype,
        mode=result.mode,
        cache=dict(result.cache),
        changed=image.changed,
        warnings=(*result.warnings, *prepared.aspect_warnings(result)),
    )
    return saved, pixels
