"""generate_image: makes a new image from words."""

from dataclasses import replace

from mcp_types import CallToolResult

from klein_mcp.errors import RequestError
from klein_mcp.jobs import request
from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.replay import check_base, repeat
from klein_mcp.jobs.request import ImageRequest
from klein_mcp.jobs.service import Service
from klein_mcp.mcp_server.tools import fields
from klein_mcp.mcp_server.tools.image_tool import run_request
from klein_mcp.mcp_server.tools.tool import Tool


class GenerateImage(fields.Arguments):
    prompt: fields.Prompt | None = None
    again: fields.Again | None = None
    aspect_ratio: fields.Aspect | None = None
    width: fields.Width | None = None
    height: fields.Height | None = None
    background: fields.Background | None = None
    count: fields.Count = 1
    seed: fields.Seed | None = None
    model: fields.Model | None = None
    show: fields.Show | None = None


async def run(service: Service, call: CallContext, arguments: GenerateImage) -> CallToolResult:
    return await run_request(service, call, await _request(service, call, arguments), arguments.show)


async def _request(service: Service, call: CallContext, arguments: GenerateImage) -> ImageRequest:
    """Return the request for new words, or for those of another image."""
    if arguments.again is not None:
        record = (await service.open(arguments.again, call)).record
        if arguments.prompt not in (None, record.prompt):
            raise RequestError(f"again repeats the prompt of {record.handle}.", hint="Leave out prompt, or again.")
        wanted = repeat(
            record,
            width=arguments.width,
            height=arguments.height,
            aspect=arguments.aspect_ratio,
            count=arguments.count,
            seed=arguments.seed,
            model=arguments.model,
        )
        wanted = replace(wanted, background=arguments.background or wanted.background)
        if arguments.model:
            await check_base(service, call, wanted)
        return wanted
    if arguments.prompt is None:
        raise RequestError("prompt is missing; it must be text, not empty.", hint="Or again: an image's handle.")
    return request.generate(
        arguments.prompt,
        width=arguments.width,
        height=arguments.height,
        aspect=arguments.aspect_ratio,
        count=arguments.count,
        seed=arguments.seed,
        model=service.model(arguments.model),
        background=arguments.background or "auto",
    )


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
