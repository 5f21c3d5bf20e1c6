"""What generate, edit, compose and wait_for_job have in common: a picture, or a promise, as a result."""

from collections.abc import Sequence
from dataclasses import replace

import anyio.to_thread
from mcp_types import CallToolResult

from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.outcome import JobResult, PendingJob
from klein_mcp.jobs.request import ImageRequest
from klein_mcp.jobs.service import Service
from klein_mcp.mcp_server import results
from klein_mcp.mcp_server.client_profiles import how_to_show


async def paint(
    service: Service, call: CallContext, order: ImageRequest, show: str | None, warnings: Sequence[str] = ()
) -> CallToolResult:
    """warnings: what the tool itself had to change about the wish."""
    outcome = await service.paint_within(service.settings.wait_budget, order, call)
    outcome = replace(outcome, warnings=(*warnings, *outcome.warnings))
    return await told(service, call, outcome, show)


async def told(
    service: Service, call: CallContext, outcome: JobResult | PendingJob, show: str | None
) -> CallToolResult:
    if isinstance(outcome, PendingJob):
        return CallToolResult(content=[results.promise(outcome)])
    how = show or service.settings.show or how_to_show(call.name)
    return await anyio.to_thread.run_sync(lambda: results.painted(outcome, service.store, how, call))
