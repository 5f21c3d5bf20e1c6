"""edit_image: changes an image by an instruction, at its own size."""

from dataclasses import replace

from mcp_types import CallToolResult

from klein_mcp.errors import RequestError
from klein_mcp.jobs import request
from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.photographs import check_photograph
from klein_mcp.jobs.service import Service
from klein_mcp.mcp_server.tools import fields
from klein_mcp.mcp_server.tools.edit_chain import MAX_STEPS, run_chain, run_replay
from klein_mcp.mcp_server.tools.image_tool import run_request
from klein_mcp.mcp_server.tools.tool import Tool

CUT_OUT = "remove the background"
"""The edit that is meant where only a transparent background is asked for."""


class EditImage(fields.Arguments):
    image: fields.ImageRef
    prompt: fields.EditPrompts | None = None
    again: fields.Replay | None = None
    region: fields.Region | None = None
    mask: fields.Mask | None = None
    width: fields.EditWidth | None = None
    height: fields.Height | None = None
    preserve: fields.Preserve = "auto"
    background: fields.Background | None = None
    count: fields.Count = 1
    seed: fields.Seed | None = None
    model: fields.Model | None = None
    show: fields.Show | None = None


async def run(service: Service, call: CallContext, arguments: EditImage) -> CallToolResult:
    if arguments.again is not None:
        _check_replay(arguments)
        return await run_replay(
            service, call, arguments.image, arguments.again, arguments.seed, arguments.model, arguments.show
        )
    asked = arguments.prompt or (CUT_OUT if arguments.background else None)
    if asked is None:
        raise RequestError("prompt is missing; it must be text, not empty.", hint="Or again: an image's handle.")
    prompts = [asked] if isinstance(asked, str) else asked
    _check_prompts(prompts, arguments.count)
    arguments = await _without_own_size(service, call, arguments)
    wanted = request.edit(
        arguments.image,
        prompts[0],
        mask=arguments.mask,
        region=arguments.region,
        width=arguments.width,
        height=arguments.height,
        preserve=arguments.preserve,
        count=arguments.count,
        seed=arguments.seed,
        model=service.model(arguments.model),
        background=arguments.background or "auto",
    )
    # Only the end of a chain is cut out: its first step paints in any case.
    await check_photograph(service, call, replace(wanted, background="auto") if len(prompts) > 1 else wanted)
    if len(prompts) > 1:
        return await run_chain(service, call, wanted, prompts, arguments.show)
    return await run_request(service, call, wanted, arguments.show)


async def _without_own_size(service: Service, call: CallContext, arguments: EditImage) -> EditImage:
    """Leave out a size that is the image's own.

    Models that fill in every argument give that one, and a size repaints every pixel.
    """
    from klein_mcp.images.resolver import is_counted_back

    if arguments.width is None or arguments.height is None:
        return arguments
    record = (await service.open(arguments.image, call)).record
    own = (arguments.width, arguments.height) == (record.width, record.height)
    known: dict[str, object] = {"width": None, "height": None} if own else {}
    if is_counted_back(arguments.image):
        known["image"] = record.handle  # by the time the edit runs `last` may be another image
    return arguments.model_copy(update=known)


def _check_replay(arguments: EditImage) -> None:
    """Refuse what a replay would have to ignore."""
    own = {"again", "image", "seed", "model", "show"}
    if others := sorted(arguments.model_fields_set - own - _at_default(arguments)):
        raise RequestError(f"again replays edits as they were made, without {others[0]}.", hint="Leave it out.")


def _at_default(arguments: EditImage) -> set[str]:
    fields = type(arguments).model_fields.items()
    return {name for name, field in fields if getattr(arguments, name) == field.default}


def _check_prompts(prompts: list[str], count: int) -> None:
    if not 1 <= len(prompts) <= MAX_STEPS:
        raise RequestError(
            f"prompt has {len(prompts)} entries; it takes one sentence, or 1 to {MAX_STEPS} of them.",
            hint="Make the rest in a second call, from the image this one returns.",
        )
    for number, prompt in enumerate(prompts, 1):
        name = "prompt" if len(prompts) == 1 else f"prompt {number}"
        if not prompt.strip():
            raise RequestError(f"{name} is empty; it must be an instruction.", hint="Say what to change.")
        if len(prompt) > fields.MAX_PROMPT:
            raise RequestError(f"{name} has {len(prompt)} characters; at most {fields.MAX_PROMPT}.", hint="Shorten it.")
    if len(prompts) > 1 and count > 1:
        raise RequestError("A list of prompts makes one image after another.", hint="Leave out count.")


TOOL = Tool(
    name="edit_image",
    title="Edit an image",
    description=(
        "Change an image by an instruction; it keeps its size, and untouched pixels keep their bytes. With region or "
        "mask nothing outside changes, and inside the edge fades in. The original stays: edit the new handle to go on, "
        "the old one to start over."
    ),
    arguments=EditImage,
    run=run,
)
