"""Who is let in over HTTP, what unauthorised clients hear, and what becomes of malformed requests."""

import asyncio
import http.client
import json
import re
import signal
import socket
import stat
import sys
from argparse import Namespace
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
import httpx2
import pytest
import uvicorn
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp_types import ListToolsResult

from klein_mcp.errors import RequestError
from klein_mcp.http import app as http_app
from klein_mcp.jobs.service import Service
from tests.images import file, scene
from tests.klein_mcp.front_ends import serving_process
from tests.real_server import PATIENCE, RealServer
from tests.tool_calls import call, refused

pytestmark = pytest.mark.anyio

TOKEN = "a-token-of-our-own-making"
PATHS = ("/mcp", "/sse", "/messages/", "/upload", "/images/abc.png", "/nothing")


@asynccontextmanager
async def serving(service: Service, **options: Any) -> AsyncIterator[str]:
    """The application on a real port: its address."""
    app = http_app.application(http_app.make_context(service), **options)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1))
        task = asyncio.create_task(server.serve([listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await task


@pytest.fixture
async def url(service: Service) -> AsyncIterator[str]:
    async with serving(service) as url:
        yield url


@pytest.fixture
async def guarded(service: Service) -> AsyncIterator[str]:
    async with serving(service, token=TOKEN, hosts=["downloads.example.org"]) as url:
        yield url


def bearer(token: str = TOKEN) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


async def get(url: str, path: str, **headers: str) -> httpx2.Response:
    async with httpx2.AsyncClient() as client, client.stream("GET", url + path, headers=headers) as response:
        if response.status_code != 200:  # a stream of events that was let in has no end
            await response.aread()
        return response


@asynccontextmanager
async def connected(url: str, headers: dict[str, str]) -> AsyncIterator[Client]:
    async with (
        httpx2.AsyncClient(headers=headers) as http_client,
        Client(streamable_http_client(f"{url}/mcp", http_client=http_client)) as client,
    ):
        yield client


def initialize(**more: Any) -> dict[str, Any]:
    params = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}
    return {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params, **more}


ACCEPT = {"accept": "application/json, text/event-stream", "content-type": "application/json"}


async def post(url: str, body: bytes, path: str = "/mcp", **headers: str) -> httpx2.Response:
    async with httpx2.AsyncClient() as client:
        return await client.post(url + path, content=body, headers={**ACCEPT, **headers})


async def test_health_check_needs_neither_token_nor_known_host(guarded):
    answer = await get(guarded, "/healthz", host="any.name")
    assert answer.status_code == 200


HOSTS = ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil.example:1")
ORIGINS = ("http://evil.example", "https://localhost.evil.example", "null", "file://")


async def test_forged_host_is_refused_on_every_path(url):
    for path, host in product(PATHS, HOSTS):
        answer = await get(url, path, host=host)
        assert answer.status_code == 421, (path, host)
        assert "--allowed-host" in str(answer.json())


async def test_foreign_origin_is_refused_on_every_path(url):
    for path, origin in product(PATHS, ORIGINS):
        assert (await get(url, path, origin=origin)).status_code == 403, (path, origin)


async def test_local_origin_is_accepted(url):
    assert (await post(url, json.dumps(initialize()).encode(), origin="http://localhost:3000")).status_code == 200


WRONG = ({}, bearer("wrong"), {"authorization": "Bearer"}, bearer(TOKEN + "x"), {"authorization": TOKEN})


async def test_missing_or_wrong_token_is_refused_on_every_path(guarded):
    for path, headers in product(PATHS, WRONG):
        if path.startswith("/images/"):
            continue  # there the signature counts
        answer = await get(guarded, path, **headers)
        assert answer.status_code == 401, (path, headers)
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"].startswith("Wrong or missing token. Send the server's as")


async def test_client_with_the_token_generates_an_image(guarded):
    async with connected(guarded, bearer()) as client:
        assert (await call(client, "generate_image", prompt="a cat"))["size"] == [128, 128]


async def test_allowed_hosts_are_accepted_with_and_without_port(guarded):
    body = json.dumps(initialize()).encode()
    for host in ("downloads.example.org", "downloads.example.org:443", "Downloads.Example.ORG"):
        assert (await post(guarded, body, host=host, **bearer())).status_code == 200


async def test_remote_client_gets_a_signed_link_that_needs_no_token(service):
    # Through a proxy, as which the test itself acts: `forwarded` says so.
    async with serving(service, token=TOKEN) as url:
        async with connected(url, {**bearer(), "forwarded": "for=192.0.2.7"}) as client:
            payload = await call(client, "generate_image", prompt="a cat")
        assert "path" not in payload
        async with httpx2.AsyncClient() as browser:
            assert (await browser.get(payload["url"])).content.startswith(b"\x89PNG")
            spoiled = [
                payload["url"][:-1] + "0",
                payload["url"][:-1] + "1",
                payload["url"].split("?")[0],
                payload["url"].replace("until=", "until=9"),
            ]
            answers = [(await browser.get(address)).status_code for address in spoiled]
            assert answers.count(403) >= 3  # one of the last digits may be the right one


async def test_upload_needs_the_token_and_returns_a_handle(guarded):
    data = file(scene(80, 64))
    assert (await post(guarded, data, "/upload")).status_code == 401
    answer = await post(guarded, data, "/upload", **bearer())
    assert answer.status_code == 200
    async with connected(guarded, bearer()) as client:
        payload = await call(client, "edit_image", image=answer.json()["image"], prompt="make it green")
    assert payload["size"] == [80, 64]
    assert (await post(guarded, b"no image", "/upload", **bearer())).status_code == 400


BROKEN = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe\x00",
    b"[" * 100_000,
    b'{"jsonrpc": "2.0"}',
    b'{"jsonrpc": "1.0", "id": 1, "method": "ping"}',
    b'{"jsonrpc": "2.0", "id": {}, "method": "ping"}',
    b'{"jsonrpc": "2.0", "id": 1, "method": 7}',
]


@pytest.mark.parametrize("body", BROKEN, ids=range(len(BROKEN)))
async def test_server_survives_malformed_json_rpc(url, body):
    answer = await post(url, body)
    assert 400 <= answer.status_code < 500
    assert "Traceback" not in answer.text
    assert (await post(url, json.dumps(initialize()).encode())).status_code == 200


async def test_half_an_emoji_is_repaired_as_over_stdio(url):
    for half in ("\\ud83c", "\\udf1e", "\\ud83c\\udf1e\\udf1e"):
        body = json.dumps(initialize()).replace('"name": "t"', f'"name": "{half}"').encode()
        assert b"\\ud" in body
        assert (await post(url, body)).status_code == 200


async def test_oversized_body_is_refused_with_and_without_content_length(url):
    huge = json.dumps(initialize(padding="x" * 5_000_000)).encode()
    assert (await post(url, huge)).status_code == 413

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(huge), 2**16):
            yield huge[start : start + 2**16]

    async with httpx2.AsyncClient() as client:
        assert (await client.post(f"{url}/mcp", content=chunks(), headers=ACCEPT)).status_code == 413


