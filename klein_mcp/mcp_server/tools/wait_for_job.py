"""wait_for_job: wait for an image that takes longer than a call may."""

from mcp_types import CallToolResult

from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.service import Service
from klein_mcp.mcp_server.tools import fields
from klein_mcp.mcp_server.tools.image_tool import render
from klein_mcp.mcp_server.tools.tool import Tool


class WaitForJob(fields.Arguments):
    job: fields.JobHandle
    show: fields.Show | None = None


async def run(service: Service, call: CallContext, arguments: WaitForJob) -> CallToolResult:
    outcome = await service.wait_within(service.settings.wait_budget, arguments.job, call)
    return await render(service, call, outcome, arguments.show)


TOOL = Tool(
    name="wait_for_job",
    title="Wait for a job",
    description="Continue waiting where a call returned a job, not an image. The job goes on whether you wait or not.",
    arguments=WaitForJob,
    run=run,
    read_only=True,
    idempotent=True,
)
