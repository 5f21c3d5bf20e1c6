"""Images over plain HTTP: links that are signed and expire, and uploads with the caps of every other input."""

import errno
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from filelock import FileLock
from mcp import Client
from starlette.requests import Request

from klein_mcp.http import app, downloads, uploads
from klein_mcp.http.signed_urls import LIFETIME, SignedUrls
from klein_mcp.http.surface import HttpContext
from klein_mcp.images import credentials, files, library
from klein_mcp.jobs.service import Service
from tests.images import file, pixels, scene
from tests.tool_calls import call, refused

pytestmark = pytest.mark.anyio


@pytest.fixture
def context(service: Service) -> HttpContext:
    return app.make_context(service)


@pytest.fixture
def urls(context: HttpContext) -> SignedUrls:
    return context.urls


@pytest.fixture
async def http(context: HttpContext) -> AsyncIterator[httpx2.AsyncClient]:
    served = app.application(context, hosts=["klein.example"], surfaces=[downloads.surface, uploads.surface])
    transport = httpx2.ASGITransport(app=served)
    async with httpx2.AsyncClient(transport=transport, base_url="http://klein.example") as client:
        yield client


@pytest.fixture
def announced(context: HttpContext, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Addresses of images that subscribers were notified of."""
    uris: list[str] = []

    async def image_added(uri: str) -> None:
        uris.append(uri)

    monkeypatch.setattr(context.server.subscriptions, "image_added", image_added)
    return uris


async def test_link_leads_to_the_exact_image(client: Client, http: httpx2.AsyncClient, urls: SignedUrls):
    payload = await call(client, "generate_image", prompt="a dot")
    answer = await http.get(urls.image(payload["image"]))
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    with open(payload["path"], "rb") as same:
        assert answer.content == same.read()


async def test_link_is_valid_for_one_image_and_a_while(client: Client, http: httpx2.AsyncClient, urls: SignedUrls):
    payload = await call(client, "generate_image", prompt="a dot")
    other = await call(client, "generate_image", prompt="another")
    good = urls.image(payload["image"])
    for bad in (
        good.replace(payload["image"], other["image"]),
        good.replace("until=", "until=1"),
        good[:-1] + ("0" if good[-1] != "0" else "1"),
        good.split("?")[0],
        good.split("&")[0],
        urls.image(payload["image"], now=time.time() - LIFETIME - 1),
        SignedUrls().image(payload["image"]),
        f"/images/{payload['image']}.png?until=²&signature=x",
    ):
        answer = await http.get(bad)
        assert answer.status_code == 403, bad
        assert "view_image gives a new one" in answer.json()["error"]


async def test_link_to_a_deleted_image_is_not_found(
    client: Client, http: httpx2.AsyncClient, urls: SignedUrls, service: Service
):
    payload = await call(client, "generate_image", prompt="a dot")
    service.store.delete([payload["image"]])
    answer = await http.get(urls.image(payload["image"]))
    assert (answer.status_code, "was deleted on" in answer.json()["error"]) == (404, True)


async def test_link_into_a_library_that_is_held_may_be_tried_again(
    http: httpx2.AsyncClient, urls: SignedUrls, service: Service, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(library, "BUSY_TIMEOUT", 0)
    service.settings.library.mkdir(parents=True)
    with FileLock(service.settings.library / "open.lock"):
        answer = await http.get(urls.image("abcdef"))
        assert (answer.status_code, "Another program" in answer.json()["error"]) == (503, True)
        assert (await http.post("/upload", content=file(scene(64, 48)))).status_code == 503
    assert (await http.get(urls.image("abcdef"))).status_code == 404


@pytest.mark.parametrize(("kind", "side"), [("webp", 16_384), ("jpeg", 65_501)])
async def test_link_to_a_format_without_room_names_the_handle(
    http: httpx2.AsyncClient, urls: SignedUrls, kind: str, side: int
):
    handle = (await http.post("/upload", content=file(scene(side, 8)))).json()["image"]
    answer = await http.get(urls.image(handle, kind))
    assert answer.status_code == 400
    assert f"{handle} is in the library: {kind} cannot store it" in answer.json()["error"]
    assert "Choose png" in answer.json()["error"]


async def test_link_that_cannot_be_signed_is_a_fault_of_the_server(
    client: Client, http: httpx2.AsyncClient, urls: SignedUrls, service: Service, tmp_path: Path
):
    handle = (await call(client, "generate_image", prompt="a dot"))["image"]
    service.settings = replace(service.settings, credentials=str(tmp_path / "missing.pem"))
    answer = await http.get(urls.image(handle))
    assert (answer.status_code, "cannot be read" in answer.json()["error"]) == (500, True)


async def test_upload_to_a_full_disk_is_a_fault_of_the_server(
    http: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
):
    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "_sync_folder", full)
    answer = await http.post("/upload", content=file(scene(64, 48)))
    assert (answer.status_code, "klein-mcp prune" in answer.json()["error"]) == (500, True)


async def test_upload_returns_a_handle_that_tools_accept(client: Client, http: httpx2.AsyncClient):
    answer = await http.post("/upload", content=file(scene(64, 48), "BMP"))
    payload = answer.json()
    assert (answer.status_code, payload["width"], payload["height"], payload.get("warnings", [])) == (200, 64, 48, [])
    edited = await call(client, "edit_image", image=payload["image"], prompt="x")
    assert (await call(client, "view_image", image=edited["image"]))["parents"] == [payload["image"]]


async def test_upload_is_announced_once(http: httpx2.AsyncClient, announced: list[str]):
    payload = [(await http.post("/upload", content=file(scene(64, 48), kind))).json() for kind in ("PNG", "BMP")]
    assert announced == [payload[0]["uri"]] == [payload[1]["uri"]]


async def test_upload_does_not_become_last(client: Client, http: httpx2.AsyncClient):
    await http.post("/upload", content=file(scene(64, 48)))
    await refused(client, "view_image", image="last")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "is empty (0 bytes)"),
        (b"hello", "is not an image that can be read"),
        (file(scene(64, 64))[:150], "cannot be read"),
    ],
)
async def test_bad_upload_is_refused_with_one_line(http: httpx2.AsyncClient, body: bytes, message: str):
    answer = await http.post("/upload", content=body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]


async def test_upload_is_cut_off_at_its_size_limit(http: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(uploads, "MAX_FILE_BYTES", 100_000)
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 10_000
            yield bytes(10_000)

    answer = await http.post("/upload", content=endless())
    assert answer.status_code == 413


def request(client: Any = ("127.0.0.1", 1), host: str = "127.0.0.1:8765", **headers: str) -> Request:
    encoded = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "scheme": "https", "client": client}
    return Request({**scope, "server": ("127.0.0.1", 443), "headers": [(b"host", host.encode()), *encoded]})


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:8765", "localhost", "LocalHost:8765", "[::1]", "[::1]:8765", "127.0.0.2:80"]
)
def test_local_clients_get_paths(urls: SignedUrls, host: str):
    assert urls.for_client(request(host=host)) is None
    assert urls.for_client(request(("::1", 1), host)) is None


PROXY_HEADERS = ("forwarded", "via", "x_forwarded_for", "x_forwarded_host", "x_forwarded_port", "x_real_ip")


@pytest.mark.parametrize(
    "remote",
    [
        {"client": ("10.0.0.7", 1)},
        {"client": None},
        # As a tunnel or a proxy sends it that passes the name on and nothing else.
        {"host": "klein.example"},
        {"host": "localhost.klein.example:443"},
        {"host": ""},
        {"host": "[x"},
        *({name: "10.0.0.7"} for name in PROXY_HEADERS),
    ],
)
def test_remote_clients_get_addresses(urls: SignedUrls, remote: dict[str, Any]):
    assert urls.for_client(request(**remote)) is not None


def test_address_names_the_host_that_the_client_called(urls: SignedUrls):
    make = urls.for_client(request(host="klein.example"))
    assert make is not None
    assert make("k7f3q2").startswith("https://klein.example/images/k7f3q2.png?until=")


@pytest.mark.parametrize("text", ["data:image/png;base64,AAAA", "DATA:,x", "/images/" + "x" * 10_000, "http://[x"])
def test_text_that_is_no_address_of_ours_is_not_kept_in_memory(urls: SignedUrls, text: str):
    urlsplit.cache_clear()  # type: ignore[attr-defined] - it remembers the latest 128 texts, however long
    assert urls.handle_of(text) is None
    assert urlsplit.cache_info().currsize == 0  # type: ignore[attr-defined] - of its cache


async def test_download_of_the_studio_is_signed_where_links_are(client: Client, context: HttpContext, service: Service):
    pytest.importorskip("c2pa", reason="the optional extra c2pa is not installed")
    service.settings = replace(service.settings, credentials="local")
    served = app.application(context, token="a-token-of-our-own-making")
    transport, bearer = httpx2.ASGITransport(app=served), {"authorization": "Bearer a-token-of-our-own-making"}
    handle = (await call(client, "generate_image", prompt="a dot"))["image"]
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost", headers=bearer) as http:
        answer = await http.get(f"/studio/images/{handle}/download")
    assert answer.headers["content-type"] == "image/png"
    assert credentials.verify(answer.content, "image/png") is not None


async def test_download_has_the_pixels_of_the_upload(client: Client, http: httpx2.AsyncClient, urls: SignedUrls):
    payload = (await http.post("/upload", content=file(scene(64, 48)))).json()
    answer = await http.get(urls.image(payload["image"]))
    assert (pixels(answer.content) == scene(64, 48)).all()
