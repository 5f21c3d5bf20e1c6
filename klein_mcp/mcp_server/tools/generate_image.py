"""generate_image: words in, a new picture out."""

from mcp_types import CallToolResult

from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.request import ImageRequest, rounded
from klein_mcp.jobs.service import Service
from klein_mcp.mcp_server.tools import fields
from klein_mcp.mcp_server.tools.image_tool import paint
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


async def run(service: Service, call: CallContext, asked: GenerateImage) -> CallToolResult:
    warnings: list[str] = []
    width, height = rounded(asked.width, asked.height, warnings)
    order = ImageRequest(
        tool=TOOL.name,
        prompt=asked.prompt,
        width=width,
        height=height,
        aspect=fields.shape(asked.aspect_ratio, width, warnings),
        count=asked.count,
        seed=service.seed(asked.seed, asked.count),
        model=service.model(asked.model),
    )
    return await paint(service, call, order, asked.show, warnings)


TOOL = Tool(
    name="generate_image",
    title="Generate an image",
    description=(
        "Paint a new picture from words. Returns a handle for edit_image, compose_references, view_image and "
        "save_image, the seed, the path of the full PNG, and a preview."
    ),
    arguments=GenerateImage,
    run=run,
)
