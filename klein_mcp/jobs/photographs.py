"""Refuses to let the embedded model repaint a whole photograph unasked."""

from typing import TYPE_CHECKING

import anyio.to_thread

from engine.families.klein.variants import EMBEDDED, VARIANTS
from klein_mcp.errors import RequestError
from klein_mcp.images.library import Record
from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.installed import models_of
from klein_mcp.jobs.request import ImageRequest
from klein_mcp.jobs.service import Service

if TYPE_CHECKING:
    from klein_mcp.images.alpha import Pixels


def may_repaint(request: ImageRequest) -> bool:
    """Return whether an edit may repaint its whole image."""
    return request.tool == "edit_image" and not (request.region or request.mask or request.preserve == "off")


async def check_photograph(service: Service, call: CallContext, request: ImageRequest) -> None:
    """Raise RequestError if the embedded model would repaint a photograph."""
    if not may_repaint(request):
        return
    record = (await service.open(request.images[0], call)).record
    if record.tool != "open":
        return
    name, _ = (await models_of(service)).limit(request.model) or ("", 0)
    if name == EMBEDDED:
        await anyio.to_thread.run_sync(_check_record, service, record)


def _check_record(service: Service, record: Record) -> None:
    check_detail(service.sources.pixels(record))


def check_detail(image: "Pixels") -> None:
    """Raise RequestError if an image has detail to lose."""
    from klein_mcp.images.detail import is_detailed

    if is_detailed(image):
        raise RequestError(
            f"{EMBEDDED}, a demo, paints flat scenes of {VARIANTS[EMBEDDED].native_size} pixels: it would repaint all "
            "of this photograph and lose its detail.",
            hint="Give a region around what may change, or preserve: off to do it all the same.",
        )
