"""Surfaces of the HTTP front end: each kind of authorisation, and the extension points of the MCP server."""

import base64
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx2
import pytest
from mcp import Client
from mcp.server.extension import Extension
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from klein_mcp.errors import RequestError
from klein_mcp.http import app, sessions
from klein_mcp.http.sessions import CSRF_HEADER
from klein_mcp.http.surface import Auth, HttpContext, Surface, SurfaceFactory
from klein_mcp.images.library import Store
from klein_mcp.jobs.service import Service
from klein_mcp.mcp_server.server import create_server
from klein_mcp.mcp_server.tools import TOOLS
from tests.images import file, scene
from tests.tool_calls import call

pytestmark = pytest.mark.anyio

TOKEN = "a-token-of-our-own-making"


def surface(auth: Auth) -> SurfaceFactory:
    async def answer(request: Request) -> Response:
        return PlainTextResponse(auth)

    return lambda context: Surface(auth, [Route(f"/{auth}", answer, methods=["GET", "POST"])], auth)


@pytest.fixture
def context(service: Service) -> HttpContext:
    return app.make_context(service)


@pytest.fixture
def connect_http(context: HttpContext) -> Callable[..., object]:
    @asynccontextmanager
    async def connect(token: str | None = TOKEN, **headers: str) -> AsyncIterator[httpx2.AsyncClient]:
        served = app.application(
            context, token=token, surfaces=[surface(a) for a in ("token", "signed", "session", "none")]
        )
        transport = httpx2.ASGITransport(app=served)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as client:
            yield client

    return connect


async def status(client: httpx2.AsyncClient, path: str, method: str = "GET", **headers: str) -> int:
    return (await client.request(method, path, headers=headers)).status_code


async def test_each_surface_demands_its_own_kind_of_authorisation(connect_http, context: HttpContext):
    async with connect_http() as client:
        assert await status(client, "/none") == 200
        assert await status(client, "/token") == 401
        assert await status(client, "/session") == 401
        assert await status(client, "/signed") == 403
        assert await status(client, "/token", authorization=f"Bearer {TOKEN}") == 200
        assert await status(client, "/session", authorization=f"Bearer {TOKEN}") == 200
        assert await status(client, context.urls.sign("/signed")) == 200
        assert await status(client, context.urls.sign("/other").replace("/other", "/signed")) == 403


async def test_without_a_token_only_sessions_and_signatures_count(connect_http):
    async with connect_http(token=None) as client:
        assert await status(client, "/token") == 200
        assert await status(client, "/session", authorization="Bearer anything") == 401
        assert await status(client, "/signed") == 403


async def test_a_wrong_method_does_not_bypass_authorisation(connect_http):
    async with connect_http() as client:
        assert await status(client, "/token", "DELETE") == 401
        assert await status(client, "/signed", "DELETE") == 403
        assert await status(client, "/token/", "GET") == 401


async def test_one_time_link_opens_one_session(connect_http, context: HttpContext):
    code = context.sessions.invite()
    session = context.sessions.redeem(code)
    assert session
    assert context.sessions.redeem(code) is None
    assert context.sessions.redeem("made up") is None
    async with connect_http() as client:
        assert await status(client, "/session", cookie=f"{context.sessions.cookie}={session}") == 200
        assert await status(client, "/session", cookie=f"{context.sessions.cookie}=made-up") == 401
        assert await status(client, "/token", cookie=f"{context.sessions.cookie}={session}") == 401


async def test_a_change_needs_the_csrf_token_of_its_session(connect_http, context: HttpContext):
    mine, other = (context.sessions.redeem(context.sessions.invite()) or "" for _ in range(2))
    cookie = {"cookie": f"{context.sessions.cookie}={mine}"}
    async with connect_http() as client:
        assert await status(client, "/session", "POST", **cookie) == 401
        foreign = {CSRF_HEADER: context.sessions.csrf_token(other)}
        assert await status(client, "/session", "POST", **cookie, **foreign) == 401
        own = {CSRF_HEADER: context.sessions.csrf_token(mine)}
        assert await status(client, "/session", "POST", **cookie, **own) == 200


async def test_invitations_and_sessions_expire(context: HttpContext, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sessions, "INVITATION_LIFETIME", -1.0)
    assert context.sessions.redeem(context.sessions.invite()) is None
    monkeypatch.setattr(sessions, "INVITATION_LIFETIME", 60.0)
    monkeypatch.setattr(sessions, "SESSION_LIFETIME", -1)
    session = context.sessions.redeem(context.sessions.invite())
    request = Request(
        {"type": "http", "method": "GET", "headers": [(b"cookie", f"{context.sessions.cookie}={session}".encode())]}
    )
    assert not context.sessions.allows(request)


async def test_surfaces_have_distinct_names_and_paths(context: HttpContext):
    surfaces = [make(context) for make in app.SURFACES]
    assert len({surface.name for surface in surfaces}) == len(surfaces)
    paths = [route.path for surface in surfaces for route in surface.routes]  # type: ignore[attr-defined]
    assert len(set(paths)) == len(paths)


