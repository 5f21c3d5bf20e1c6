"""The studio's server side: who is let in, what it reads and changes, whom a pick reaches, and its calls."""

import base64
import hashlib
import io
import json
import re
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from typing import Any

import anyio
import httpx2
import numpy as np
import pytest
from mcp import Client
from mcp.client.extension import advertise
from mcp.server.apps import APP_MIME_TYPE, EXTENSION_ID
from mcp_types import CallToolResult, TextContent
from PIL import Image

from klein_mcp.http import app as http_app
from klein_mcp.http import studio as http_studio
from klein_mcp.http.page_calls import MOST_ANSWERS, PageCalls, UnknownCall
from klein_mcp.http.surface import HttpContext
from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.manager import JobManager
from klein_mcp.jobs.request import generate
from klein_mcp.jobs.service import Service
from klein_mcp.mcp_server.server import create_server
from klein_mcp.studio.feed import Feed
from klein_mcp.studio.picks import STUDIO
from tests.fakes import FakeExecutor

pytestmark = pytest.mark.anyio

BASE = "http://127.0.0.1:8765"
APPS = advertise(EXTENSION_ID, {"mimeTypes": [APP_MIME_TYPE]})


def line(result: Any) -> dict[str, Any]:
    return json.loads(result.content[0].text)


@pytest.fixture
def context(service: Service) -> HttpContext:
    return http_app.make_context(service)


@pytest.fixture
async def browser(context: HttpContext) -> AsyncIterator[httpx2.AsyncClient]:
    """A browser that came by the one-time link and sends what a page sends."""
    transport = httpx2.ASGITransport(app=http_app.application(context), raise_app_exceptions=True)
    async with httpx2.AsyncClient(transport=transport, base_url=BASE) as client:
        await client.get(http_studio.link(context, BASE))
        csrf = (await client.get("/studio/session")).json()["csrf"]
        client.headers["x-csrf-token"] = csrf
        client.headers["origin"] = BASE
        yield client


@pytest.fixture
async def outsider(context: HttpContext) -> AsyncIterator[httpx2.AsyncClient]:
    transport = httpx2.ASGITransport(app=http_app.application(context))
    async with httpx2.AsyncClient(transport=transport, base_url=BASE) as client:
        yield client


async def call(browser: httpx2.AsyncClient, tool: str, **arguments: Any) -> dict[str, Any]:
    name = secrets.token_hex(4)
    answer = await browser.post("/studio/call", json={"tool": tool, "arguments": arguments, "call": name})
    return await result(browser, name, answer)


async def result(browser: httpx2.AsyncClient, name: str, answer: httpx2.Response | None = None) -> dict[str, Any]:
    """Ask after a call until its result is there."""
    with anyio.fail_after(120):
        while answer is None or answer.status_code == 202:
            await anyio.sleep(0.01)
            answer = await browser.get("/studio/result", params={"call": name})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def made(browser: httpx2.AsyncClient, prompt: str = "an apple", **arguments: Any) -> dict[str, Any]:
    result = await call(browser, "generate_image", prompt=prompt, **arguments)
    return json.loads(result["content"][0]["text"])


async def read(browser: httpx2.AsyncClient, uri: str) -> Any:
    answer = await browser.get("/studio/read", params={"uri": uri})
    assert answer.status_code == 200, answer.text
    return json.loads(answer.json()["contents"][0]["text"])


# -- who is let in --------------------------------------------------------------------------------------------------

GETS = (
    "/studio",
    "/studio/session",
    "/studio/result?call=c0",
    "/studio/events",
    "/studio/read?uri=klein://now",
    "/studio/images/abcdef",
)
POSTS = ("/studio/call", "/studio/cancel", "/studio/delete", "/studio/upload")


@pytest.mark.parametrize("path", GETS)
async def test_nothing_is_shown_without_a_session(outsider: httpx2.AsyncClient, path: str) -> None:
    assert (await outsider.get(path)).status_code == 401


