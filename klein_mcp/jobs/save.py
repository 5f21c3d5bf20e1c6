"""Composites a result into its original and stores it with its provenance."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from engine.contract import ChangeMask, Grey8, Result, image_hash
from engine.families.klein.variants import EMBEDDED
from klein_mcp.images import alpha, codec, png, preserve
from klein_mcp.images.alpha import AlphaChecks, Pixels
from klein_mcp.images.detail import is_detailed
from klein_mcp.images.library import Store
from klein_mcp.images.preserve import VisibleChange
from klein_mcp.images.provenance import Provenance
from klein_mcp.images.region import EditRegion
from klein_mcp.jobs.execute import PreparedRequest
from klein_mcp.jobs.request import ImageRequest
from klein_mcp.jobs.results import SavedImage

MENTIONED_DRIFT = 3.0
"""Of 255: a smaller change of colour is what every pass through the autoencoder does."""


@dataclass(frozen=True, slots=True)
class FinishedImage:
    """A result as it will be stored.

    The pixels are the original's where an edit changed nothing. changed: of an edit at its own size. opacity: of
    its crop, 0 where the original's bytes are kept; None for nowhere. checks: of a transparent image. warnings: what
    the change mask and the checks found.
    """

    pixels: Pixels
    changed: VisibleChange | None = None
    opacity: "Grey8 | None" = None
    warnings: tuple[str, ...] = ()
    checks: AlphaChecks | None = None


def finish(prepared: PreparedRequest, result: Result) -> FinishedImage:
    """Composite the result of an edit into its original."""
    original, region = prepared.original, prepared.region
    if original is None or region is None:
        return FinishedImage(result.image, warnings=_detail_warnings(prepared, result.model))
    image = region.composite(result.image, original, result.change)
    finished = FinishedImage(image, opacity=region.opacity(result.change))
    if prepared.original_rgba is not None:
        finished = _with_alpha(finished, prepared)
    shown = alpha.flat(finished.pixels, prepared.backing)
    changed = preserve.measure(shown, original, region.mask, kept=False)
    warnings = (
        *_edit_warnings(changed, result.change, region),
        *_detail_warnings(prepared, result.model),
        *region.enlargement_warnings(result.image),
        *finished.warnings,
    )
    return replace(finished, changed=changed, warnings=warnings)


def _detail_warnings(prepared: PreparedRequest, model: str) -> tuple[str, ...]:
    """Warn of a photograph that the embedded model had to repaint."""
    if model != EMBEDDED or prepared.request.tool != "edit_image" or not is_detailed(prepared.references[0]):
        return ()
    in_part = prepared.region is not None and prepared.region.mask is not None
    lost = "what it painted is hardly recognisable" if in_part else "detail it repainted is lost"
    return (f"{model} knows no image such as this, only flat scenes: {lost}; klein-mcp pull klein-4b",)


def _with_alpha(finished: FinishedImage, prepared: PreparedRequest) -> FinishedImage:
    """Give the edit of a transparent image its alpha."""
    assert prepared.original_rgba is not None
    assert prepared.region is not None
    may_change = None
    if finished.opacity is not None:
        left, top, right, bottom = prepared.region.box
        may_change = np.zeros(finished.pixels.shape[:2], bool)
        may_change[top:bottom, left:right] = finished.opacity > 0
    image = alpha.after_edit(finished.pixels, prepared.original_rgba, prepared.backing, may_change)
    if alpha.is_opaque_after(image, prepared.original_rgba):
        opaque = "not transparent any more: the edit painted the background"
        return replace(finished, warnings=(opaque,))
    return replace(finished, pixels=image, checks=alpha.measure(image))


def _edit_warnings(changed: VisibleChange, change: ChangeMask | None, region: EditRegion) -> tuple[str, ...]:
    """Warn of an edit that did nothing, and of what was undone."""
    warnings = []
    if not changed.had_effect:
        warnings.append("nothing visible changed")
    if change is not None and not change.whole:
        if change.shift != (0, 0):
            right, down = change.shift
            warnings.append(f"the model moved the image by {right} pixels right, {down} down; it was moved back")
        if change.drift > MENTIONED_DRIFT:
            warnings.append(f"colours outside the change drifted by {change.drift:.0f} of 255; they were matched")
        if faint := region.faint_change(change):
            place = f"{faint[0]:.1%} of the image at {list(faint[1])}"
            warnings.append(f'a faint change of {place} was taken for noise; preserve "off" keeps it')
    return tuple(warnings)


def compare_stored(image: FinishedImage, prepared: PreparedRequest, stored: bytes) -> VisibleChange | None:
    """Compare the stored file with the original.

    Byte by byte, wherever it is to be the original's.
    """
    if image.changed is None or image.opacity is None or prepared.original is None or prepared.region is None:
        return image.changed
    left, top, *_ = prepared.region.box
    original = prepared.original if image.pixels.shape[2] == 3 else prepared.original_rgba
    if original is None:
        return image.changed
    kept = preserve.is_kept(png.decode(stored), original, image.opacity, (left, top))
    return replace(image.changed, kept=kept)


def _write_changes(store: Store, handle: str, image: FinishedImage, prepared: PreparedRequest) -> None:
    """Store the change mask beside the image, of its size.

    White is painted, black the original's.
    """
    if image.opacity is None or prepared.region is None:
        return
    left, top, right, bottom = prepared.region.box
    mask = np.zeros(image.pixels.shape[:2], np.uint8)
    mask[top:bottom, left:right] = image.opacity
    path = store.files.changes_path(handle)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.write_bytes(codec.encode_mask(mask))


def provenance_of(request: ImageRequest, result: Result, parents: Sequence[str] = (), handle: str = "") -> Provenance:
    """Describe how the image of `result` was made.

    parents: handles; paths outside a library.
    """
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
        request=replace(request, count=1, seed=result.seed, partials=0, mode=None, warnings=()).to_json(),
    )


def painted_edge(image: FinishedImage, result: Result) -> int:
    """Return the computed long edge, 0 if the image shows more.

    The file of an edit that keeps original pixels has more detail than was computed.
    """
    return max(result.painted) if result.painted and image.opacity is None else 0


def _measured(result: Result) -> dict[str, object]:
    """Return what only the recipe resource shows."""
    return {"ms": {stage: round(spent) for stage, spent in result.ms.items()}, "cache": dict(result.cache)}


def save(
    store: Store, handle: str, image: FinishedImage, prepared: PreparedRequest, result: Result, client: str
) -> tuple[SavedImage, str]:
    """Store the image under `handle`.

    Returns it and its pixel hash; then it survives the machine going down.
    """
    result = replace(result, image=image.pixels)
    provenance = provenance_of(prepared.request, result, [parent.handle for parent in prepared.parents], handle)
    recipe = provenance.to_json()
    width, height = provenance.width, provenance.height
    with ThreadPoolExecutor(1) as beside:
        # Hashing takes 4 ms at 1024² and holds no lock.
        hashing = beside.submit(image_hash, image.pixels)
        encoded = codec.encode(image.pixels, "png", recipe)
        changed = compare_stored(image, prepared, encoded)
        pixels = hashing.result()
    # With the place on its sheet, as the next call's seeds may follow on this one's.
    made: dict[str, object] = {"sheet": [str(prepared.request.seed), prepared.request.count]}
    if result.read_as:
        made["read_as"] = result.read_as
    if painted := painted_edge(image, result):
        made["painted"] = painted
    if changed:
        made["changed"] = {**changed.to_json(), "mask": image.opacity is not None}
    if image.checks:
        made["alpha"] = image.checks.to_json()
    _write_changes(store, handle, image, prepared)
    store.put(
        encoded,
        handle=handle,
        pixels=pixels,
        size=(width, height),
        client=client,
        tool=prepared.request.tool,
        recipe=recipe | made | _measured(result),
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
        changed=changed.to_json() if changed else None,
        alpha=image.checks.to_json() if image.checks else None,
        viewed_on=alpha.VIEWED_ON.get(alpha.viewing_backing(image.pixels) or 0, ""),
        read_as=result.read_as,
        painted=painted,
        warnings=(*image.warnings, *result.warnings, *prepared.aspect_warnings(result)),
    )
    return saved, pixels
