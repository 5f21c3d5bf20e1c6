"""compose_references: several pictures and words in, a new picture made of them out."""

import re

from mcp_types import CallToolResult

from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.request import ImageRequest, rounded
from klein_mcp.jobs.service import Service
from klein_mcp.mcp_server.tools import fields
from klein_mcp.mcp_server.tools.image_tool import paint
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


async def run(service: Service, call: CallContext, asked: ComposeReferences) -> CallToolResult:
    warnings = _unknown_images(asked)
    width, height = rounded(asked.width, asked.height, warnings)
    order = ImageRequest(
        tool=TOOL.name,
        prompt=asked.prompt,
        images=tuple(asked.images),
        width=width,
        height=height,
        aspect=fields.shape(asked.aspect_ratio, width, warnings),
        count=asked.count,
        seed=service.seed(asked.seed, asked.count),
        model=service.model(asked.model),
    )
    return await paint(service, call, order, asked.show, warnings)


def _unknown_images(asked: ComposeReferences) -> list[str]:
    """A word for each picture that the prompt names and nobody gave."""
    given = len(asked.images)
    named = {int(number) for number in re.findall(r"\bimage (\d{1,2})\b", asked.prompt, re.IGNORECASE)}
    were = "1 reference was given" if given == 1 else f"{given} references were given"
    return [f"the prompt names image {number}; {were}" for number in sorted(named) if not 1 <= number <= given]


TOOL = Tool(
    name="compose_references",
    title="Compose from references",
    description=(
        'Paint a new picture from several: put "image 1" beside "image 2", or take a subject from one and a style '
        "from another. Without a size it takes the first reference's."
    ),
    arguments=ComposeReferences,
    run=run,
)