@pytest.mark.parametrize("path", POSTS)
async def test_every_change_needs_session_and_csrf_token(
    browser: httpx2.AsyncClient, outsider: httpx2.AsyncClient, path: str
) -> None:
    assert (await outsider.post(path, json={})).status_code == 401
    token = browser.headers.pop("x-csrf-token")
    assert (await browser.post(path, json={})).status_code == 401
    assert (await browser.post(path, json={}, headers={"x-csrf-token": "0" * 64})).status_code == 401
    assert (await browser.get(path, headers={"x-csrf-token": token})).status_code == 405
    assert (await browser.post(path, json={}, headers={"x-csrf-token": token})).status_code != 401


@pytest.mark.parametrize("path", [*GETS, *POSTS])
async def test_other_origins_and_names_are_refused(browser: httpx2.AsyncClient, path: str) -> None:
    method = "POST" if path in POSTS else "GET"
    assert (await browser.request(method, path, headers={"origin": "https://evil.example"})).status_code == 403
    assert (await browser.request(method, path, headers={"host": "evil.example"})).status_code == 421


@pytest.mark.parametrize("path", POSTS)
async def test_another_server_of_this_machine_cannot_change_anything(browser: httpx2.AsyncClient, path: str) -> None:
    answer = await browser.post(path, json={}, headers={"origin": "http://127.0.0.1:3000"})
    assert answer.status_code == 403


async def test_bare_address_leads_to_the_studio(outsider: httpx2.AsyncClient) -> None:
    answer = await outsider.get("/")
    assert answer.status_code == 200
    assert 'url=/studio"' in answer.text
    for path in ("/", "/studio"):
        answer = await outsider.get(path, headers={"host": "<b>evil.example"})
        assert answer.status_code == 421
        assert "serve --allowed-host adds a name" in answer.text
        assert "&lt;b&gt;evil.example" in answer.text
        assert "<b>" not in answer.text


async def test_link_sets_a_strict_cookie_once(context: HttpContext, outsider: httpx2.AsyncClient) -> None:
    link = http_studio.link(context, BASE)
    first = await outsider.get(link)
    assert first.status_code == 200
    cookie = first.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert first.headers["cache-control"] == "no-store"
    outsider.cookies.clear()
    assert (await outsider.get(link)).status_code == 403
    assert (await outsider.head(http_studio.link(context, BASE))).status_code == 405


async def test_policy_allows_the_page_itself_and_nothing_else(browser: httpx2.AsyncClient) -> None:
    page = await browser.get("/studio")
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for tag, name in (("script", "script-src"), ("style", "style-src")):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[name] == f"'sha256-{digest}'"
    assert "unsafe" not in page.headers["content-security-policy"]


# -- reading and changing -------------------------------------------------------------------------------------------


async def test_page_generates_reads_and_deletes(browser: httpx2.AsyncClient, service: Service) -> None:
    handle = (await made(browser, seed=3))["image"]
    details = await read(browser, f"klein://images/{handle}/details")
    assert (details["prompt"], details["seed"], details["tool"]) == ("an apple", "3", "generate_image")
    full = await browser.get(f"/studio/images/{handle}")
    assert full.headers["content-type"] == "image/png"
    assert full.content == service.store.read(service.store.get(handle))
    thumb = await browser.get(f"/studio/images/{handle}/thumb")
    assert max(Image.open(io.BytesIO(thumb.content)).size) <= 256
    assert (await browser.post("/studio/delete", json={"images": [handle]})).status_code == 200
    assert (await browser.get(f"/studio/images/{handle}")).status_code == 404
    assert (await read(browser, "klein://library"))["images"] == []


@pytest.mark.parametrize(
    "uri",
    ["", "file:///etc/passwd", "klein://guide/../x", "klein://images/zzzzzz/details", "http://127.0.0.1/", "klein://"],
)
async def test_reading_anything_else_finds_nothing(browser: httpx2.AsyncClient, uri: str) -> None:
    assert (await browser.get("/studio/read", params={"uri": uri})).status_code == 404


@pytest.mark.parametrize("path", ["images/zzzzzz", "images/zzzzzz/thumb", "read?uri=klein://images/zzzzzz/details"])
async def test_missing_image_names_no_tool(browser: httpx2.AsyncClient, path: str) -> None:
    answer = await browser.get(f"/studio/{path}")
    assert answer.status_code == 404
    assert answer.json()["error"] == 'There is no image "zzzzzz". klein-mcp studio shows all.'