def test_serving_beyond_loopback_needs_an_allowed_host(server: RealServer):
    done = server.run("-m", "klein_mcp", "serve", "--host", "0.0.0.0")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--allowed-host" in done.stderr


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "128.0.0.1", "", "gpu.example.org"])
def test_host_beyond_loopback_needs_a_name(host):
    with pytest.raises(ValueError, match="allowed-host"):
        http_app.HttpOptions.from_arguments(Namespace(host=host, port=1, token_file=None, allowed_host=[]))


@pytest.mark.parametrize(
    ("host", "names", "url"),
    [
        ("127.0.0.1", (), "http://127.0.0.1:8765"),
        ("::1", (), "http://[::1]:8765"),
        ("127.0.0.2", (), "http://127.0.0.2:8765"),
        ("127.0.0.1", ("pics.example.com",), "http://127.0.0.1:8765"),
        ("0.0.0.0", ("gpu.example.org", "gpu"), "http://gpu.example.org:8765"),
        ("::", ("gpu.example.org:9000",), "http://gpu.example.org:9000"),
    ],
)
async def test_studio_link_that_serve_prints_opens(
    service: Service, host: str, names: tuple[str, ...], url: str, capsys: pytest.CaptureFixture[str]
):
    context = http_app.make_context(service)
    options = http_app.HttpOptions(host=host, allowed_hosts=names)
    app = http_app.application(context, token=TOKEN, hosts=options.known_as)
    http_app.announce(context, options.url(8765))
    served, studio = (line.split()[-1] for line in capsys.readouterr().err.splitlines())
    assert served == f"{url}/mcp"
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app)) as browser:
        assert (await browser.get(studio)).status_code == 200


