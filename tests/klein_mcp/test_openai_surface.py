"""The OpenAI surface around a fake executor: keys, CORS, statuses, the library."""

import base64
import io
import json
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import anyio
import httpx2
import numpy as np
import openai
import pytest
from mcp import Client
from openai import AsyncOpenAI
from PIL import Image
from starlette.requests import Request

from engine.contract import BadWeights, Busy, Job, OutOfMemory, Rgb8, Stage, Step
from klein_mcp.http import a1111, app
from klein_mcp.http.openai import images
from klein_mcp.http.openai.body import Body, read_edit, read_json
from klein_mcp.jobs import save
from klein_mcp.jobs.events import JobEvent, Progressed
from klein_mcp.jobs.maker import ALIKE_DRAFTS
from klein_mcp.jobs.record import JobRecord
from klein_mcp.jobs.service import Service
from tests.fakes import FakeExecutor, painted
from tests.images import file, pixels, scene
from tests.tool_calls import call

pytestmark = pytest.mark.anyio

TOKEN = "a-token-of-our-own-making"
PAGE = "http://localhost:5173"


@pytest.fixture
def connect_http(service: Service) -> Callable[..., Any]:
    @asynccontextmanager
    async def connect(token: str | None = None) -> AsyncIterator[httpx2.AsyncClient]:
        served = app.application(app.make_context(service), token=token)
        async with httpx2.AsyncClient(
            transport=httpx2.ASGITransport(app=served), base_url="http://localhost"
        ) as client:
            yield client

    return connect


@asynccontextmanager
async def sdk(http: httpx2.AsyncClient, key: str = "anything", retries: int = 0) -> AsyncIterator[AsyncOpenAI]:
    yield AsyncOpenAI(base_url="http://localhost/v1", api_key=key, http_client=http, max_retries=retries)


async def test_loopback_takes_any_key_or_none(connect_http):
    async with connect_http() as http, sdk(http) as client:
        assert (await client.images.generate(prompt="x")).data
        assert (await http.post("/v1/images/generations", json={"prompt": "x"})).status_code == 200


async def test_elsewhere_the_token_is_the_key(connect_http):
    async with connect_http(TOKEN) as http:
        async with sdk(http, TOKEN) as client:
            assert (await client.images.generate(prompt="x")).data
        for key in ("wrong", TOKEN + "x"):
            async with sdk(http, key) as client:
                with pytest.raises(openai.AuthenticationError) as caught:
                    await client.images.generate(prompt="x")
                assert caught.value.code == "invalid_api_key"
                with pytest.raises(openai.AuthenticationError):
                    await client.models.list()


async def test_a1111_takes_the_token_as_basic_password(connect_http):
    async with connect_http(TOKEN) as http:
        for password, status in ((TOKEN, 200), ("wrong", 401), ("", 401)):
            basic = base64.b64encode(f"user:{password}".encode()).decode()
            answer = await http.get("/sdapi/v1/options", headers={"authorization": f"Basic {basic}"})
            assert answer.status_code == status
        assert (await http.get("/sdapi/v1/options", headers={"authorization": "Basic %%%"})).status_code == 401


async def test_interrupt_stops_only_what_is_made_for_its_client(connect_http, painter: FakeExecutor):
    painter.events_before = [Step(1, 4)]
    painter.seconds_per_step = 60.0
    images: dict[str, int] = {}
    async with connect_http() as http, anyio.create_task_group() as tasks:

        async def paint(prompt: str, client: str) -> None:
            answer = await http.post("/sdapi/v1/txt2img", params={"client": client}, json={"prompt": prompt})
            images[prompt] = len(answer.json()["images"])

        async def until(client: str, **state: int) -> None:
            with anyio.fail_after(60):
                while not state.items() <= (await progress(client)).items():
                    await anyio.sleep(0.01)

        async def progress(client: str) -> dict[str, Any]:
            return (await http.get("/sdapi/v1/progress", params={"client": client})).json()["state"]

        async def interrupt(client: str) -> None:
            await http.post("/sdapi/v1/interrupt", params={"client": client})

        tasks.start_soon(paint, "first", "one")
        await until("one", job_count=1, sampling_step=1)
        tasks.start_soon(paint, "second", "one")
        tasks.start_soon(paint, "other", "two")
        await until("one", job_count=2)
        await until("two", job_count=1)
        await interrupt("two")
        assert not (await progress("one"))["interrupted"]
        await interrupt("one")
        with anyio.fail_after(60):
            while not images:
                await anyio.sleep(0.01)
        painter.hurry()
    assert images == {"first": 0, "second": 1, "other": 1}


