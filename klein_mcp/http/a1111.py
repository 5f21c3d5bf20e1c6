"""/sdapi/v1: the routes of AUTOMATIC1111's web UI that clients call."""

import base64
import json
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import anyio.to_thread
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from engine.contract import MIN_SIDE, Queued, Step
from klein_mcp.errors import RequestError, quote
from klein_mcp.http import calls, render
from klein_mcp.http.disconnect import cancelled_on_disconnect
from klein_mcp.http.openai.body import read_json
from klein_mcp.http.openai.errors import ApiError
from klein_mcp.http.openai.fields import MAX_IMAGES, MAX_PROMPT, integer, parse_model, parse_seed
from klein_mcp.http.openai.models import naming_installed
from klein_mcp.http.surface import HttpContext, Surface
from klein_mcp.images.library import Record
from klein_mcp.jobs import request as requests
from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.events import ImageSaved, Listen, Progressed
from klein_mcp.jobs.installed import installed_models
from klein_mcp.jobs.request import ImageRequest
from klein_mcp.jobs.results import Preview, SavedImage
from klein_mcp.limits import MAX_SIDE
from klein_mcp.mcp_server.sender import http_client

SAMPLERS = [{"name": "Euler", "aliases": ["euler"], "options": {}}]
SCHEDULERS = [
    {"name": "automatic", "label": "Automatic", "aliases": None, "default_rho": -1, "need_inner_model": False}
]

EMPTY_LISTS = ("upscalers", "latent-upscale-modes", "sd-vae", "sd-modules", "loras", "prompt-styles")
"""Menus that clients fill at their start and that have no entries here."""

FILES = ("init_images", "mask", "alwayson_scripts")
"""Fields that hold images, of up to 96 MiB: they leave the memory before the job waits, and no answer repeats them."""


@dataclass(eq=False, slots=True)
class Running:
    """A job of this surface, for `progress` and `interrupt`.

    waiting: it is in the queue, and no engine has begun it.
    """

    cancel: anyio.CancelScope
    client: str
    count: int
    waiting: bool = True
    image: int = 0
    step: int = 0
    steps: int = 0
    preview: Preview | None = None
    interrupted: bool = False

    @property
    def progress(self) -> float:
        share = self.step / self.steps if self.steps else 0.0
        return (self.image + min(share, 0.99)) / self.count


@dataclass(eq=False, slots=True)
class State:
    """The checkpoint that a client chose for all, and running jobs."""

    model: str = "auto"
    running: list[Running] = field(default_factory=list)

    def jobs_of(self, client: str) -> list[Running]:
        """Return one client's jobs, those that were begun first."""
        return sorted((each for each in self.running if each.client == client), key=lambda each: each.waiting)


def surface(context: HttpContext) -> Surface:
    state = State()
    queries = Queries(context, state)
    prefix = "/sdapi/v1"
    routes = [
        Route(f"{prefix}/txt2img", ImageRoute(context, state, edit=False), methods=["POST"]),
        Route(f"{prefix}/img2img", ImageRoute(context, state, edit=True), methods=["POST"]),
        Route(f"{prefix}/sd-models", queries.models, methods=["GET"]),
        Route(f"{prefix}/options", queries.options, methods=["GET", "POST"]),
        Route(f"{prefix}/progress", queries.progress, methods=["GET"]),
        Route(f"{prefix}/interrupt", queries.interrupt, methods=["POST"]),
        Route(f"{prefix}/samplers", _listing(SAMPLERS), methods=["GET"]),
        Route(f"{prefix}/schedulers", _listing(SCHEDULERS), methods=["GET"]),
        Route(f"{prefix}/embeddings", _listing({"loaded": {}, "skipped": {}}), methods=["GET"]),
        *(Route(f"{prefix}/{name}", _listing([]), methods=["GET"]) for name in EMPTY_LISTS),
        Route(f"{prefix}/{{path:path}}", _unknown, methods=["GET", "POST"]),
    ]
    return Surface("a1111", routes, "token", error=_error, cross_origin=True)


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": message, "detail": message, "errors": message}, status)


def _listing(content: list[dict[str, Any]] | dict[str, Any]) -> Any:
    async def answer(request: Request) -> Response:
        return JSONResponse(content)

    return answer


async def _unknown(request: Request) -> Response:
    return _error(404, f"{request.method} {request.url.path} is not among the routes of A1111 that are served here.")


