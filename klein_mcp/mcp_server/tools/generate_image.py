"""generate_image: makes a new image from words."""

from mcp_types import CallToolResult

from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.request import ImageRequest, rounded
from klein_mcp.jobs.service import Service
from klein_mcp.mcp_server.tools import fields
from klein_mcp.mcp_server.tools.image_tool import run_request
from klein_mcp.mcp_server.tools.tool import Tool


class GenerateImage(fields.Arguments):
    prompt: fields.Prompt
    aspect_ratio: fields.Aspect | None = None
    width: fields.Width | None = None
    height: fields.Height | None = None
    count: fields.Count = 1
    seed: fields.Seed | None = None
    model: fields.Model | None = None
    show: fields.Show | None = None


async def run(service: Service, call: CallContext, arguments: GenerateImage) -> CallToolResult:
    warnings: list[str] = []
    width, height = rounded(arguments.width, arguments.height, warnings)
    request = ImageRequest(
        tool=TOOL.name,
        prompt=arguments.prompt,
        width=width,
        height=height,
        aspect=fields.shape(arguments.aspect_ratio, width, warnings),
        count=arguments.count,
        seed=service.seed(arguments.seed, arguments.count),
        model=service.model(arguments.model),
    )
    return await run_request(service, call, request, arguments.show, warnings)


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