class Other(Extension):
    identifier = "org.example/other"


async def test_server_announces_its_extensions(service: Service):
    async with Client(create_server(service, extensions=[Other()])) as client:
        announced = client.server_capabilities.extensions or {}
        assert announced.keys() == {"io.modelcontextprotocol/ui", Other.identifier}


async def test_a_tool_may_carry_meta():
    tool = replace(TOOLS["view_image"], meta={"ui": {"resourceUri": "ui://klein/studio.html"}})
    listed = tool.listed().model_dump(mode="json", by_alias=True, exclude_none=True)
    assert listed["_meta"] == {"ui": {"resourceUri": "ui://klein/studio.html"}}


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/upload", "image/png"),
        ("/studio/upload", "image/png"),
        ("/studio/call", "application/json"),
        ("/v1/images/generations", "application/json"),
        ("/v1/images/edits", "application/json"),
        ("/v1/images/edits", "multipart/form-data; boundary=x"),
        ("/sdapi/v1/txt2img", "application/json"),
        ("/sdapi/v1/options", "application/json"),
    ],
)
async def test_aborted_upload_ends_quietly(
    context: HttpContext, caplog: pytest.LogCaptureFixture, path: str, kind: str
):
    messages = iter([{"type": "http.request", "body": b"--x\r\n", "more_body": True}, {"type": "http.disconnect"}])

    async def receive() -> Any:
        return next(messages)

    async def send(message: Any) -> None:
        pass

    headers = {"host": "localhost", "authorization": f"Bearer {TOKEN}", "content-type": kind, "accept": "*/*"}
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": encoded}
    served = app.application(context, token=TOKEN)
    async with context.server.session_manager.run():
        await served({**scope, "scheme": "http", "server": ("localhost", 80), "client": None}, receive, send)
    assert not caplog.records


@pytest.fixture
def opened_by(monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """The threads that ask for the library, which may take seconds to open."""
    threads: list[threading.Thread] = []
    opened = Service.store.fget
    assert opened

    def noted(service: Service) -> Store:
        threads.append(threading.current_thread())
        return opened(service)

    monkeypatch.setattr(Service, "store", property(noted))
    return threads


@pytest.fixture
async def http(context: HttpContext) -> AsyncIterator[httpx2.AsyncClient]:
    """A client with the token, of every surface."""
    transport = httpx2.ASGITransport(app=app.application(context, token=TOKEN))
    bearer = {"authorization": f"Bearer {TOKEN}"}
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost", headers=bearer) as client:
        yield client


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/studio/read?uri=klein://library"),
        ("GET", "/studio/images/abcdef"),
        ("GET", "/studio/images/abcdef/download"),
        ("GET", "/studio/images/abcdef/thumb"),
        ("POST", "/studio/delete"),
        ("POST", "/studio/upload"),
        ("POST", "/upload"),
    ],
)
async def test_unusable_library_is_explained(
    http: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch, method: str, path: str
):
    def unusable(service: Service) -> None:
        raise RequestError("The library is of a newer version.")

    monkeypatch.setattr(Service, "store", property(unusable))
    answer = await http.request(method, path, json={"images": ["abcdef"]})
    assert 400 <= answer.status_code < 600
    assert answer.json() == {"error": "The library is of a newer version."}


DATA_URL = "data:image/png;base64," + base64.b64encode(file(scene(32, 32))).decode()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/studio/images/abcdef", None),
        ("/studio/delete", {"images": []}),
        ("/studio/upload", file(scene(32, 32))),
        ("/upload", file(scene(32, 32))),
        ("/v1/images/edits", {"prompt": "x", "image": DATA_URL}),
        ("/sdapi/v1/img2img", {"prompt": "x", "init_images": [DATA_URL]}),
    ],
)
async def test_library_is_opened_beside_the_event_loop(
    http: httpx2.AsyncClient, opened_by: list[threading.Thread], path: str, body: Any
):
    content: dict[str, Any] = {"content": body} if isinstance(body, bytes) else {"json": body}
    await (http.get(path) if body is None else http.post(path, **content))
    assert opened_by
    assert threading.current_thread() not in opened_by


async def test_agents_open_the_library_beside_the_event_loop(client: Client, opened_by: list[threading.Thread]):
    made = await call(client, "generate_image", prompt="a dot")
    await call(client, "edit_image", image=made["image"], prompt=["make it red", "make it blue"])
    await call(client, "view_image", image=made["image"], compare_with="last")
    await call(client, "list_images")
    assert opened_by
    assert threading.current_thread() not in opened_by


async def test_half_an_emoji_from_the_page_is_repaired(http: httpx2.AsyncClient):
    body = b'{"tool": "view_image", "arguments": {"image": "\\ud83d"}, "call": "c1"}'
    answer = await http.post("/studio/call", content=body)
    assert answer.status_code in (200, 202)
    while answer.status_code == 202:
        answer = await http.get("/studio/result?call=c1")
    assert answer.json()["isError"]
    assert (await http.post("/studio/delete", content=b'{"images": ["\\ud83d"]}')).status_code == 200
