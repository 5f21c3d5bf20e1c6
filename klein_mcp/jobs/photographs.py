"""Refuses to let the embedded model repaint a whole photograph unasked."""

from typing import TYPE_CHECKING

import anyio.to_thread

from engine.families.klein.variants import EMBEDDED, VARIANTS
from klein_mcp.errors import RequestError
from klein_mcp.images.library import Record, Store
from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.installed import models_of
from klein_mcp.jobs.request import UNPAINTED, ImageRequest
from klein_mcp.jobs.service import Service

if TYPE_CHECKING:
    from klein_mcp.images.alpha import Pixels


def may_repaint(request: ImageRequest) -> bool:
    """Return whether an edit may repaint its whole image."""
    return request.tool == "edit_image" and not (request.region or request.mask or request.preserve == "off")


async def check_photograph(service: Service, call: CallContext, request: ImageRequest) -> None:
    """Raise RequestError if the embedded model would repaint a photograph."""
    if not may_repaint(request) or request.model not in ("auto", EMBEDDED):
        return
    record = (await service.open(request.images[0], call)).record
    try:
        await anyio.to_thread.run_sync(_check_record, service, request, record)
    except RequestError:
        # Asked last, as it reads every folder of models, or asks every engine.
        if request.model == EMBEDDED or (await models_of(service)).auto == EMBEDDED:
            raise


def _check_record(service: Service, request: ImageRequest, record: Record) -> None:
    from klein_mcp.images.budget import DECODING

    if not is_all_painted(service.store, record):
        DECODING.run(record.area, lambda: check_detail(request, service.sources.pixels(record)))


def is_all_painted(store: Store, record: Record) -> bool:
    """Return whether the embedded model painted all of an image.

    An edit that put original pixels back, and a cut-out, show those of the image before. Blocking.
    """
    found: Record | None = record
    while found and found.tool != "open":
        model, changed = found.recipe.get("model"), found.recipe.get("changed") or {}
        # What an edit of an older version changed is not known.
        kept = found.tool == "edit_image" and ("alpha" in found.recipe or changed.get("mask", True))
        if model == EMBEDDED and not kept:
            return True
        if model not in (EMBEDDED, UNPAINTED):
            return False
        found = store.find(found.parents[0]) if found.parents else None
    return False


def check_detail(request: ImageRequest, image: "Pixels") -> None:
    """Raise RequestError if an edit would lose the detail of its image."""
    from klein_mcp.images.detail import is_detailed
    from klein_mcp.jobs.transparent import cut_unpainted

    if not is_detailed(image) or (request.background == "transparent" and cut_unpainted(request, image) is not None):
        return
    raise RequestError(
        f"{EMBEDDED}, a demo, paints flat scenes of {VARIANTS[EMBEDDED].native_size} pixels: it would repaint all "
        "of this photograph and lose its detail.",
        hint="Give a region around what may change, or preserve: off to do it all the same.",
    )
