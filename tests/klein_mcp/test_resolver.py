"""Every way to name a picture, what it becomes in the library, and what may not be opened."""

import base64
import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from mcp import Client

from klein_mcp.jobs.service import Service
from tests.fakes import FakePainter
from tests.images import file, noise, scene
from tests.tool_calls import call, refused

pytestmark = pytest.mark.anyio


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    path.write_bytes(file(scene(64, 48)))
    return path


async def test_a_path_becomes_a_picture_of_the_library_and_a_parent(client: Client, photo: Path):
    told = await call(client, "edit_image", image=str(photo), prompt="x")
    (parent,) = told["parents"]
    listed = (await call(client, "list_images"))["images"]
    assert [(one["image"], one["tool"]) for one in listed] == [(told["image"], "edit_image"), (parent, "open")]
    assert listed[1]["source"] == str(photo)


async def test_the_same_file_is_the_same_picture_whatever_its_name_and_format(client: Client, photo: Path):
    first = await call(client, "view_image", image=str(photo))
    other = photo.with_suffix(".bmp")
    other.write_bytes(file(scene(64, 48), "BMP"))
    assert (await call(client, "view_image", image=str(other)))["image"] == first["image"]
    photo.write_bytes(file(noise(64, 48)))
    assert (await call(client, "view_image", image=str(photo)))["image"] != first["image"]


async def test_a_data_url_is_taken_though_never_asked_for(client: Client, painter: FakePainter):
    url = "data:image/png;base64," + base64.b64encode(file(scene(64, 48))).decode()
    await call(client, "edit_image", image=url, prompt="x")
    assert (painter.jobs[0].references[0] == scene(64, 48)).all()
    tools = (await client.list_tools()).model_dump_json()
    assert "data:" not in tools
    assert "base64" not in tools


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("data:image/png;base64", "has no comma"),
        ("data:image/png;base64,%%%", "no valid base64; it may be cut short"),
        ("data:image/png;base64,AAAA", "is not an image that can be read"),
        ("data:,hello", "is not an image that can be read"),
        ("data:text/html;base64,PGh0bWw+", "web page"),
    ],
)
async def test_a_bad_data_url_is_refused(client: Client, url: str, said: str):
    assert said in await refused(client, "view_image", image=url)


async def test_whether_a_file_outside_exists_is_not_told(client: Client):
    there = await refused(client, "view_image", image="/etc/hostname")
    missing = await refused(client, "view_image", image="/etc/no-such-file")
    assert there.replace("hostname", "no-such-file") == missing


async def test_file_addresses_and_resource_addresses_are_understood(client: Client, photo: Path):
    spaced = photo.rename(photo.with_name("my photo.png"))
    told = await call(client, "view_image", image=f"file://{quote(str(spaced))}")
    assert (await call(client, "view_image", image=told["uri"]))["image"] == told["image"]
    assert (await call(client, "view_image", image=f"{told['uri']}/preview"))["image"] == told["image"]


async def test_outside_the_roots_nothing_is_opened(client: Client, tmp_path: Path):
    said = await refused(client, "view_image", image="/etc/hostname")
    assert "outside the folders that may be read" in said
    assert "KLEIN_READ_ROOTS" in said


async def test_a_path_from_a_result_can_be_opened_wherever_the_library_lies(
    client: Client, service: Service, tmp_path: Path
):
    service.settings = replace(service.settings, read_roots=(tmp_path / "elsewhere",))
    told = await call(client, "generate_image", prompt="a dot")
    assert (await call(client, "view_image", image=told["path"]))["image"] == told["image"]
    await refused(client, "view_image", image=str(service.settings.library / "library.sqlite3"))


async def test_a_link_that_leads_out_of_the_roots_is_not_followed(
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
    for name, said in (
        ("fifo.png", "is not a file"),
        ("folder.png", "is not a file"),
        ("loop.png", "There is no file"),
        ("missing.png", "There is no file"),
        ("photo.png/inside.png", "There is no file"),
        ("x" * 300, "cannot be read: File name too long"),
    ):
        assert said in await refused(client, "view_image", image=str(tmp_path / name))


async def test_a_device_is_refused(client: Client, service: Service):
    service.settings = replace(service.settings, read_roots=(Path("/"),))
    for device in ("/dev/zero", "/dev/stdin", "/dev/urandom"):
        said = await refused(client, "view_image", image=device)
        assert "is not a file" in said or "There is no file" in said or "cannot be read" in said


async def test_a_file_nobody_may_read_is_refused(client: Client, photo: Path, monkeypatch: pytest.MonkeyPatch):
    real = os.open

    def forbidden(path: Any, *more: Any, **options: Any) -> int:
        if path == photo:  # root may read everything
            raise PermissionError(13, "Permission denied")
        return real(path, *more, **options)

    monkeypatch.setattr(os, "open", forbidden)
    assert "Permission denied" in await refused(client, "view_image", image=str(photo))


async def test_a_library_that_cannot_be_opened_is_said_with_its_folder(client: Client, service: Service):
    service.settings.home.write_text("a file where the folder should be")
    assert str(service.settings.home) in await refused(client, "generate_image", prompt="x")


async def test_a_relative_path_is_no_reference(client: Client):
    for path in ("photos/cat.png", "cat.png"):
        said = await refused(client, "view_image", image=path)
        assert said == f'"{path}" is a relative path. Give an absolute one, or a handle.'
    assert "names no image" in await refused(client, "view_image", image="the cat")


async def test_a_truncated_file_is_refused_and_the_next_call_works(client: Client, photo: Path):
    whole = file(noise(64, 64))
    photo.write_bytes(whole[: len(whole) // 2])
    assert "is cut short" in await refused(client, "view_image", image=str(photo))
    photo.write_bytes(whole)
    await call(client, "view_image", image=str(photo))


async def test_pictures_from_the_web_are_off_unless_allowed(client: Client):
    said = await refused(client, "view_image", image="https://example.com/cat.png")
    assert "KLEIN_ALLOW_URLS=1" in said


async def test_warnings_about_a_reference_reach_the_result(client: Client, tmp_path: Path):
    import numpy as np

    path = tmp_path / "sticker.png"
    path.write_bytes(file(np.zeros((32, 32, 4), np.uint8)))
    told = await call(client, "edit_image", image=str(path), prompt="x")
    assert any("transparent" in warning for warning in told["warnings"])


async def test_a_tilde_is_the_users_home(client: Client, photo: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(photo.parent))
    await call(client, "view_image", image="~/photo.png")
