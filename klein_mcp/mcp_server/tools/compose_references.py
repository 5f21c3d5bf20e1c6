"""compose_references: makes a new image from several images and words."""

from mcp_types import CallToolResult

from engine.families.klein.variants import VARIANTS
from klein_mcp.errors import RequestError
from klein_mcp.jobs import request
from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.installed import models_of
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
    await _check_number(service, wanted.model, len(arguments.images))
    return await run_request(service, call, wanted, arguments.show)


async def _check_number(service: Service, model: str, given: int) -> None:
    """Refuse too many references before the engine is started for them."""
    if given <= min(row.max_references for row in VARIANTS.values()):
        return
    limit = (await models_of(service)).limit(model)
    if limit is not None and given > limit[1]:
        raise RequestError(f"{given} references; {limit[0]} takes at most {limit[1]}.", hint="Compose in two rounds.")


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