def encoded(image: Any) -> str:
    return base64.b64encode(file(image)).decode()


async def test_a1111_repeats_no_image_of_the_request(connect_http):
    body = {"prompt": "x", "init_images": [encoded(scene(32, 32))], "mask": encoded(scene(32, 32)), "seed": 3}
    async with connect_http() as http:
        answer = (await http.post("/sdapi/v1/img2img", json=body)).json()
    assert len(answer["images"]) == 1
    assert answer["parameters"] == {"prompt": "x", "init_images": None, "mask": None, "seed": 3}


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("img2img", {"prompt": "x", "init_images": ["AAAA", "AAAA"], "mask": "AAAA"}, "mask is of one image"),
        ("txt2img", {"prompt": "x" * 32_001}, "at most 32000"),
    ],
)
async def test_a1111_refuses_what_it_cannot_honour(connect_http, path: str, body: Any, message: str):
    async with connect_http() as http:
        answer = await http.post(f"/sdapi/v1/{path}", json=body)
    assert answer.status_code == 422
    assert message in answer.json()["detail"]


async def test_a1111_lists_embeddings_as_an_object(connect_http):
    async with connect_http() as http:
        assert (await http.get("/sdapi/v1/embeddings")).json() == {"loaded": {}, "skipped": {}}


class ReadFields(dict[str, Any]):
    """Fields of a body that a test can watch being dropped."""


class ReadBody(Body):
    """The same of an edit."""


@pytest.mark.parametrize("path", ["/sdapi/v1/img2img", "/v1/images/edits"])
async def test_sent_images_leave_the_memory_before_their_job(
    connect_http, painter: FakeExecutor, monkeypatch: pytest.MonkeyPatch, path: str
):
    bodies: list[weakref.ref[Any]] = []
    left: list[bool] = []

    async def read_fields(request: Request) -> ReadFields:
        fields = ReadFields(await read_json(request))
        bodies.append(weakref.ref(fields))
        return fields

    async def read_body(request: Request) -> ReadBody:
        read = await read_edit(request)
        body = ReadBody(read.fields, read.images, read.mask)
        bodies.append(weakref.ref(body))
        return body

    def paint(job: Job) -> Rgb8:
        left.append(bodies[0]() is None)
        return painted(job)

    monkeypatch.setattr(a1111, "read_json", read_fields)
    monkeypatch.setattr(images, "read_edit", read_body)
    monkeypatch.setattr(painter, "paint", paint)
    image = f"data:image/png;base64,{encoded(scene(32, 32))}"
    async with connect_http() as http:
        await http.post(path, json={"prompt": "make it red", "image": image, "init_images": [image]})
    assert left == [True]


async def test_full_queue_is_429_with_a_time_to_retry(connect_http, painter: FakeExecutor):
    painter.error = Busy("The queue is full.", retry_after=2.5)
    async with connect_http() as http, sdk(http) as client:
        with pytest.raises(openai.RateLimitError, match="queue is full") as caught:
            await client.images.generate(prompt="x")
        assert caught.value.response.headers["retry-after"] == "3"


async def test_sdk_retries_a_full_queue_and_nothing_that_stays_wrong(connect_http, painter: FakeExecutor):
    async with connect_http() as http, sdk(http, retries=2) as client:
        for error, attempts, kind in (
            (Busy("full", retry_after=0.1), 3, openai.RateLimitError),
            (OutOfMemory("too large for 8 GB"), 1, openai.BadRequestError),
            (BadWeights("model.safetensors is cut short"), 1, openai.InternalServerError),
        ):
            painter.error, before = error, len(painter.jobs)
            with pytest.raises(kind):
                await client.images.generate(prompt="x")
            assert len(painter.jobs) - before == attempts


