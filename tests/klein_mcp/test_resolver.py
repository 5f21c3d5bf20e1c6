"""Every way to name an image, what it becomes in the library, and what may not be opened."""

import base64
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from mcp import Client

from klein_mcp.images import resolver
from klein_mcp.jobs.service import Service
from tests.fakes import FakeExecutor
from tests.images import file, noise, scene
from tests.tool_calls import call, refused

pytestmark = pytest.mark.anyio


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    path.write_bytes(file(scene(64, 48)))
    return path


async def test_path_becomes_image_of_library_and_parent(client: Client, photo: Path):
    facts = await call(client, "edit_image", image=str(photo), prompt="x")
    (parent,) = (await call(client, "view_image", image=facts["image"]))["parents"]
    listed = (await call(client, "list_images"))["images"]
    assert [(one["image"], one["tool"]) for one in listed] == [(facts["image"], "edit_image"), (parent, "open")]
    assert listed[1]["source"] == str(photo)


async def test_same_file_is_same_image_whatever_its_name_and_format(client: Client, photo: Path):
    first = await call(client, "view_image", image=str(photo))
    other = photo.with_suffix(".bmp")
    other.write_bytes(file(scene(64, 48), "BMP"))
    again = await call(client, "view_image", image=str(other))
    assert (again["image"], again["source"]) == (first["image"], str(other))
    # A path of a result is inside the library, and nobody's file.
    assert (await call(client, "view_image", image=first["path"]))["source"] == str(other)
    assert (await call(client, "list_images"))["images"][0]["source"] == str(other)
    photo.write_bytes(file(noise(64, 48)))
    assert (await call(client, "view_image", image=str(photo)))["image"] != first["image"]


def test_many_threads_remember_what_they_opened(service: Service, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resolver, "MOST_SEEN", 16)
    sources = service.sources
    opened, together = sources.add(file(scene(64, 48)), "photo", "me"), threading.Barrier(4)

    def remember(thread: int) -> None:
        together.wait(60)
        for number in range(20_000):
            sources._remember(f"{thread} {number}", "image", opened)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(remember, range(4))) == [None] * 4
    finally:
        sys.setswitchinterval(interval)


async def test_data_url_is_taken_though_never_asked_for(client: Client, painter: FakeExecutor):
    url = "data:image/png;base64," + base64.b64encode(file(scene(64, 48))).decode()
    await call(client, "edit_image", image=url, prompt="x")
    assert (painter.jobs[0].references[0] == scene(64, 48)).all()
    tools = "".join(tool.model_dump_json() for tool in (await client.list_tools()).tools)
    assert "data:" not in tools
    assert "base64" not in tools


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("data:image/png;base64", "has no comma"),
        ("data:image/png;base64,%%%", "no valid base64; it may be cut short"),
        ("data:image/png;base64,AAAA", "is not an image that can be read"),
        ("data:,hello", "is not an image that can be read"),
        ("data:text/html;base64,PGh0bWw+", "web page"),
    ],
)
async def test_bad_data_url_is_refused(client: Client, url: str, message: str):
    assert message in await refused(client, "view_image", image=url)


async def test_data_url_is_read_as_leniently_as_browsers_do(client: Client):
    data = file(scene(64, 48))
    text, safe = base64.b64encode(data).decode(), base64.urlsafe_b64encode(data).decode()
    lines = base64.encodebytes(data).decode()
    first = await call(client, "view_image", image=f"data:image/png;base64,{text}")
    for url in (
        f"data:image/png;base64,{lines}",
        f"data:image/png;base64,{lines}".replace("\n", "\r\n"),
        f"data:image/png;base64, {text}",
        f"data:image/png;base64,{text.rstrip('=')}",
        f"data:image/png;base64,{safe}",
        f"data:image/png;base64,{quote(text, safe='')}",
        f"data:image/png; base64 ,{text}",
        f"DATA:;BASE64,{text}",
        "data:image/png," + quote(data),
    ):
        assert (await call(client, "view_image", image=url))["image"] == first["image"], url[:40]


async def test_whether_file_outside_exists_is_not_reported(client: Client):
    there = await refused(client, "view_image", image="/etc/hostname")
    missing = await refused(client, "view_image", image="/etc/no-such-file")
    assert there.replace("hostname", "no-such-file") == missing


async def test_file_addresses_and_resource_addresses_are_understood(client: Client, photo: Path):
    spaced = photo.rename(photo.with_name("my photo.png"))
    facts = await call(client, "view_image", image=f"file://{quote(str(spaced))}")
    assert (await call(client, "view_image", image=f"klein://images/{facts['image']}"))["image"] == facts["image"]
    assert (await call(client, "view_image", image=f"klein://images/{facts['image']}/preview"))["image"] == facts[
        "image"
    ]


async def test_outside_roots_nothing_is_opened(client: Client, tmp_path: Path):
    message = await refused(client, "view_image", image="/etc/hostname")
    assert "outside the folders that may be read" in message
    assert "KLEIN_READ_ROOTS" in message


