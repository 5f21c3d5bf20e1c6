"""Several edits in one call, each of the result before it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import anyio.to_thread
from mcp_types import CallToolResult, ContentBlock

from engine.contract import Aspect, EngineError, Exact, KeepSource, Native
from klein_mcp.errors import RequestError, one_line, quote
from klein_mcp.jobs import replay
from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.request import ImageRequest
from klein_mcp.jobs.results import JobResult, PendingJob, SavedImage
from klein_mcp.jobs.service import Service
from klein_mcp.mcp_server import results
from klein_mcp.mcp_server.tools.image_tool import show_mode

MAX_STEPS = 8
COLUMNS = 3

Step = Callable[[Sequence[str]], ImageRequest]
"""Makes a step's request from the handles so far: of the base, then of each step before."""


@dataclass(slots=True)
class Chain:
    """The images of a chain so far.

    base: handle of the image it starts from. steps: how many were asked for. warnings: at first of opened files.
    replayed: of a replay, what each step asks for; the caller of a list of prompts knows them.
    """

    base: str
    steps: int
    replayed: Sequence[Step] = ()
    made: list[SavedImage] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    pending: PendingJob | None = None

    @property
    def handles(self) -> list[str]:
        return [self.base, *(image.handle for image in self.made)]

    @property
    def remaining(self) -> list[ImageRequest]:
        """Return the requests of a replay that follow on its pending job."""
        first = len(self.made) + 1
        images = [*self.handles, *(_placeholder(step) for step in range(first, self.steps))]
        return [step(images) for step in self.replayed[first:]]

    def add(self, result: JobResult | PendingJob) -> None:
        """Add a step's image and those of its warnings that are new."""
        step = len(self.made) + 1
        old = self.warnings.copy()
        self.warnings += [f"step {step}: {each}" for each in result.warnings if not any(each in one for one in old)]
        if isinstance(result, PendingJob):
            self.pending = result
        else:
            self.made.append(result.images[0])

    def changed_nothing(self) -> bool:
        """Return whether the latest step had no visible effect."""
        changed = self.made[-1].changed
        return changed is not None and changed["box"] is None


async def run_chain(
    service: Service, call: CallContext, request: ImageRequest, prompts: Sequence[str], show: str | None
) -> CallToolResult:
    """Run one edit per prompt, up to one that changes nothing."""
    image = await service.open(request.images[0], call)
    warnings = [*image.warnings]
    if request.mask:
        # Now, like the image: each step moves what `last` means.
        mask = await service.open(request.mask, call, reading="mask")
        warnings += mask.warnings
        request = replace(request, mask=mask.record.handle)
    # Only the end of a chain is cut out.
    opaque = replace(request, background="auto")
    steps = [_edit(opaque, prompt) for prompt in prompts[:-1]] + [_edit(request, prompts[-1])]
    chain = Chain(image.record.handle, len(steps), warnings=warnings)

    def stop() -> bool:
        done = len(chain.made)
        if done == len(prompts) or not chain.changed_nothing():
            return False
        chain.warnings.insert(0, f"stopped at step {done}, which changed nothing visible: {quote(prompts[done - 1])}")
        if request.background == "transparent":
            chain.warnings.insert(1, "not transparent: the last step would have been cut out, and was not reached")
        return True

    await _run(service, call, chain, steps, stop)
    return await _rendered(service, call, chain, show)


async def run_replay(
    service: Service, call: CallContext, image: str, again: str, seed: int | None, model: str | None, show: str | None
) -> CallToolResult:
    """Make the edits that led to one image on another one."""
    edited = (await service.open(again, call)).record
    plan = await anyio.to_thread.run_sync(lambda: replay.plan(service.store, edited.handle, onto=True))
    recorded = [plan.base.handle, *(record.handle for record in plan.steps)]

    def step(index: int) -> Step:
        def request(handles: Sequence[str]) -> ImageRequest:
            new = plan.stand_ins(dict(zip(recorded, handles, strict=False)))
            wanted = replay.step_request(plan.steps[index], new, seed)
            return replace(wanted, model=model or wanted.model)

        return request

    base = await service.open(image, call)
    steps = [step(index) for index in range(len(plan.steps))]
    chain = Chain(base.record.handle, len(steps), steps, warnings=[*base.warnings])
    await _run(service, call, chain, steps, lambda: False)
    if chain.pending:
        for number, request in enumerate(chain.remaining, len(chain.made) + 2):
            if lost := _lost(request):
                chain.warnings.append(f"step {number}: `remaining` lacks {', '.join(lost)}, which no tool takes")
    return await _rendered(service, call, chain, show)


def _edit(request: ImageRequest, prompt: str) -> Step:
    return lambda handles: replace(request, images=(handles[-1],), prompt=prompt)