async def test_stream_repeats_no_partial_image_after_a_crash(connect_http, painter: FakeExecutor):
    painter.events_before = [Step(step, 4, partial=scene(16, 16)) for step in (1, 2, 1, 2, 3)]
    async with connect_http() as http, sdk(http) as client:
        stream = await client.images.generate(prompt="x", stream=True, partial_images=3)
        *partials, completed = [event async for event in stream]
    assert [event.partial_image_index for event in partials] == [0, 1, 2]  # type: ignore[union-attr]
    assert completed.type == "image_generation.completed"


async def test_stream_shows_partials_of_an_image_behind_the_one_before(
    connect_http, painter: FakeExecutor, monkeypatch: pytest.MonkeyPatch
):
    painter.events_before = [Step(step, 4, partial=scene(16, 16)) for step in (1, 2)]
    shown, publish, store = threading.Event(), JobRecord.publish, save.save

    def noted(job: JobRecord, event: JobEvent) -> None:
        publish(job, event)
        if isinstance(event, Progressed) and event.image == 1 and isinstance(event.event, Stage):
            shown.set()

    def late(*arguments: Any) -> Any:
        assert shown.wait(60), "the second image is computed while the first one is saved"
        return store(*arguments)

    monkeypatch.setattr(JobRecord, "publish", noted)
    monkeypatch.setattr(save, "save", late)
    async with connect_http() as http, sdk(http) as client:
        stream = await client.images.generate(prompt="x", n=2, stream=True, partial_images=2)
        events = [(event.type.split(".")[1], getattr(event, "partial_image_index", None)) async for event in stream]
    assert events == 2 * [("partial_image", 0), ("partial_image", 1), ("completed", None)]


async def test_last_event_of_a_stream_has_the_warnings_of_the_job(connect_http, painter: FakeExecutor):
    painter.paint = lambda job: scene(128, 128)
    async with connect_http() as http, sdk(http) as client:
        stream = await client.images.generate(prompt="x", n=2, stream=True)
        first, last = [event async for event in stream]
    assert not hasattr(first, "warnings")
    assert last.warnings == [ALIKE_DRAFTS]  # type: ignore[union-attr]


async def test_last_of_an_agent_is_not_moved(connect_http, client: Client):
    mine = await call(client, "generate_image", prompt="a dot")
    async with connect_http() as http, sdk(http) as api:
        await api.images.generate(prompt="another dot")
        await api.images.edit(image=("x.png", file(scene(64, 64))), prompt="make it red")
    assert (await call(client, "view_image", image="last"))["image"] == mine["image"]


async def test_returned_image_is_recognised_by_its_pixels(connect_http, service: Service):
    async with connect_http() as http, sdk(http) as api:
        (first,) = (await api.images.generate(prompt="a dot")).data or []
        # Encoded anew: only the pixels are the same.
        image = ("x.bmp", file(pixels(base64.b64decode(first.b64_json or "")), "BMP"))
        (edited,) = (await api.images.edit(image=image, prompt="make it red")).data or []
    assert service.store.get(edited.handle).parents == (first.handle,)  # type: ignore[attr-defined]


async def test_warnings_about_sent_files_are_in_the_answer(connect_http):
    frames = [Image.fromarray(scene(64, 64)), Image.fromarray(scene(64, 64)[::-1])]
    moving = file(frames[0], "GIF", save_all=True, append_images=frames[1:])
    async with connect_http() as http:
        for stream in ("", "true"):
            fields = {"prompt": "make it red", "stream": stream}
            answer = await http.post("/v1/images/edits", data=fields, files={"image": ("x.gif", moving, "image/gif")})
            assert answer.status_code == 200
            assert "image 1 has several frames; only the first one is used." in answer.text


