"""wait_for_job: wait for an image that takes longer than a call may."""

from mcp_types import CallToolResult

from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.service import Service
from klein_mcp.mcp_server.tools import fields
from klein_mcp.mcp_server.tools.image_tool import preview_size, render, show_mode
from klein_mcp.mcp_server.tools.tool import Tool


class WaitForJob(fields.Arguments):
    job: fields.JobHandle
    show: fields.Show | None = None


async def run(service: Service, call: CallContext, arguments: WaitForJob) -> CallToolResult:
    mode = show_mode(service, call, arguments.show)
    seconds, preview = service.settings.wait_budget, preview_size(mode)
    result = await service.wait_within(seconds, arguments.job, call, preview=preview)
    return await render(service, call, result, mode)


TOOL = Tool(
    name="wait_for_job",
    title="Wait for a job",
    description="Continue waiting where a call returned a job, not an image. The job goes on whether you wait or not.",
    arguments=WaitForJob,
    run=run,
    read_only=True,
    idempotent=True,
)
