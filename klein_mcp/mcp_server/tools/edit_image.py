"""edit_image: changes an image by an instruction, at its own size."""

from mcp_types import CallToolResult

from klein_mcp.jobs import request
from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.service import Service
from klein_mcp.mcp_server.tools import fields
from klein_mcp.mcp_server.tools.image_tool import run_request
from klein_mcp.mcp_server.tools.tool import Tool


class EditImage(fields.Arguments):
    image: fields.ImageRef
    prompt: fields.EditPrompt
    region: fields.Region | None = None
    mask: fields.Mask | None = None
    width: fields.EditWidth | None = None
    height: fields.Height | None = None
    preserve: fields.Preserve = "auto"
    count: fields.Count = 1
    seed: fields.Seed | None = None
    model: fields.Model | None = None
    show: fields.Show | None = None


async def run(service: Service, call: CallContext, arguments: EditImage) -> CallToolResult:
    wanted = request.edit(
        arguments.image,
        arguments.prompt,
        mask=arguments.mask,
        region=arguments.region,
        width=arguments.width,
        height=arguments.height,
        preserve=arguments.preserve,
        count=arguments.count,
        seed=arguments.seed,
        model=service.model(arguments.model),
    )
    return await run_request(service, call, wanted, arguments.show)


TOOL = Tool(
    name="edit_image",
    title="Edit an image",
    description=(
        "Change an image by an instruction; it keeps its size, and untouched pixels keep their bytes. With region or "
        "mask nothing outside changes. The original stays: edit the new handle to go on, the old one to start over."
    ),
    arguments=EditImage,
    run=run,
)
