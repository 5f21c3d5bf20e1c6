"""/v1/images/generations and /v1/images/edits: a call becomes a job."""

import base64
import re
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import anyio.to_thread
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from engine.contract import KeepSource, Step
from klein_mcp.errors import RequestError
from klein_mcp.http import calls, render
from klein_mcp.http.disconnect import cancelled_on_disconnect
from klein_mcp.http.downloads import OPAQUE_LINK
from klein_mcp.http.openai import payloads
from klein_mcp.http.openai.body import Body, read_edit, read_json
from klein_mcp.http.openai.errors import ApiError, to_api_error
from klein_mcp.http.openai.fields import ImageCall, parse
from klein_mcp.http.openai.models import naming_installed
from klein_mcp.http.openai.payloads import Operation
from klein_mcp.http.openai.stream import EventStream
from klein_mcp.http.surface import HttpContext
from klein_mcp.images.library import Record
from klein_mcp.jobs import request as requests
from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.events import Done, ImageSaved, JobEvent, Listen, Progressed
from klein_mcp.jobs.request import ImageRequest
from klein_mcp.jobs.results import Preview, SavedImage

if TYPE_CHECKING:
    from klein_mcp.images.resolver import ResolvedImage


@dataclass(frozen=True, slots=True)
class PreparedCall:
    """A call whose images are in the library.

    references: their sizes, for the count of tokens.
    """

    call: ImageCall
    request: ImageRequest
    context: CallContext
    references: tuple[tuple[int, int], ...]


class OpenAiImageRoute:
    """One of the two routes, an ASGI application that notices disconnects."""

    def __init__(self, context: HttpContext, operation: Operation) -> None:
        self._http = context
        self._service = context.service
        self._operation: Operation = operation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            prepared = await self._prepare(request)
        except ClientDisconnect:
            raise
        except Exception as exc:
            error = await naming_installed(exc, self._service)
            await error.response()(scope, receive, send)
            return
        async with cancelled_on_disconnect(receive):
            respond = self._stream if prepared.call.stream else self._respond
            await respond(prepared, request, send)

    async def _read(self, request: Request) -> tuple[ImageCall, Body]:
        if self._operation == "image_generation":
            return parse(await read_json(request)), Body({})
        body = await read_edit(request)
        return parse(body.fields), body

    # -- from a call to a request --------------------------------------------------------------------------------------

    async def _prepare(self, request: Request) -> PreparedCall:
        """Read a body and import its images, which no caller keeps.

        They may have 256 MB, and the job may wait. Raises RequestError or ApiError.
        """
        call, body = await self._read(request)
        context = calls.call_context(self._http, request, "openai")
        files = enumerate(body.images, 1)
        opened = [await self._import(file, "image", f"image {number}", context) for number, file in files]
        mask = None if body.mask is None else await self._import(body.mask, "mask", "The mask", context)
        images = [image.record for image in opened]
        sizes = tuple((image.width, image.height) for image in images)
        wanted = self._request(call, images, mask and mask.record)
        _check_format(call, wanted, sizes)
        warnings = (*wanted.warnings, *(warning for image in (*opened, mask) if image for warning in image.warnings))
        wanted = replace(wanted, partials=call.partial_images, warnings=warnings)
        return PreparedCall(call, wanted, context, sizes)

    async def _import(self, image: bytes | str, field: str, name: str, context: CallContext) -> "ResolvedImage":
        """Import an image of the body. Raises ApiError that names its field."""
        try:
            return await calls.import_image(self._http, image, name, context, mask=field == "mask")
        except RequestError as exc:
            raise replace(to_api_error(exc), param=field) from exc

    def _request(self, call: ImageCall, images: list[Record], mask: Record | None) -> ImageRequest:
        """Build the request: generate, edit one image, or compose several."""
        # Sides of a size are multiples of 16. Those of an image that is edited need not be, and are kept.
        keeps_size = bool(images) and call.size in (None, (images[0].width, images[0].height))
        width, height = (None, None) if keeps_size or call.size is None else call.size
        common: dict[str, Any] = {
            "count": call.n,
            "seed": call.seed,
            "model": self._service.model(None if call.model == "auto" else call.model),
            "steps": call.steps,
            "guidance": call.guidance,
            "background": "transparent" if call.transparent else "auto",
        }
        if not images:
            return requests.generate(call.prompt, width=width, height=height, **common)
        if mask is None and len(images) > 1:
            handles = [image.handle for image in images]
            composed = requests.compose(handles, call.prompt, width=width, height=height, **common)
            # The new image need not show the first one at its place, so no pixels of it are put back.
            return replace(composed, size=KeepSource(), preserve="off") if keeps_size else composed
        first, *others = images
        if mask is not None and width is not None:
            own = f"{first.width}x{first.height}"
            raise ApiError(400, f'With a mask the size stays {own}. Send that, or "auto".', "size", "invalid_value")
        edit = requests.edit(first.handle, call.prompt, mask=mask and mask.handle, width=width, height=height, **common)
        return replace(edit, images=(first.handle, *(image.handle for image in others)))

    # -- from events to a response -------------------------------------------------------------------------------------

    def _events(self, prepared: PreparedCall) -> AsyncGenerator[JobEvent]:
        listen = Listen(partials=prepared.call.partial_images > 0)
        return calls.follow(self._service, prepared.request, prepared.context, listen)

    async def _respond(self, prepared: PreparedCall, request: Request, send: Send) -> None:
        """Answer with one JSON body when every image is there."""
        saved: list[SavedImage] = []
        warnings: tuple[str, ...] = ()
        try:
            async with aclosing(self._events(prepared)) as events:
                async for event in events:
                    if isinstance(event, ImageSaved):
                        saved.append(event.saved)
                    elif isinstance(event, Done):
                        warnings = event.warnings
            items = [await self._item(prepared.call, image, request) for image in saved]
            sizes = [(image.width, image.height) for image in saved]
            usage = payloads.usage(prepared.call.prompt, prepared.references, sizes)
            content = payloads.images_response(_as_made(prepared.call, saved), items, sizes[0], usage)
            if warnings:
                content["warnings"] = list(warnings)
            response = JSONResponse(content, headers=_headers(prepared.call, saved))
        except Exception as exc:
            response = to_api_error(exc).response()
        await response(request.scope, request.receive, send)

    async def _stream(self, prepared: PreparedCall, request: Request, send: Send) -> None:
        """Answer with events: partial images, then each image when it is there."""
        call = prepared.call
        stream = EventStream(request.scope, request.receive, send, _headers(call, ()))
        steps: dict[int, int] = {}
        partials: deque[tuple[int, Preview]] = deque()
        sent = 0
        made: list[SavedImage] = []
        completed: dict[str, Any] = {}
        try:
            async with aclosing(self._events(prepared)) as events:
                async for event in events:
                    match event:
                        # After a crash of the engine the image is made again, from its first step on.
                        case Progressed(image, Step(step), partial=Preview() as new) if step > steps.get(image, 0):
                            steps[image] = step
                            partials.append((image, new))
                        case ImageSaved(saved=saved):
                            made.append(saved)
                            completed, sent = await self._completed(prepared, saved, request), 0
                            if len(made) < call.n:  # the last waits for the warnings of the whole job
                                await stream.event(completed)
                        case Done(warnings):
                            await stream.event(_with_warnings(completed, warnings, made))
                        case _:
                            await stream.idle()
                    while partials and partials[0][0] == len(made):  # else the image before it is still being saved
                        _, partial = partials.popleft()
                        await stream.event(await self._partial(call, partial, sent))
                        sent += 1
            await stream.finish()
        except Exception as exc:
            await stream.fail(to_api_error(exc))

    async def _completed(self, prepared: PreparedCall, saved: SavedImage, request: Request) -> dict[str, Any]:
        """Return the event of a finished image."""
        call, size = prepared.call, (saved.width, saved.height)
        item = await self._item(call, saved, request)
        if warnings := [*saved.warnings, *prepared.request.warnings]:
            item["warnings"] = warnings
        usage = payloads.usage(call.prompt, prepared.references, [size])
        return payloads.completed_event(self._operation, _as_made(call, [saved]), item, size, usage)

    async def _partial(self, call: ImageCall, partial: Preview, index: int) -> dict[str, Any]:
        png = partial.data
        encoded = partial.base64
        if call.output_format != "png":
            data = await anyio.to_thread.run_sync(render.encode, png, call.output_format, call.compression)
            encoded = base64.b64encode(data).decode()
        return payloads.partial_event(self._operation, call, encoded, index, render.png_size(png))

    async def _item(self, call: ImageCall, saved: SavedImage, request: Request) -> dict[str, Any]:
        """Return one entry of `data`.

        handle, seed and model are extensions: both SDKs keep unknown keys.
        """
        own = {"handle": saved.handle, "seed": str(saved.seed), "model": saved.model}
        opaque = call.background == "opaque" and saved.alpha is not None  # the library keeps its alpha
        if call.as_url:
            link = self._http.urls.absolute(request)(saved.handle, call.output_format)
            return {"url": link + OPAQUE_LINK if opaque else link, **own}

        def encode() -> str:
            data = render.outgoing(self._service, saved.handle, call.output_format, call.compression, opaque=opaque)
            return base64.b64encode(data).decode()

        return {"b64_json": await anyio.to_thread.run_sync(encode), **own}