@pytest.mark.parametrize("token", ["", "short", "two words that are long enough", "ünïcödé-and-long-enough"])
def test_weak_token_file_is_refused(settings, tmp_path, token):
    (tmp_path / "token").write_text(token, encoding="utf-8")
    with pytest.raises(RequestError, match="at least 16"):
        http_app.token_for(settings, http_app.HttpOptions(token_file=tmp_path / "token"))


def test_empty_generated_token_is_refused(settings):
    settings.home.mkdir(parents=True)
    (settings.home / "http-token").write_text("")
    with pytest.raises(RequestError, match="Delete it"):
        http_app.token_for(settings, http_app.HttpOptions(host="0.0.0.0", allowed_hosts=("pics.example.com",)))


def test_allowed_host_demands_a_token_on_loopback_too(settings):
    assert http_app.token_for(settings, http_app.HttpOptions()) is None
    assert http_app.token_for(settings, http_app.HttpOptions(host="127.0.0.2")) is None
    assert http_app.token_for(settings, http_app.HttpOptions(allowed_hosts=("localhost",))) is None
    assert http_app.token_for(settings, http_app.HttpOptions(allowed_hosts=("pics.example.com",)))


def test_missing_token_file_is_one_line(server: RealServer, tmp_path):
    done = server.run("-m", "klein_mcp", "serve", "--token-file", str(tmp_path / "nothing"))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1


def test_occupied_port_is_one_line(server: RealServer):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = server.run("-m", "klein_mcp", "serve", "--port", str(port))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"port {port}" in done.stderr


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1", "a" * 64])
def test_host_that_is_not_this_machine_is_named_not_its_port(host: str):
    with pytest.raises(RequestError, match="--host takes an address of this machine"):
        http_app._bind(http_app.HttpOptions(host=host, port=0))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_ends_the_server_despite_open_streams(server: RealServer, number: signal.Signals):
    with serving_process(server) as (url, process):
        async with httpx2.AsyncClient() as client, client.stream("GET", f"{url}/sse") as stream:
            assert stream.status_code == 200
            process.send_signal(number)
            with anyio.fail_after(PATIENCE):  # the stream itself stays open for ever
                while process.poll() is None:
                    await anyio.sleep(0.05)
    assert process.returncode == 128 + number


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have one loopback address")
def test_scheme_of_a_proxy_on_another_address_is_believed(server: RealServer):
    """127.0.0.2 is none of the addresses that uvicorn itself takes for a proxy's."""
    with serving_process(server) as (url, _):
        address = urlsplit(url)
        assert address.hostname
        connection = http.client.HTTPConnection(address.hostname, address.port, source_address=("127.0.0.2", 0))
        connection.request("GET", "/mcp/server-card", headers={"X-Forwarded-Proto": "https"})
        card = json.loads(connection.getresponse().read())
        connection.close()
    assert card["remotes"][0]["url"] == f"https://{address.netloc}/mcp"