@pytest.mark.parametrize(("background", "expected"), [("opaque", ("opaque", "RGB")), ("auto", ("transparent", "RGBA"))])
@pytest.mark.parametrize("kind", ["png", "webp"])
async def test_opaque_background_is_honoured_and_reported(
    connect_http, painter: FakeExecutor, kind: str, background: str, expected: tuple[str, str]
):
    painter.paint = lambda job: job.references[0]  # nothing that would cover the background
    disc = np.dstack([scene(64, 64), np.zeros((64, 64), np.uint8)])
    disc[16:48, 16:48, 3] = 255
    fields = {"prompt": "make it red", "background": background, "output_format": kind}

    async def edited(http: httpx2.AsyncClient, **more: str) -> Any:
        sent = {"image": ("disc.png", file(disc), "image/png")}
        answer = await http.post("/v1/images/edits", data={**fields, **more}, files=sent)
        assert answer.status_code == 200, answer.text
        return answer

    async with connect_http() as http:
        whole = (await edited(http)).json()
        linked = (await edited(http, response_format="url")).json()
        streamed = await edited(http, stream="true")
        event = json.loads(streamed.text.split("data: ")[1].split("\n")[0])
        download = await http.get(linked["data"][0]["url"])
    for answer, content in (
        (whole, base64.b64decode(whole["data"][0]["b64_json"])),
        (linked, download.content),
        (event, base64.b64decode(event["b64_json"])),
    ):
        with Image.open(io.BytesIO(content)) as image:
            assert (answer["background"], image.mode) == expected


@pytest.mark.parametrize(("kind", "side"), [("webp", 16_384), ("jpeg", 65_504)])
async def test_format_without_room_for_the_image_is_refused_before_the_job(
    connect_http, painter: FakeExecutor, kind: str, side: int
):
    fields = {"prompt": "make it red", "output_format": kind}
    wide = {"image": ("wide.png", file(scene(side, 8)), "image/png")}
    async with connect_http() as http:
        for more in ({}, {"response_format": "url"}, {"stream": "true"}):
            answer = await http.post("/v1/images/edits", data={**fields, **more}, files=wide)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "output_format")
            assert f"{kind} cannot store it: a side has {side} pixels" in answer.text
    assert not painter.jobs


async def test_unknown_handle_names_no_tool_of_mcp(connect_http):
    async with connect_http() as http:
        answer = await http.post("/v1/images/edits", json={"prompt": "x", "images": [{"image_url": "zzzzzz"}]})
        assert answer.json()["error"]["message"] == 'There is no image "zzzzzz". klein-mcp studio shows all.'


async def test_address_that_is_none_is_an_error_of_the_caller(connect_http):
    async with connect_http() as http:
        answer = await http.post("/v1/images/edits", json={"prompt": "make it red", "image": "http://[x"})
    assert 400 <= answer.status_code < 500
    assert answer.json()["error"]["param"] == "image"


@pytest.mark.parametrize("allowed", [True, False])
async def test_pages_of_named_origins_may_call_and_no_others(connect_http, service: Service, allowed: bool):
    service.settings = replace(
        service.settings, cors=("http://other.example", *([PAGE.replace("localhost", "page")] * allowed))
    )
    page = {"origin": PAGE.replace("localhost", "page")}
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    async with connect_http(TOKEN) as http:
        preflight = await http.options("/v1/images/generations", headers={**page, **asks})
        answer = await http.get("/v1/models", headers={**page, "authorization": f"Bearer {TOKEN}"})
        refused = await http.get("/v1/models", headers=page)
        body = {"prompt": "x", "response_format": "url"}
        made = await http.post("/v1/images/generations", json=body, headers={"authorization": f"Bearer {TOKEN}"})
        link = await http.get(made.json()["data"][0]["url"], headers=page)
        other = await http.post("/mcp", headers={**page, "authorization": f"Bearer {TOKEN}"})
    assert other.status_code == 403
    if not allowed:
        assert (preflight.status_code, answer.status_code, link.status_code) == (403, 403, 403)
        assert "KLEIN_CORS" in answer.json()["error"]["message"]
        assert "access-control-allow-origin" not in {**preflight.headers, **answer.headers}
        return
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-headers"] == "authorization,content-type"
    assert (answer.status_code, refused.status_code, link.status_code) == (200, 401, 200)
    for response in (preflight, answer, refused, link):
        assert response.headers["access-control-allow-origin"] == page["origin"]
        assert "access-control-allow-credentials" not in response.headers
