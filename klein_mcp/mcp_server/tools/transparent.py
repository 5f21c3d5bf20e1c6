"""Transparent images: a master and two edits of it on other backings."""

import re
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import anyio.to_thread
from mcp_types import CallToolResult, ContentBlock

from engine.contract import image_hash
from klein_mcp.images.library import Record
from klein_mcp.jobs import request as requests
from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.request import ImageRequest
from klein_mcp.jobs.results import JobResult, PendingJob
from klein_mcp.jobs.service import Service
from klein_mcp.mcp_server import results
from klein_mcp.mcp_server.tools.image_tool import PREVIEW, render, show_mode

if TYPE_CHECKING:
    from klein_mcp.images import alpha

TRIES = 2
"""Backings for the master: the second where much of the subject has nearly the colour of the first."""
_BACKGROUND = re.compile(
    r",?\s*\b(?:isolated\s+)?(?:on|with|against|in front of)\s+(?:an?\s+|the\s+)?(?:[\w-]+\s+){0,3}background\b",
    re.IGNORECASE,
)


async def run_transparent(
    service: Service, call: CallContext, request: ImageRequest, show: str | None
) -> CallToolResult:
    """Generate a transparent image, or warn why it is opaque."""
    from klein_mcp.images import alpha

    deadline, mode = time.monotonic() + service.settings.wait_budget, show_mode(service, call, show)
    subject = _BACKGROUND.sub("", request.prompt).rstrip(" .,")
    tried: list[str] = []
    while True:
        tried.append(alpha.choose_backing(subject, tried))
        wanted = replace(request, prompt=f"{subject} on a {tried[-1]} background")
        master = await service.run_within(_left(deadline), wanted, call, preview=PREVIEW)
        if isinstance(master, PendingJob):
            return results.pending_result(master)
        record = service.store.get(master.images[0].handle)
        pixels = await anyio.to_thread.run_sync(partial(service.sources.pixels, record))
        if not alpha.melts(pixels) or len(tried) == TRIES:
            break
    images = [pixels]
    for backing in ("black", "white"):
        edit = requests.edit(
            record.handle,
            f"Change the background to {backing}. Keep the subject and its edges exactly as they are.",
            seed=master.images[0].seed,
            model=request.model,
            preserve="off",
        )
        edited = await service.run_within(_left(deadline), edit, call)
        if isinstance(edited, PendingJob):
            return results.pending_result(edited)
        other = service.store.get(edited.images[0].handle)
        images.append(await anyio.to_thread.run_sync(partial(service.sources.pixels, other)))
    cut = await anyio.to_thread.run_sync(alpha.solve, images)
    if cut.checks.error:
        refused = replace(master, warnings=(f"not transparent: {cut.checks.error}", *master.warnings))
        return await render(service, call, refused, mode)
    return await anyio.to_thread.run_sync(partial(_stored, service, call, request, master, record, cut, mode))


def _left(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())


def _stored(
    service: Service,
    call: CallContext,
    request: ImageRequest,
    master: JobResult,
    record: Record,
    cut: "alpha.Cutout",
    mode: str,
) -> CallToolResult:
    """Put the transparent image into the library and show it over grey."""
    from klein_mcp.images import alpha, png, preview, provenance

    handle, made = service.store.new_handle(), master.images[0]
    checks = cut.checks.to_json()
    recipe = {**record.recipe, "image": handle, "parents": [record.handle], "alpha": checks}
    stored = service.store.put(
        png.encode(cut.image, provenance.texts(recipe)),
        handle=handle,
        pixels=image_hash(alpha.over(cut.image, 255)),
        size=(record.width, record.height),
        client=call.client,
        tool=request.tool,
        recipe=recipe,
        parents=[record.handle],
        prompt=request.prompt,
    )
    line = {
        "image": handle,
        **({"warnings": master.warnings} if master.warnings else {}),
        "background": "transparent, shown over grey",
        "alpha": checks,
        "seed": str(made.seed),
        "size": [record.width, record.height],
        **{name: value for name, value in results.location(service.store, stored, call).items() if name != "image"},
    }
    blocks: list[ContentBlock] = [results.text(line)]
    if mode == "inline":
        blocks.append(results.image_block(*preview.preview(alpha.over(cut.image), longest=PREVIEW)))
    if mode != "none":
        blocks.append(results.resource_link(stored))
    return CallToolResult(content=blocks)