def test_generated_token_is_kept_and_readable_by_its_owner_alone(settings, capsys):
    options = http_app.HttpOptions(host="0.0.0.0", allowed_hosts=("a.example",))
    token = http_app.token_for(settings, options)
    assert token
    assert http_app.token_for(settings, options) == token
    path = settings.home / "http-token"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    message = capsys.readouterr().err
    assert str(path) in message
    assert token not in message


async def test_server_card_names_the_endpoint_without_a_token(guarded):
    async with httpx2.AsyncClient() as client:
        response = await client.get(f"{guarded}/mcp/server-card")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("application/mcp-server-card+json")
    card = response.json()
    assert card["remotes"] == [{"type": "streamable-http", "url": f"{guarded}/mcp"}]
    assert {"$schema", "name", "version", "description"} <= card.keys()
    assert card["icons"][0]["src"].startswith("data:image/svg+xml;base64,")


async def test_modern_client_mirrors_the_model_into_a_header(url):
    """The server refuses a call whose header and argument differ (SEP-2243)."""
    async with Client(streamable_http_client(f"{url}/mcp")) as client:
        info = client.server_info
        assert info
        assert info.icons
        assert info.icons[0].mime_type == "image/svg+xml"
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert tools["generate_image"].input_schema["properties"]["model"]["x-mcp-header"] == "Model"
        await call(client, "generate_image", prompt="an apple", model="nano", seed=1)


def offers_last(listed: ListToolsResult, client: Client) -> bool:
    """Whether anything that an agent reads before its first call speaks of `last`."""
    schemas = " ".join(str(tool.input_schema) for tool in listed.tools)
    return re.search(r"\blast\b", f"{schemas} {client.instructions}") is not None


async def test_upload_as_form_is_answered_with_the_way_to_send_it(url):
    async with httpx2.AsyncClient() as client:
        answer = await client.post(f"{url}/upload", files={"file": ("a.png", file(scene(8, 8)), "image/png")})
    assert answer.status_code == 415
    assert "--data-binary @FILE" in answer.text


async def test_last_is_refused_where_clients_look_alike(url):
    """Today's protocol has no sessions: two agents with one address would get each other's images."""

    @asynccontextmanager
    async def agent(name: str) -> AsyncIterator[Client]:
        async with Client(streamable_http_client(f"{url}/mcp{name}")) as client:
            yield client

    async with agent("") as one, agent("") as two:
        for client in (one, two):
            assert "last" not in await call(client, "generate_image", prompt="a cat", count=2)
            assert not offers_last(await client.list_tools(), client)
            for reference in ("last", "LAST~1", "B", '"last"'):
                message = await refused(client, "view_image", image=reference)
                assert "?client=NAME" in message
    async with agent("?client=one") as one, agent("?client=two") as two:
        assert offers_last(await one.list_tools(), one)
        assert "last" in await call(one, "generate_image", prompt="a cat", count=2)
        images = [(await call(client, "generate_image", prompt=f"{client}"))["image"] for client in (one, two)]
        for client, image in zip((one, two), images, strict=True):
            assert (await call(client, "view_image", image="last"))["image"] == image


async def test_remote_client_opens_no_file_and_learns_of_none(settings, jobs, tmp_path):
    (tmp_path / "private.png").write_bytes(file(scene(40, 30)))
    remote = {**bearer(), "forwarded": "for=192.0.2.7"}
    for roots, opened in ((None, False), ((tmp_path,), True)):
        service = Service(replace(settings, read_roots=roots), jobs)
        async with serving(service, token=TOKEN) as url, connected(url, remote) as client:
            paths = [tmp_path / "private.png", tmp_path / "missing.png", Path("~/x.png"), Path("/etc/passwd")]
            messages = set()
            for path in paths[1:] if opened else paths:
                messages.add(await refused(client, "view_image", image=str(path)))
            messages |= {await refused(client, "view_image", image=paths[1].as_uri())}
            assert opened or len(messages) == 1, messages
            if opened:
                assert (await call(client, "view_image", image=str(paths[0])))["image"]
        service.close()
