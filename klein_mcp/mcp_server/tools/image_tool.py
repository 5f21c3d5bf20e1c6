"""Runs a tool's image request and renders images or a pending job."""

import anyio.to_thread
from mcp_types import CallToolResult

from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.request import ImageRequest
from klein_mcp.jobs.results import JobResult, PendingJob
from klein_mcp.jobs.service import Service
from klein_mcp.mcp_server import results
from klein_mcp.mcp_server.client_profiles import image_mode

PREVIEW = 1024
"""Pixels of the long edge: about 1,369 tokens to a Claude model at 1024²."""


async def run_request(service: Service, call: CallContext, request: ImageRequest, show: str | None) -> CallToolResult:
    """Run `request` within the wait budget."""
    mode = show_mode(service, call, show)
    seconds = service.settings.wait_budget
    result = await service.run_within(seconds, request, call, preview=preview_size(mode))
    return await render(service, call, result, mode)


def show_mode(service: Service, call: CallContext, show: str | None) -> str:
    """Return the show mode of the call, the settings, or the client."""
    return show or service.settings.show or image_mode(call.name)


def preview_size(mode: str) -> int:
    """Return the long edge of the preview, 0 for none."""
    return PREVIEW if mode == "inline" else 0


async def render(service: Service, call: CallContext, result: JobResult | PendingJob, mode: str) -> CallToolResult:
    """Return the tool result, shaped for the client that called."""
    if isinstance(result, PendingJob):
        return results.pending_result(result)
    return await anyio.to_thread.run_sync(lambda: results.tool_result(result, service.store, mode, call))