@pytest.mark.parametrize("body", [b"", b"[1]", b"{", b'{"tool": 1, "arguments": {}}', b'{"tool": "x"}', b"[" * 100_000])
async def test_broken_calls_are_refused(browser: httpx2.AsyncClient, body: bytes) -> None:
    assert (await browser.post("/studio/call", content=body)).status_code == 400


async def test_call_that_is_too_large_is_refused(browser: httpx2.AsyncClient) -> None:
    body = b'{"tool": "' + b"x" * (http_studio.MAX_CALL + 1) + b'"}'
    assert (await browser.post("/studio/call", content=body)).status_code == 413


async def test_errors_of_tools_are_results_in_words(browser: httpx2.AsyncClient) -> None:
    result = await call(browser, "generate_image", prompt="x", width=10, height=10)
    assert result["isError"]
    assert "width" in result["content"][0]["text"]
    assert (await call(browser, "no_such_tool"))["isError"]


async def test_uploaded_image_gets_a_handle_and_a_broken_one_an_error(browser: httpx2.AsyncClient) -> None:
    file = io.BytesIO()
    Image.new("RGB", (96, 64), (1, 2, 3)).save(file, "PNG")
    answer = await browser.post("/studio/upload", content=file.getvalue(), headers={"content-type": "image/png"})
    handle = answer.json()["image"]
    details = await read(browser, f"klein://images/{handle}/details")
    assert (details["width"], details["height"], details["tool"]) == (96, 64, "open")
    assert (await browser.post("/studio/upload", content=b"no image")).status_code == 400


async def test_engine_is_described_without_starting_one(browser: httpx2.AsyncClient, painter: FakeExecutor) -> None:
    engine = await read(browser, "klein://engine")
    assert engine["auto"] == "nano"
    assert [model["name"] for model in engine["models"] if model["installed"]] == ["nano"]
    assert engine["examples"]
    assert painter.jobs == []


# -- picks ----------------------------------------------------------------------------------------------------------


async def test_pick_in_the_browser_reaches_the_agent_that_made_the_image(
    browser: httpx2.AsyncClient, connect: Callable[..., Any]
) -> None:
    async with connect() as agent, connect() as other:
        drafts = [
            each["image"]
            for each in line(await agent.call_tool("generate_image", {"prompt": "x", "count": 3}))["images"]
        ]
        await other.call_tool("generate_image", {"prompt": "y"})
        await call(browser, "pick", image=drafts[0])
        assert "picked" not in line(await other.call_tool("view_image", {"image": "last"}))
        seen = line(await agent.call_tool("view_image", {"image": "last"}))
        assert (seen["image"], seen["picked"]) == (drafts[0], {"image": drafts[0]})
        assert list(seen)[:2] == ["image", "picked"]
        assert "picked" not in line(await agent.call_tool("list_images", {}))
        assert line(await agent.call_tool("view_image", {"image": "last~1"}))["image"] == drafts[2]
        newer = line(await agent.call_tool("generate_image", {"prompt": "z"}))["image"]
        assert line(await agent.call_tool("view_image", {"image": "last"}))["image"] == newer


async def test_pick_of_an_edit_reaches_the_agent_it_began_with(
    browser: httpx2.AsyncClient, connect: Callable[..., Any]
) -> None:
    async with connect() as agent:
        root = line(await agent.call_tool("generate_image", {"prompt": "x"}))["image"]
        result = await call(browser, "edit_image", image=root, prompt="make it red")
        edited = json.loads(result["content"][0]["text"])["image"]
        await call(browser, "pick", image=edited)
        assert line(await agent.call_tool("view_image", {"image": "last"}))["picked"] == {"image": edited}


@pytest.mark.parametrize("maker", ["openai-token-0", "", "front-end-{ended}-0", "session-{ended}-0", "studio"])
async def test_pick_of_an_image_whose_maker_is_gone_reaches_the_next_agent(
    browser: httpx2.AsyncClient, connect: Callable[..., Any], service: Service, maker: str
) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    made = await service.run(generate("x"), CallContext(maker.format(ended=ended.pid)))
    handle = made.images[0].handle
    await call(browser, "pick", image=handle)
    assert (await read(browser, f"klein://images/{handle}/details"))["picked"]
    async with connect() as agent, connect() as other:
        await agent.call_tool("engine_status", {})
        seen = line(await agent.call_tool("view_image", {"image": "last"}))
        assert (seen["image"], seen["picked"]) == (handle, {"image": handle})
        assert "picked" not in line(await agent.call_tool("list_images", {}))
        assert "picked" not in line(await other.call_tool("list_images", {}))


