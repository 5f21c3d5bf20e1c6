"""Several edits in one call, each of the result before it."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import anyio.to_thread
from mcp_types import CallToolResult, ContentBlock

from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.request import ImageRequest
from klein_mcp.jobs.results import JobResult, PendingJob, SavedImage
from klein_mcp.jobs.service import Service
from klein_mcp.mcp_server import results
from klein_mcp.mcp_server.tools.image_tool import show_mode

MAX_STEPS = 8
COLUMNS = 3


async def run_chain(
    service: Service, call: CallContext, request: ImageRequest, prompts: Sequence[str], show: str | None
) -> CallToolResult:
    """Run one edit per prompt, up to one that changes nothing."""
    from klein_mcp.images.preserve import NOTHING

    deadline = time.monotonic() + service.settings.wait_budget
    base = await service.open(request.images[0], call)
    handle, made, warnings = base.record.handle, list[SavedImage](), list[str]()
    pending: PendingJob | None = None
    for step, prompt in enumerate(prompts, 1):
        wanted = replace(request, images=(handle,), prompt=prompt)
        result = await service.run_within(max(0.0, deadline - time.monotonic()), wanted, call)
        if isinstance(result, PendingJob):
            pending = result
            break
        warnings += _of_step(step, result, warnings)
        made.append(result.images[0])
        handle = result.images[0].handle
        if (changed := result.images[0].changed) and changed["share"] < NOTHING and step < len(prompts):
            warnings.insert(0, f"stopped at step {step}, which changed nothing visible: {prompt!r}")
            break
    mode = show_mode(service, call, show)
    return await anyio.to_thread.run_sync(
        lambda: _render(service, call, base.record.handle, made, warnings, pending, mode)
    )


def _of_step(step: int, result: JobResult, before: list[str]) -> list[str]:
    """Return the warnings of a step, once each."""
    return [f"step {step}: {warning}" for warning in result.warnings if not any(warning in other for other in before)]


def _render(
    service: Service,
    call: CallContext,
    base: str,
    made: list[SavedImage],
    warnings: list[str],
    pending: PendingJob | None,
    mode: str,
) -> CallToolResult:
    line: dict[str, Any] = {}
    if made:
        line["image"] = made[-1].handle
    if warnings:
        line["warnings"] = warnings
    line["steps"] = [
        {"image": image.handle, "changed": image.changed, **({"read_as": image.read_as} if image.read_as else {})}
        for image in made
    ]
    if made:
        line |= {"seed": str(made[-1].seed), "size": [made[-1].width, made[-1].height]}
        where = results.location(service.store, service.store.get(made[-1].handle), call)
        line |= {name: value for name, value in where.items() if name != "image"}
    if pending:
        line |= {"job": pending.job, "next": f'wait_for_job with job "{pending.job}", then go on with the next step'}
    blocks: list[ContentBlock] = [results.text(line)]
    if mode == "inline" and made:
        blocks.append(_filmstrip(service, [base, *(image.handle for image in made)]))
    if mode != "none":
        blocks += [results.resource_link(service.store.get(image.handle)) for image in made[-1:]]
    return CallToolResult(content=blocks)


def _filmstrip(service: Service, handles: list[str]) -> ContentBlock:
    from klein_mcp.images import preview

    labels = ["original", *(f"{step} {handle}" for step, handle in enumerate(handles[1:], 1))]
    images = [service.sources.pixels(service.store.get(handle)) for handle in handles]
    sheet = preview.contact_sheet(images, labels, min(COLUMNS, len(images)))
    return results.image_block(*preview.preview(sheet))