async def _run(
    service: Service, call: CallContext, chain: Chain, steps: Sequence[Step], stop: Callable[[], bool]
) -> None:
    """Run the steps until the wait budget is over or one fails."""
    deadline = time.monotonic() + service.settings.wait_budget
    for index, step in enumerate(steps):
        left = max(0.0, deadline - time.monotonic())
        try:
            wanted = step(chain.handles)
            if chain.replayed:
                await replay.check_base(service, call, wanted)
            result = await service.run_within(left, wanted, _part_of(call, index, len(steps)))
        except (RequestError, EngineError) as error:
            if not chain.made:
                raise
            # The images before it are made: an error alone would not name them.
            words = results.error_line(error)
            chain.warnings.insert(0, f"stopped before step {index + 1} of {len(steps)}: {words}")
            return
        chain.add(result)
        if chain.pending or stop():
            return


def _placeholder(step: int) -> str:
    """Return the placeholder for the image of a later step."""
    return f"<image of step {step}>"


def _lost(request: ImageRequest) -> list[str]:
    """Return what a request asks for and no tool takes."""
    lost: list[str] = []
    if request.tool == "edit_image":
        lost += [f"reference {image}" for image in request.images[1:]]
    elif isinstance(request.size, KeepSource):
        lost.append("the size of its first reference")
    if request.tool != "edit_image" and request.background == "transparent":
        lost.append("background transparent")
    if request.steps is not None:
        lost.append(f"steps {request.steps}")
    if request.guidance is not None:
        lost.append(f"guidance {request.guidance:g}")
    return lost


def _tool_call(request: ImageRequest) -> dict[str, Any]:
    """Return the tool and its arguments that make a request."""
    size: dict[str, Any] = {}
    match request.size:
        case Exact(width, height):
            size = {"width": width, "height": height}
        case Aspect(across, along):
            size = {"aspect_ratio": f"{across}:{along}"}
        case Native() | KeepSource():
            pass
    own: dict[str, Any] = {"images": list(request.images)}
    if request.tool == "edit_image":
        own = {
            "image": request.images[0],
            "region": request.region and list(request.region),
            "mask": request.mask,
            "preserve": request.preserve if request.preserve != "auto" else None,
            "background": request.background if request.background != "auto" else None,
        }
    given = {**own, "prompt": request.prompt, **size, "seed": str(request.seed), "model": request.model}
    return {"tool": request.tool, **{name: value for name, value in given.items() if value}}


def _part_of(call: CallContext, index: int, steps: int) -> CallContext:
    """Return a call whose progress is one step's share of the chain's.

    The protocol wants progress to rise.
    """

    async def progress(done: float, total: float, message: str) -> None:
        await call.progress(index * total + done, steps * total, f"edit {index + 1} of {steps}: {message}")

    return replace(call, progress=progress) if steps > 1 else call


async def _rendered(service: Service, call: CallContext, chain: Chain, show: str | None) -> CallToolResult:
    mode = show_mode(service, call, show)
    return await anyio.to_thread.run_sync(lambda: _render(service, call, chain, mode))


def _render(service: Service, call: CallContext, chain: Chain, mode: str) -> CallToolResult:
    line: dict[str, Any] = {}
    if chain.made:
        line["image"] = chain.made[-1].handle
        if chain.made[-1].alpha:
            line |= {"background": results.transparent(chain.made[-1].viewed_on), "alpha": chain.made[-1].alpha}
    if chain.warnings:
        line["warnings"] = results.shortened(chain.warnings)
    line["steps"] = [_step(image) for image in chain.made]
    if chain.made:
        last = chain.made[-1]
        line |= {"seed": str(last.seed), "size": [last.width, last.height]}
        where = results.location(service.store, service.store.get(last.handle), call)
        line |= {name: value for name, value in where.items() if name != "image"}
    if chain.pending:
        job, missing = chain.pending.job, chain.steps - len(chain.made) - 1
        steps = (
            f'the calls in `remaining`, "{_placeholder(len(chain.made) + 1)}" being the image of that job, and so on'
            if chain.replayed
            else f"the last {missing} steps"
        )
        then = f", then go on with {steps}" if missing else ""
        line |= {"job": job, "next": f'wait_for_job with job "{job}"{then}'}
        if chain.replayed and missing:
            line["remaining"] = [_tool_call(request) for request in chain.remaining]
    blocks: list[ContentBlock] = [results.text(line)]
    if mode == "inline" and chain.made:
        blocks.append(_filmstrip(service, chain.handles))
    if mode != "none":
        blocks += [results.resource_link(service.store.get(image.handle)) for image in chain.made[-1:]]
    return CallToolResult(content=blocks)


def _step(image: SavedImage) -> dict[str, Any]:
    read_as = {"read_as": one_line(image.read_as)} if image.read_as else {}
    changed = {"changed": image.changed} if image.changed else {}
    return {"image": image.handle, **changed, **read_as}


def _filmstrip(service: Service, handles: list[str]) -> ContentBlock:
    from klein_mcp.images import preview
    from klein_mcp.images.budget import DECODING

    labels = ["original", *(f"{step} {handle}" for step, handle in enumerate(handles[1:], 1))]
    records = [service.store.get(handle) for handle in handles]

    def sheet() -> tuple[bytes, str]:
        images = [service.sources.pixels(record) for record in records]
        return preview.preview(preview.contact_sheet(images, labels, min(COLUMNS, len(images))))

    return results.image_block(*DECODING.run(sum(record.area for record in records), sheet))