async def test_picked_mask_is_kept_and_named(browser: httpx2.AsyncClient, connect: Callable[..., Any]) -> None:
    mask = np.zeros((128, 128), np.uint8)
    mask[:64] = 255
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    async with connect() as agent:
        root = line(await agent.call_tool("generate_image", {"prompt": "x"}))["image"]
        await call(browser, "pick", image=root, mask=url)
        picked = line(await agent.call_tool("view_image", {"image": "last"}))["picked"]
        assert picked["image"] == root
        assert re.fullmatch(r"\w{6}", picked["mask"])
        edited = line(await agent.call_tool("edit_image", {"image": "last", "prompt": "red", "mask": picked["mask"]}))
        listed = {card["image"] for card in (await read(browser, "klein://library"))["images"]}
        assert listed == {root, edited["image"]}, "masks are no images to look at"


async def test_calls_of_the_view_leave_the_news_to_the_agent(service: Service) -> None:
    async with Client(create_server(service), extensions=[APPS]) as app:
        handle = line(await app.call_tool("generate_image", {"prompt": "x"}))["image"]
        await app.call_tool("pick", {"image": handle}, meta={"klein-mcp/view": True})
        own = await app.call_tool("view_image", {"image": handle}, meta={"klein-mcp/view": True})
        assert "picked" not in line(own)
        assert line(await app.call_tool("view_image", {"image": handle}))["picked"] == {"image": handle}


async def test_clients_without_apps_neither_see_nor_call_the_pick_tool(connect: Callable[..., Any]) -> None:
    async with connect() as plain:
        assert "pick" not in {tool.name for tool in (await plain.list_tools()).tools}
        refused = await plain.call_tool("pick", {"image": "last"})
        assert refused.is_error
        assert "There is no tool" in refused.content[0].text


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_page_adds_little_to_the_tool_list(service: Service, mode: str) -> None:
    async with (
        Client(create_server(service), mode=mode) as plain,
        Client(create_server(service), extensions=[APPS], mode=mode) as apps,
    ):
        lists = [(await client.list_tools()).tools for client in (plain, apps)]
        sizes = [len(json.dumps([tool.model_dump(mode="json") for tool in tools])) for tools in lists]
        bound = {tool.name for tool in lists[1] if (tool.meta or {}).get("ui/resourceUri")}
        assert bound >= {"generate_image", "edit_image", "compose_references", "list_images"}
        assert {tool.name for tool in lists[1]} - {tool.name for tool in lists[0]} == {"pick"}
        assert not any((tool.meta or {}).get("ui") for tool in lists[0])
        assert sizes[1] - sizes[0] <= 1_300


# -- calls of the page and their jobs ----------------------------------------------------------------------------------


async def test_cancel_route_stops_a_job_of_anybody(
    browser: httpx2.AsyncClient, service: Service, jobs: JobManager, painter: FakeExecutor
) -> None:
    painter.seconds_per_step = 0.5
    async with anyio.create_task_group() as tasks:

        async def agent() -> None:
            with pytest.raises(Exception, match="cancelled"):
                await service.run(generate("slow"), CallContext("agent"))

        tasks.start_soon(agent)
        with anyio.fail_after(120):
            while not painter.jobs:
                await anyio.sleep(0.01)
        (job,) = await jobs.list()
        assert (await browser.post("/studio/cancel", json={"job": job.job})).status_code == 200
    assert (await jobs.list())[0].state == "cancelled"
    assert (await browser.post("/studio/cancel", json={"job": "j0"})).status_code == 404