class Queries:
    """The routes that make no image."""

    def __init__(self, context: HttpContext, state: State) -> None:
        self._context = context
        self._state = state

    async def _names(self) -> list[str]:
        return ["auto", *await installed_models(self._context.service)]

    async def models(self, request: Request) -> Response:
        rows = [
            {"title": name, "model_name": name, "hash": None, "sha256": None, "filename": name, "config": None}
            for name in await self._names()
        ]
        return JSONResponse(rows)

    async def options(self, request: Request) -> Response:
        """Return the options, or choose a checkpoint.

        Other options are accepted and have no effect.
        """
        if request.method == "POST":
            try:
                chosen = (await read_json(request)).get("sd_model_checkpoint")
            except ApiError as exc:
                return _error(exc.status, exc.message)
            chosen = chosen.strip().lower() if isinstance(chosen, str) else chosen
            if chosen is not None and chosen not in (names := await self._names()):
                return _error(404, f"There is no model {quote(chosen)}. There are {', '.join(names)}.")
            self._state.model = chosen or self._state.model
            return JSONResponse(None)
        return JSONResponse({"sd_model_checkpoint": self._state.model, "samples_format": "png"})

    async def progress(self, request: Request) -> Response:
        jobs = self._state.jobs_of(http_client(request))
        running = jobs[0] if jobs else None
        hide = request.query_params.get("skip_current_image", "false").lower() in ("true", "1")
        preview = None if running is None or hide or running.preview is None else running.preview.base64
        state = {
            "skipped": False,
            "interrupted": bool(running and running.interrupted),
            "job": "txt2img" if running else "",
            "job_count": len(jobs),
            "job_no": running.image if running else 0,
            "sampling_step": running.step if running else 0,
            "sampling_steps": running.steps if running else 0,
        }
        share = running.progress if running else 0.0
        return JSONResponse(
            {"progress": share, "eta_relative": 0.0, "state": state, "current_image": preview, "textinfo": None}
        )

    async def interrupt(self, request: Request) -> Response:
        """Stop what is being made for this client, within a step.

        What waits in the queue stays there, and so do all jobs of other clients.
        """
        for running in self._state.jobs_of(http_client(request)):
            if not running.waiting:
                running.interrupted = True
                running.cancel.cancel()
        return JSONResponse({})


class ImageRoute:
    """txt2img or img2img, an ASGI application that notices when its client disconnects."""

    def __init__(self, context: HttpContext, state: State, *, edit: bool) -> None:
        self._http = context
        self._state = state
        self._edit = edit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            parameters, wanted = await self._read(request)
        except ClientDisconnect:
            raise
        except Exception as exc:
            response = await self._failure(exc)
            await response(scope, receive, send)
            return
        async with cancelled_on_disconnect(receive):
            try:
                response = JSONResponse({**await self._run(wanted, request), "parameters": parameters})
            except Exception as exc:
                response = await self._failure(exc)
            await response(scope, receive, send)

    async def _failure(self, exc: Exception) -> Response:
        error = await naming_installed(exc, self._http.service)
        response = _error(error.status, error.message)
        response.headers.update(error.headers)
        return response

    async def _read(self, request: Request) -> tuple[dict[str, Any], ImageRequest]:
        """Return the fields that an answer repeats, and the request.

        Raises RequestError or ApiError.
        """
        fields = await read_json(request)
        wanted = await self._request(fields, request)
        return {name: None if name in FILES else value for name, value in fields.items()}, wanted

    async def _request(self, fields: Mapping[str, Any], request: Request) -> ImageRequest:
        """Build the request. Raises RequestError or ApiError.

        Steps, guidance and samplers are left to the model: every client sends the values of Stable Diffusion.
        """
        given = {name: value for name, value in fields.items() if value is not None and value != ""}
        prompt = given.get("prompt", "")
        if not isinstance(prompt, str) or not (prompt := prompt.strip()):
            raise ApiError(422, "prompt is missing or empty; it must be text.", "prompt")
        if len(prompt) > MAX_PROMPT:
            raise ApiError(422, f"prompt has {len(prompt)} characters; at most {MAX_PROMPT}.", "prompt")
        count = _count("batch_size", given.get("batch_size", 1)) * _count("n_iter", given.get("n_iter", 1))
        if count > MAX_IMAGES:
            raise ApiError(422, f"{count} images; at most {MAX_IMAGES}.", "batch_size")
        override = given.get("override_settings")
        chosen = override.get("sd_model_checkpoint") if isinstance(override, Mapping) else None
        model = parse_model("sd_model_checkpoint", chosen or self._state.model)
        common: dict[str, Any] = {
            "prompt": prompt,
            "count": count,
            "seed": parse_seed("seed", given.get("seed", -1)),
            "model": self._http.service.model(None if model == "auto" else model),
        }
        if self._edit:
            return await self._edit_request(given, common, calls.call_context(self._http, request, "a1111"))
        width, height = _size(given)
        return requests.generate(width=width, height=height, **common)

    async def _edit_request(
        self, given: Mapping[str, Any], common: Mapping[str, Any], call: CallContext
    ) -> ImageRequest:
        """Import images and mask, and request an edit or a composition."""
        width, height = _size(given)
        files = given.get("init_images") or []
        files = files if isinstance(files, list) else [files]
        if not files:
            raise ApiError(422, "init_images is empty: the image to edit.", "init_images")
        if len(files) > 1 and "mask" in given:
            raise ApiError(422, f"mask is of one image, and init_images has {len(files)}.", "mask")
        opened = [await calls.import_image(self._http, _data_url(file), "init_images", call) for file in files]
        images = [image.record for image in opened]
        if len(images) > 1:
            return requests.compose([image.handle for image in images], width=width, height=height, **common)
        (image,) = images
        mask = await self._mask(given, image, call)
        if mask or (width, height) == (image.width, image.height):
            width = height = None
        return requests.edit(image.handle, mask=mask, width=width, height=height, **common)

    async def _mask(self, given: Mapping[str, Any], image: Record, call: CallContext) -> str | None:
        if "mask" not in given:
            return None
        file = _data_url(given["mask"])
        inverted = str(given.get("inpainting_mask_invert", 0)).lower() in ("1", "true")
        mask = await anyio.to_thread.run_sync(_mask_file, file, inverted, (image.width, image.height))
        return (await calls.import_image(self._http, mask, "The mask", call, mask=True)).record.handle

    async def _run(self, wanted: ImageRequest, request: Request) -> dict[str, Any]:
        """Run the job and return its images and their description.

        Those of an interrupted job are the images made so far.
        """
        call = calls.call_context(self._http, request, "a1111")
        saved: list[SavedImage] = []
        with anyio.CancelScope() as scope:
            running = Running(scope, http_client(request), wanted.count)
            self._state.running.append(running)
            try:
                async with aclosing(calls.follow(self._http.service, wanted, call, Listen(steps=True))) as events:
                    async for event in events:
                        if isinstance(event, Progressed):
                            # Between two images, or two parts of one, a job is in the queue again.
                            first = (event.image, event.part) == (0, 0)
                            running.waiting = first and isinstance(event.event, Queued)
                        match event:
                            case Progressed(image, Step(done, total), preview):
                                running.image, running.step, running.steps = image, done, total
                                running.preview = preview or running.preview
                            case ImageSaved(saved=made):
                                saved.append(made)
            finally:
                self._state.running.remove(running)

        def encode() -> list[str]:
            files = [render.outgoing(self._http.service, image.handle) for image in saved]
            return [base64.b64encode(data).decode() for data in files]

        images = await anyio.to_thread.run_sync(encode)
        return {"images": images, "info": json.dumps(_info(wanted, saved))}


