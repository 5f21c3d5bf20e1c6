"""Runs a tool's image request and renders images or a pending job."""

from collections.abc import Sequence
from dataclasses import replace

import anyio.to_thread
from mcp_types import CallToolResult

from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.outcome import JobResult, PendingJob
from klein_mcp.jobs.request import ImageRequest
from klein_mcp.jobs.service import Service
from klein_mcp.mcp_server import results
from klein_mcp.mcp_server.client_profiles import image_mode


async def run_request(
    service: Service, call: CallContext, request: ImageRequest, show: str | None, warnings: Sequence[str] = ()
) -> CallToolResult:
    """Run `request` within the wait budget.

    warnings: adjustments that the tool itself made.
    """
    outcome = await service.paint_within(service.settings.wait_budget, request, call)
    outcome = replace(outcome, warnings=(*warnings, *outcome.warnings))
    return await render(service, call, outcome, show)


async def render(
    service: Service, call: CallContext, outcome: JobResult | PendingJob, show: str | None
) -> CallToolResult:
    """Return the tool result, shaped for the client that called."""
    if isinstance(outcome, PendingJob):
        return results.pending_result(outcome)
    mode = show or service.settings.show or image_mode(call.name)
    return await anyio.to_thread.run_sync(lambda: results.tool_result(outcome, service.store, mode, call))
