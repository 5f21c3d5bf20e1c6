"""save_image: atomic writes, formats and provenance."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mcp import Client
from mcp_types import ListRootsResult, Root
from PIL import Image
from pydantic import FileUrl

from klein_mcp.errors import RequestError
from klein_mcp.images import codec, export, provenance
from klein_mcp.images.export import SaveOptions, resolve
from klein_mcp.jobs.service import Service
from tests.fakes import FakeExecutor
from tests.images import file, pixels, scene
from tests.tool_calls import call, refused

IPTC = "http://cv.iptc.org/newscodes/digitalsourcetype/"


@pytest.fixture
def project(tmp_path: Path, service: Service) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    service.settings = replace(service.settings, write_roots=(folder,))
    return folder


async def painted(client: Client, **more: Any) -> dict[str, Any]:
    return await call(client, "generate_image", prompt="a dot — “quoted” <&> 熊", seed=5, **more)


pytestmark = pytest.mark.anyio


async def test_png_is_librarys_own_bytes(client: Client, project: Path):
    facts = await painted(client)
    saved = await call(client, "save_image", image="last", path=str(project / "deep" / "er" / "hero.png"))
    assert saved["saved"] == str(project / "deep" / "er" / "hero.png")
    assert Path(saved["saved"]).read_bytes() == Path(facts["path"]).read_bytes()
    assert (saved["image"], saved["format"], saved["width"], saved["height"]) == (facts["image"], "png", 128, 128)


@pytest.mark.parametrize("name", ["hero.png", "hero.jpg", "hero.jpeg", "hero.webp"])
async def test_every_format_tells_how_it_was_made(client: Client, project: Path, name: str):
    facts = await painted(client)
    await call(client, "save_image", image="last", path=str(project / name))
    with Image.open(project / name) as opened:
        recipe = provenance.read(opened)
        packet = opened.info.get("xmp") or opened.info.get("XML:com.adobe.xmp")
    assert recipe is not None
    assert (recipe["image"], recipe["seed"], recipe["model"]) == (facts["image"], "5", "nano")
    assert recipe["request"]["prompt"] == "a dot — “quoted” <&> 熊"
    assert packet
    root = ElementTree.fromstring(packet.strip(b"\0 ") if isinstance(packet, bytes) else packet)
    (described,) = root.iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description")
    kind = described.get("{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType")
    assert kind == IPTC + "trainedAlgorithmicMedia"


async def test_edit_is_called_composite_in_every_format(client: Client, project: Path):
    await painted(client)
    await call(client, "edit_image", image="last", prompt="x")
    recipes = []
    for name in ("edit.png", "edit.webp"):
        await call(client, "save_image", image="last", path=str(project / name))
        with Image.open(project / name) as opened:
            packet = opened.info.get("xmp") or opened.info["XML:com.adobe.xmp"].encode()
            recipes.append(provenance.read(opened))
        assert (IPTC + "compositeWithTrainedAlgorithmicMedia").encode() in packet
    # Alike in every format. What was kept is of the library's pixels, and untrue of other ones.
    assert recipes[0] == recipes[1]
    assert "changed" not in (recipes[0] or {"changed": None})


@pytest.mark.parametrize("name", ["hero.png", "hero.jpg", "hero.webp"])
async def test_strip_metadata_leaves_nothing_but_pixels(client: Client, project: Path, name: str):
    await painted(client)
    await call(client, "save_image", image="last", path=str(project / name), strip_metadata=True)
    data = (project / name).read_bytes()
    for trace in (b"klein", b"xmp", b"a dot", b"trainedAlgorithmicMedia"):
        assert trace not in data


async def test_photo_is_not_called_painting(client: Client, project: Path, tmp_path: Path):
    (tmp_path / "photo.png").write_bytes(file(scene(64, 48)))
    await call(client, "save_image", image=str(tmp_path / "photo.png"), path=str(project / "copy.png"))
    assert b"klein" not in (project / "copy.png").read_bytes()


@pytest.mark.parametrize("name", ["hero.png", "hero.jpg", "hero.webp"])
async def test_saved_image_opened_again_finds_its_ancestors(client: Client, project: Path, tmp_path: Path, name: str):
    facts = await painted(client)
    await call(client, "save_image", image="last", path=str(project / name))
    again = await call(client, "view_image", image=str(project / name))
    if name.endswith("png"):
        assert again["image"] == facts["image"]
    else:
        assert again["parents"] == [facts["image"]]


@pytest.mark.parametrize("name", ["hero.jpg", "hero.webp"])
async def test_saved_image_reopened_as_png_keeps_its_recipe(client: Client, project: Path, tmp_path: Path, name: str):
    facts = await painted(client)
    await call(client, "save_image", image="last", path=name)
    await call(client, "save_image", image=str(project / name), path="again.png")
    with Image.open(project / "again.png") as opened:
        recipe = provenance.read(opened)
    assert recipe is not None
    assert (recipe["image"], recipe["seed"]) == (facts["image"], "5")
    await call(client, "save_image", image=str(project / name), path="bare.png", strip_metadata=True)
    assert b"klein" not in (project / "bare.png").read_bytes()


async def test_smaller_copy_keeps_its_shape_and_nothing_is_enlarged(client: Client, project: Path):
    await painted(client, width=256, height=128)
    small = await call(client, "save_image", image="last", path="small.png", max_size=64)
    assert (small["width"], small["height"]) == (64, 32)
    large = await call(client, "save_image", image="last", path="large.png", max_size=4096)
    assert (large["width"], large["height"]) == (256, 128)


async def test_size_beyond_max_size_is_refused(client: Client, project: Path):
    await painted(client)
    message = await refused(client, "save_image", image="last", path="x.png", size=512, max_size=64)
    assert message == "size 512 is more than max_size 64. Give one of them."
    saved = await call(client, "save_image", image="last", path="x.png", size=64, max_size=512)
    assert (saved["width"], saved["height"], "warnings" in saved) == (64, 64, False)
    assert (await call(client, "save_image", image="last", path="y.png", size=0, max_size=0))["width"] == 128


async def test_file_that_no_tool_could_open_is_not_written(
    client: Client, project: Path, monkeypatch: pytest.MonkeyPatch
):
    await painted(client)
    message = await refused(client, "save_image", image="last", path="x.png", size=8192)
    assert message == "size 8192 makes an image of over 64 MP; at most 8000 in this shape. Say size 8000, or less."
    monkeypatch.setattr(export, "MAX_FILE_BYTES", 100)
    assert "The file would have 0 MiB" in await refused(client, "save_image", image="last", path="x.png", size=300)
    assert not list(project.iterdir())


async def test_jpeg_is_close_to_image(client: Client, project: Path, painter: FakeExecutor):
    painter.paint = lambda job: scene(128, 128)
    await painted(client)
    await call(client, "save_image", image="last", path="hero.jpg")
    error = abs(pixels((project / "hero.jpg").read_bytes()).astype(int) - scene(128, 128).astype(int))
    assert error.max() <= 6


async def test_nothing_is_overwritten_unless_reported(client: Client, project: Path):
    (project / "hero.png").write_text("mine")
    await painted(client)
    message = await refused(client, "save_image", image="last", path=str(project / "hero.png"))
    assert "exists. Choose another name, or say overwrite: true" in message
    assert (project / "hero.png").read_text() == "mine"
    await call(client, "save_image", image="last", path=str(project / "hero.png"), overwrite=True)
    assert (project / "hero.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in project.iterdir()] == ["hero.png"]


async def test_failed_write_leaves_nothing_behind(client: Client, project: Path, monkeypatch: pytest.MonkeyPatch):
    await painted(client)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    (project / "hero.png").write_text("mine")
    monkeypatch.setattr("klein_mcp.images.export.os.fsync", full)
    message = await refused(client, "save_image", image="last", path=str(project / "hero.png"), overwrite=True)
    assert "No space left on device" in message
    assert (project / "hero.png").read_text() == "mine"
    assert [path.name for path in project.iterdir()] == ["hero.png"]


async def test_folder_gets_file_named_by_handle(client: Client, project: Path):
    facts = await painted(client)
    saved = await call(client, "save_image", image="last", path=str(project), format="webp")
    assert saved["saved"] == str(project / f"{facts['image']}.webp")


async def test_relative_path_counts_from_project(client: Client, project: Path):
    await painted(client)
    assert (await call(client, "save_image", image="last", path="art/hero"))["saved"] == str(project / "art/hero.png")


async def test_address_of_a_file_is_its_path_and_no_other_is_taken(client: Client, project: Path):
    await painted(client)
    written = project / "my hero.png"
    assert (await call(client, "save_image", image="last", path=written.as_uri()))["saved"] == str(written)
    for path in ("https://example.com/hero.png", "sandbox:/mnt/hero.png", "C:\\Users\\me\\hero.png", "$HOME/hero.png"):
        message = await refused(client, "save_image", image="last", path=path)
        assert message.startswith(path)
        assert message.endswith(f"Give a path in {project}.")
    assert [each.name for each in project.iterdir()] == ["my hero.png"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/etc/hero.png", "outside the folders that may be written"),
        ("../hero.png", "goes up with '..'"),
        ("art/../../hero.png", "goes up with '..'"),
        ("out/hero.png", "outside the folders that may be written"),
        ("hero.exe", "it can be .png, .jpg, .jpeg, .webp"),
        ("hero.pgn", "Did you mean .png?"),
        ("he\nro.png", "control characters"),
        ("he\0ro.png", "control characters"),
        ("file:///he%00ro.png", "control characters"),
        ("file:///he%0Aro.png", "control characters"),
        ("ftp://he\nro.png", "control characters"),
        ("x" * 300 + ".png", "ame too long"),
        ("mine.txt/hero.png", "cannot be written"),
    ],
)
async def test_path_that_may_not_be_written_is_refused(client: Client, project: Path, path: str, message: str):
    (project / "out").symlink_to(project.parent)
    (project / "mine.txt").write_text("mine")
    await painted(client)
    assert message in await refused(client, "save_image", image="last", path=path)
    assert not (project.parent / "hero.png").exists()


async def test_format_and_name_must_agree(client: Client, project: Path):
    await painted(client)
    message = await refused(client, "save_image", image="last", path="hero.png", format="jpeg")
    assert "hero.png ends like png, but format is jpeg" in message


async def test_link_in_place_of_file_is_replaced_never_followed(client: Client, project: Path):
    (project.parent / "secret.png").write_text("secret")
    (project / "hero.png").symlink_to(project.parent / "secret.png")
    await painted(client)
    await refused(client, "save_image", image="last", path="hero.png")
    await call(client, "save_image", image="last", path="hero.png", overwrite=True)
    assert (project.parent / "secret.png").read_text() == "secret"
    assert not (project / "hero.png").is_symlink()


def offering(*folders: Path) -> Any:
    async def roots(context: Any) -> ListRootsResult:
        return ListRootsResult(roots=[Root(uri=FileUrl("file://" + quote(str(folder)))) for folder in folders])

    return roots


async def test_without_setting_clients_folders_are_bounds(connect: Any, tmp_path: Path):
    folder = tmp_path / "their project"
    folder.mkdir()
    async with connect(mode="legacy", list_roots_callback=offering(folder)) as client:
        await painted(client)
        assert (await call(client, "save_image", image="last", path="a.png"))["saved"] == str(folder / "a.png")
        await refused(client, "save_image", image="last", path=str(tmp_path / "b.png"))


@pytest.mark.filterwarnings("ignore:Pydantic serializer")
@pytest.mark.parametrize("uri", ["http://x/", "untitled:", "C:\\\\Users", ""])
async def test_root_that_is_no_folder_counts_as_none(connect: Any, uri: str, monkeypatch: pytest.MonkeyPatch):
    async def roots(context: Any) -> ListRootsResult:
        return ListRootsResult.model_construct(roots=[Root.model_construct(uri=uri)])

    monkeypatch.chdir("/")
    async with connect(mode="legacy", list_roots_callback=roots) as client:
        await painted(client)
        assert "No folder is open for writing" in await refused(client, "save_image", image="last", path="a.png")


async def test_setting_is_hard_bound_whatever_client_offers(connect: Any, project: Path, tmp_path: Path):
    async with connect(mode="legacy", list_roots_callback=offering(tmp_path)) as client:
        await painted(client)
        await refused(client, "save_image", image="last", path=str(tmp_path / "b.png"))


async def test_without_any_folder_it_reports_line_that_allows_one(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir("/")
    await painted(client)
    message = await refused(client, "save_image", image="last", path=str(tmp_path / "a.png"))
    assert "KLEIN_WRITE_ROOTS=/path/to/project" in message
    assert "this server was started in /." in message


async def test_client_that_opens_no_folder_saves_into_one_beside_the_pictures(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Claude Desktop starts servers in / and names no roots."""
    (tmp_path / "Pictures").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir("/")
    await painted(client)
    saved = await call(client, "save_image", image="last", path="circle.png")
    assert saved["saved"] == str(tmp_path / "Pictures" / "klein-mcp" / "circle.png")
    message = await refused(client, "save_image", image="last", path=str(tmp_path / "Pictures" / "photo.png"))
    assert str(tmp_path / "Pictures" / "klein-mcp") in message
    assert message.endswith('("env" in a client\'s configuration).')


