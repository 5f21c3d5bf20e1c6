"""compose_references: makes a new image from several images and words."""

import re

from mcp_types import CallToolResult

from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.request import ImageRequest, rounded
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
    warnings = _unknown_images(arguments)
    width, height = rounded(arguments.width, arguments.height, warnings)
    request = ImageRequest(
        tool=TOOL.name,
        prompt=arguments.prompt,
        images=tuple(arguments.images),
        width=width,
        height=height,
        aspect=fields.shape(arguments.aspect_ratio, width, warnings),
        count=arguments.count,
        seed=service.seed(arguments.seed, arguments.count),
        model=service.model(arguments.model),
    )
    return await run_request(service, call, request, arguments.show, warnings)


def _unknown_images(arguments: ComposeReferences) -> list[str]:
    """Warn of each image that the prompt names and the call lacks."""
    given = len(arguments.images)
    named = {int(number) for number in re.findall(r"\bimage (\d{1,2})\b", arguments.prompt, re.IGNORECASE)}
    were = "1 reference was given" if given == 1 else f"{given} references were given"
    return [f"the prompt names image {number}; {were}" for number in sorted(named) if not 1 <= number <= given]


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
