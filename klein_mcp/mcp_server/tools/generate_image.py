"""generate_image: makes a new image from words."""

from mcp_types import CallToolResult

from klein_mcp.errors import RequestError
from klein_mcp.jobs import request
from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.service import Service
from klein_mcp.mcp_server.tools import fields
from klein_mcp.mcp_server.tools.image_tool import run_request
from klein_mcp.mcp_server.tools.tool import Tool
from klein_mcp.mcp_server.tools.transparent import run_transparent


class GenerateImage(fields.Arguments):
    prompt: fields.Prompt
    aspect_ratio: fields.Aspect | None = None
    width: fields.Width | None = None
    height: fields.Height | None = None
    background: fields.Background | None = None
    count: fields.Count = 1
    seed: fields.Seed | None = None
    model: fields.Model | None = None
    show: fields.Show | None = None


async def run(service: Service, call: CallContext, arguments: GenerateImage) -> CallToolResult:
    wanted = request.generate(
        arguments.prompt,
        width=arguments.width,
        height=arguments.height,
        aspect=arguments.aspect_ratio,
        count=arguments.count,
        seed=arguments.seed,
        model=service.model(arguments.model),
    )
    if arguments.background:
        if arguments.count > 1:
            raise RequestError("A transparent image is made alone.", hint="Leave out count.")
        return await run_transparent(service, call, wanted, arguments.show)
    return await run_request(service, call, wanted, arguments.show)


TOOL = Tool(
    name="generate_image",
    title="Generate an image",
    description=(
        "Make a new image from words. Returns a handle for edit_image, compose_references, view_image and "
        "save_image, the seed, the path of the full PNG, and a preview."
    ),
    arguments=GenerateImage,
    run=run,
)