async def test_project_folder_inside_home_is_allowed_by_itself_but_not_home(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "project").mkdir()
    await painted(client)
    monkeypatch.chdir(tmp_path)
    await refused(client, "save_image", image="last", path=str(tmp_path / "project" / "a.png"))
    monkeypatch.chdir(tmp_path / "project")
    await call(client, "save_image", image="last", path=str(tmp_path / "project" / "a.png"))
    await refused(client, "save_image", image="last", path=str(tmp_path / "a.png"))


NAMES = st.text(max_size=12) | st.sampled_from(["..", ".", "~", "/", "a", "out", "in", "C:", "a.png", " ", "\\..\\"])


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(NAMES, min_size=1, max_size=6), leading=st.booleans(), form=st.sampled_from([None, "jpeg"]))
def test_whatever_path_is_asked_for_it_lies_inside_or_is_refused(
    parts: list[str], leading: bool, form: Any, tmp_path_factory: pytest.TempPathFactory
):
    base = tmp_path_factory.getbasetemp() / "walls"
    root = base / "root"
    if not root.exists():
        (root / "in").mkdir(parents=True)
        (root / "out").symlink_to(base)
        (root / "a").symlink_to(root / "in")
    path = ("/" if leading else "") + "/".join(parts)
    try:
        _, target, _ = resolve(SaveOptions(path or "x", form), "k7f3q2", (root,))
    except RequestError as exc:
        assert "\n" not in str(exc)  # noqa: PT017
        return
    real = Path(os.path.realpath(target.parent)) / target.name
    assert real.is_relative_to(root)
    assert target.suffix in (".png", ".jpg", ".jpeg", ".webp") or target.suffix.lower() in (".png", ".jpg", ".webp")