def _check_format(call: ImageCall, request: ImageRequest, references: Sequence[tuple[int, int]]) -> None:
    """Raise ApiError if the format cannot store an edit.

    A size that is asked for, and a model's own, fit into every format.
    """
    if not isinstance(request.size, KeepSource):
        return
    from klein_mcp.images import codec

    try:
        codec.check_sides(call.output_format, *references[0])
    except RequestError as exc:
        raise replace(to_api_error(exc), param="output_format") from None


def _as_made(call: ImageCall, saved: list[SavedImage]) -> ImageCall:
    """Return the call with the background that the images have.

    One that was asked for may have failed its checks, and an edit of a transparent image stays transparent unless
    it is to be opaque.
    """
    flat = call.output_format == "jpeg" or call.background == "opaque"
    return replace(call, background="transparent" if not flat and all(image.alpha for image in saved) else "opaque")


def _with_warnings(completed: dict[str, Any], warnings: Sequence[str], made: Sequence[SavedImage]) -> dict[str, Any]:
    """Add a job's warnings to the event of its last image.

    Those that begin with handles came with these images.
    """
    handles = tuple(image.handle for image in made)
    of_all = [warning for warning in warnings if not warning.startswith(handles)]
    found = list(dict.fromkeys([*completed.get("warnings", ()), *of_all]))
    return {**completed, "warnings": found} if found else completed


def _headers(call: ImageCall, saved: list[SavedImage] | tuple[()]) -> dict[str, str]:
    headers = {}
    if names := [name for name in call.ignored if re.fullmatch(r"[\w.\-\[\]]{1,40}", name, re.ASCII)]:
        headers["x-klein-ignored"] = ", ".join(names[:20])
    if len(saved) == 1:
        cache = ", ".join(f"{name}={use}" for name, use in saved[0].cache.items())
        headers |= {"x-klein-handle": saved[0].handle, "x-klein-seed": str(saved[0].seed)}
        headers |= {"x-klein-model": saved[0].model, "x-klein-cache": cache}
    return headers