async def begin(browser: httpx2.AsyncClient, painter: FakeExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a call named c1 that is slow, and wait until its job runs."""
    monkeypatch.setattr(http_studio, "SOON", 0.0)
    painter.seconds_per_step = 1.0  # four steps: time enough to stop it, also on a machine that is busy
    asked = {"tool": "generate_image", "arguments": {"prompt": "slow"}, "call": "c1"}
    assert (await browser.post("/studio/call", json=asked)).status_code == 202
    with anyio.fail_after(120):
        while not painter.jobs:
            await anyio.sleep(0.01)


async def test_call_outlives_its_request_and_can_be_asked_after_again(
    browser: httpx2.AsyncClient, painter: FakeExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    await begin(browser, painter, monkeypatch)
    painter.seconds_per_step = 0.0
    made = await result(browser, "c1")
    assert json.loads(made["content"][0]["text"])["image"]
    assert await result(browser, "c1") == made
    assert (await browser.get("/studio/result", params={"call": "c2"})).status_code == 404


async def test_stopped_call_stops_its_job(
    browser: httpx2.AsyncClient, jobs: JobManager, painter: FakeExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    await begin(browser, painter, monkeypatch)
    assert (await browser.post("/studio/cancel", json={"call": "c1"})).status_code == 200
    stopped = await result(browser, "c1")
    assert stopped["isError"]
    assert stopped["content"][0]["text"] == "Cancelled."
    with anyio.fail_after(120):
        while (await jobs.list())[0].state != "cancelled":
            await anyio.sleep(0.01)


async def test_stopped_call_stops_the_job_that_it_no_longer_waits_for(
    browser: httpx2.AsyncClient, jobs: JobManager, painter: FakeExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    await begin(browser, painter, monkeypatch)
    (job,) = await jobs.list()
    await jobs.detach(job.job)
    assert (await browser.post("/studio/cancel", json={"call": "c1"})).status_code == 200
    with anyio.fail_after(120):
        while (await jobs.list())[0].state != "cancelled":
            await anyio.sleep(0.01)


@pytest.mark.parametrize(("mark", "state"), [(True, "cancelled"), ("agent", "done"), (None, "done")])
async def test_only_the_persons_wait_stops_the_job_when_it_is_stopped(
    service: Service, jobs: JobManager, painter: FakeExecutor, mark: bool | str | None, state: str
) -> None:
    service.settings = replace(service.settings, wait_budget=0.1)
    painter.seconds_per_step = 60.0
    meta: Any = {"klein-mcp/view": mark} if mark else None
    heard = anyio.Event()

    async def hear(progress: float, total: float | None, message: str | None) -> None:
        heard.set()

    async with Client(create_server(service), extensions=[APPS]) as app:
        job = line(await app.call_tool("generate_image", {"prompt": "slow"}, meta=meta))["job"]
        service.settings = replace(service.settings, wait_budget=60)
        async with anyio.create_task_group() as tasks:
            wait = partial(app.call_tool, "wait_for_job", {"job": job}, progress_callback=hear, meta=meta)
            tasks.start_soon(wait)
            await heard.wait()
            tasks.cancel_scope.cancel()
        if state == "done":
            painter.hurry()
        with anyio.fail_after(120):
            while (await jobs.job(job)).state != state:
                await anyio.sleep(0.01)


async def test_page_knows_its_calls_among_all_jobs(service: Service, painter: FakeExecutor) -> None:
    calls, feed = PageCalls(), Feed(service)
    painter.seconds_per_step = 0.05
    caller = CallContext(STUDIO, on_job=lambda job: calls.note_job(job, "c1"))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(service.run, generate("mine"), caller)
        tasks.start_soon(service.run, generate("an agent's"), CallContext("agent"))
        with anyio.fail_after(120):
            async for now in feed.stream(STUDIO):
                named = {job["prompt"]: job["call"] for job in calls.with_calls(now)["jobs"]} if now else {}
                if named == {"mine": "c1", "an agent's": None}:
                    break


async def test_only_the_newest_answers_are_kept() -> None:
    calls = PageCalls()

    async def work(number: int) -> CallToolResult:
        return CallToolResult(content=[TextContent(type="text", text=str(number))])

    for number in range(2 * MOST_ANSWERS):
        calls.start(str(number), work(number))
        assert await calls.result(str(number), 1)
    with pytest.raises(UnknownCall):
        await calls.result("0", 0)
    newest = await calls.result(str(2 * MOST_ANSWERS - 1), 0)
    assert newest == await work(2 * MOST_ANSWERS - 1)
