"""compose_references: makes a new image from several images and words."""

from mcp_types import CallToolResult

from klein_mcp.jobs import request
from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.service import Service
from klein_mcp.mcp_server.tools import fields
from klein_mcp.mcp_server.tools.image_tool import run_request
from klein_mcp.mcp_server.tools.tool import Tool


class ComposeReferences(fields.Arguments):
    images: fields.Images
    prompt: fields.ComposePrompt
    aspect_ratio: fields.Aspect | None = None
    width: fields.Width | None = None
    height: fields.Height | None = None
    count: fields.Count = 1
    seed: fields.Seed | None = None
    model: fields.Model | None = None
    show: fields.Show | None = None


async def run(service: Service, call: CallContext, arguments: ComposeReferences) -> CallToolResult:
    wanted = request.compose(
        arguments.images,
        arguments.prompt,
        width=arguments.width,
        height=arguments.height,
        aspect=arguments.aspect_ratio,
        count=arguments.count,
        seed=arguments.seed,
        model=service.model(arguments.model),
    )
    return await run_request(service, call, wanted, arguments.show)


TOOL = Tool(
    name="compose_references",
    title="Compose from references",
    description=(
        'Make a new image from several: put "image 1" beside "image 2", or take a subject from one and a style '
        "from another. Without a size it takes the first reference's."
    ),
    arguments=ComposeReferences,
    run=run,
)
