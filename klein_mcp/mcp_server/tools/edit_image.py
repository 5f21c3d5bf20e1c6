"""edit_image: a picture and an instruction in, the same picture changed out, at its own size."""

from mcp_types import CallToolResult

from klein_mcp.errors import RequestError
from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.request import ImageRequest, rounded
from klein_mcp.jobs.service import Service
from klein_mcp.mcp_server.tools import fields
from klein_mcp.mcp_server.tools.image_tool import paint
from klein_mcp.mcp_server.tools.tool import Tool


class EditImage(fields.Arguments):
    image: fields.ImageRef
    prompt: fields.EditPrompt
    region: fields.Region | None = None
    mask: fields.Mask | None = None
    width: fields.EditWidth | None = None
    height: fields.Height | None = None
    count: fields.Count = 1
    seed: fields.Seed | None = None
    model: fields.Model | None = None
    show: fields.Show | None = None


async def run(service: Service, call: CallContext, asked: EditImage) -> CallToolResult:
    warnings: list[str] = []
    width, height = rounded(asked.width, asked.height, warnings)
    if width is not None and (asked.region or asked.mask):
        raise RequestError("region and mask keep the picture's size.", hint="Leave out width and height.")
    order = ImageRequest(
        tool=TOOL.name,
        prompt=asked.prompt,
        images=(asked.image,),
        mask=asked.mask,
        region=fields.box(asked.region),
        width=width,
        height=height,
        keep_size=width is None,
        count=asked.count,
        seed=service.seed(asked.seed, asked.count),
        model=service.model(asked.model),
    )
    return await paint(service, call, order, asked.show, warnings)


TOOL = Tool(
    name="edit_image",
    title="Edit an image",
    description=(
        "Change a picture by an instruction; it keeps its exact size. With region or mask, every pixel outside stays "
        "as it was. The original is kept: edit the new handle to go on, the old one to start over."
    ),
    arguments=EditImage,
    run=run,
)