def _info(wanted: ImageRequest, saved: list[SavedImage]) -> dict[str, Any]:
    """Describe the images as the original does, in text that is JSON."""
    first = saved[0] if saved else None
    return {
        "prompt": wanted.prompt,
        "all_prompts": [wanted.prompt] * len(saved),
        "negative_prompt": "",
        "seed": first.seed if first else wanted.seed,
        "all_seeds": [image.seed for image in saved],
        "width": first.width if first else 0,
        "height": first.height if first else 0,
        "steps": first.steps if first else 0,
        "cfg_scale": first.guidance if first else 0,
        "sampler_name": "Euler",
        "sd_model_name": first.model if first else wanted.model,
        "infotexts": [f"{wanted.prompt}\nSeed: {image.seed}, Model: {image.model}" for image in saved],
        "handles": [image.handle for image in saved],
        "warnings": list(dict.fromkeys(warning for image in saved for warning in image.warnings)),
    }


def _count(name: str, value: Any) -> int:
    return integer(1, MAX_IMAGES)(name, value)


def _size(given: Mapping[str, Any]) -> tuple[int | None, int | None]:
    if "width" not in given and "height" not in given:
        return None, None
    side = integer(MIN_SIDE, MAX_SIDE)
    return side("width", given.get("width", 512)), side("height", given.get("height", 512))


def _data_url(value: Any) -> str:
    """Return base64 text as a data: URL. Raises RequestError."""
    if not isinstance(value, str):
        raise RequestError("An image must be base64 text.", hint="A data: URL will do too.")
    if value.startswith("data:"):
        return value
    return f"data:;base64,{value}"


def _mask_file(data_url: str, inverted: bool, size: tuple[int, int]) -> bytes:
    """Return a mask of the image's size, white where it may change.

    A1111 reads a mask's alpha the other way round than OpenAI does, and resizes masks. Raises BadImage.
    """
    from klein_mcp.images import codec, mask
    from klein_mcp.images.budget import DECODING

    data = calls.to_bytes(data_url, "The mask")
    width, height = size
    with DECODING.reserve(max(codec.declared_pixels(data), width * height)):
        white = codec.resize(mask.drawn(codec.decode(data, "The mask", backdrop=0)), width, height)
        return codec.encode(255 - white if inverted else white)