async def test_path_from_result_can_be_opened_wherever_library_lies(client: Client, service: Service, tmp_path: Path):
    service.settings = replace(service.settings, read_roots=(tmp_path / "elsewhere",))
    facts = await call(client, "generate_image", prompt="a dot")
    assert (await call(client, "view_image", image=facts["path"]))["image"] == facts["image"]
    await refused(client, "view_image", image=str(service.settings.library / "library.sqlite3"))


async def test_link_that_leads_out_of_roots_is_not_followed(
    client: Client, service: Service, photo: Path, tmp_path: Path
):
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link.png").symlink_to(photo)
    (inside / "folder").symlink_to(tmp_path)
    (inside / "own.png").symlink_to(inside / "real.png")
    (inside / "real.png").write_bytes(photo.read_bytes())
    service.settings = replace(service.settings, read_roots=(inside,))
    for path in ("link.png", "folder/photo.png", "../photo.png"):
        assert "outside the folders" in await refused(client, "view_image", image=str(inside / path))
    await call(client, "view_image", image=str(inside / "own.png"))


async def test_what_is_no_file_is_refused_at_once(client: Client, tmp_path: Path):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    for name, message in (
        ("fifo.png", "is not a file"),
        ("folder.png", "is not a file"),
        ("missing.png", "There is no file"),
        ("photo.png/inside.png", "There is no file"),
        ("x" * 300, "cannot be read: File name too long"),
    ):
        assert message in await refused(client, "view_image", image=str(tmp_path / name))
    # Python 3.13 resolves a loop of links to itself, and opening it tells of the loop.
    message = await refused(client, "view_image", image=str(tmp_path / "loop.png"))
    assert "There is no file" in message or "cannot be read: Too many levels of symbolic links" in message


async def test_device_is_refused(client: Client, service: Service):
    service.settings = replace(service.settings, read_roots=(Path("/"),))
    for device in ("/dev/zero", "/dev/stdin", "/dev/urandom"):
        message = await refused(client, "view_image", image=device)
        assert "is not a file" in message or "There is no file" in message or "cannot be read" in message


async def test_file_nobody_may_read_is_refused(client: Client, photo: Path, monkeypatch: pytest.MonkeyPatch):
    real = os.open

    def forbidden(path: Any, *more: Any, **options: Any) -> int:
        if path == photo:  # root may read everything
            raise PermissionError(13, "Permission denied")
        return real(path, *more, **options)

    monkeypatch.setattr(os, "open", forbidden)
    assert "Permission denied" in await refused(client, "view_image", image=str(photo))


async def test_library_that_cannot_be_opened_is_reported_with_its_folder(client: Client, service: Service):
    service.settings.home.write_text("a file where the folder should be")
    assert str(service.settings.home) in await refused(client, "generate_image", prompt="x")


async def test_relative_path_is_no_reference(client: Client, monkeypatch: pytest.MonkeyPatch):
    # A server started in a folder below the user's home looks there, as in a checkout at ~/klein-mcp.
    monkeypatch.chdir("/")
    for path in ("photos/cat.png", "cat.png"):
        message = await refused(client, "view_image", image=path)
        assert message == f'"{path}" is a relative path. Give an absolute one, or a handle.'
    for path, why in (("ftp://a/cat.png", "is an address (ftp://)"), ("C:\\cat.png", "of Windows"), ("$X/c.png", "$X")):
        assert why in await refused(client, "view_image", image=path)
    assert "names no image" in await refused(client, "view_image", image="the cat")
    assert "j0123456789ab is a job" in await refused(client, "view_image", image="j0123456789ab")
    assert "data:image/png;base64," in await refused(client, "view_image", image="iVBORw0KGgo" * 1000)


async def test_truncated_file_is_refused_and_next_call_works(client: Client, photo: Path):
    whole = file(noise(64, 64))
    photo.write_bytes(whole[: len(whole) // 2])
    assert "is cut short" in await refused(client, "view_image", image=str(photo))
    photo.write_bytes(whole)
    await call(client, "view_image", image=str(photo))


async def test_images_from_web_are_off_unless_allowed(client: Client):
    message = await refused(client, "view_image", image="https://example.com/cat.png")
    assert "KLEIN_ALLOW_URLS=1" in message


async def test_warnings_about_reference_reach_result(client: Client, photo: Path, tmp_path: Path):
    import numpy as np

    path = tmp_path / "sticker.png"
    path.write_bytes(file(np.zeros((32, 32, 4), np.uint8)))
    # Not an edit: what an edit of it says depends on what nano happens to paint.
    facts = await call(client, "compose_references", images=[str(path), str(photo)], prompt="x")
    assert any("is transparent, and was shown to the model on one grey" in warning for warning in facts["warnings"])


async def test_tilde_is_users_home(client: Client, photo: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(photo.parent))
    await call(client, "view_image", image="~/photo.png")