def test_foreign_packet_is_read_without_harm():
    bomb = '<?xpacket?><!DOCTYPE lolz [<!ENTITY a "aaaaaaaaaa">]><x:xmpmeta xmlns:x="adobe:ns:meta/">&a;</x:xmpmeta>'
    for packet in (bomb, "<x:xmpmeta", "\0" * 100, "<a>" * 20_000, b"\xff\xfe<"):
        opened = Image.new("RGB", (4, 4))
        opened.info["xmp"] = packet
        assert provenance.read(opened) is None
    for text in ("[1]", "{", json.dumps("x"), "[" * 10_000):
        opened = Image.new("RGB", (4, 4))
        opened.info["klein-mcp"] = text
        assert provenance.read(opened) is None


def test_longest_prompt_fits_into_jpeg(tmp_path: Path):
    from klein_mcp.mcp_server.tools.fields import MAX_PROMPT

    recipe = {"image": "k7f3q2", "order": {"prompt": "🐻" * MAX_PROMPT}, "parents": []}
    data = codec.encode(scene(16, 16), "jpeg", recipe)
    assert codec.decode(data, "it").recipe == recipe


@pytest.mark.parametrize(("name", "side"), [("wide.webp", 16_384), ("wide.jpg", 65_501)])
async def test_format_without_room_for_the_image_says_so(
    client: Client, project: Path, tmp_path: Path, name: str, side: int
):
    (tmp_path / "wide.png").write_bytes(file(scene(side, 8)))
    message = await refused(client, "save_image", image=str(tmp_path / "wide.png"), path=name)
    assert f"cannot store it: a side has {side} pixels" in message
    assert "Choose png" in message
    await call(client, "save_image", image=str(tmp_path / "wide.png"), path=name, max_size=1024)


async def test_name_that_is_too_long_is_refused_in_words(client: Client, project: Path):
    await painted(client)
    message = await refused(client, "save_image", image="last", path=str(project / ("a" * 300 + ".png")))
    assert "File name too long" in message
    assert "Errno" not in message
    assert len(message) < 250
