"""Tool results: a JSON line, a preview, a link, within the message limit."""

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mcp import Client
from mcp_types import Implementation

from engine.contract import Job, Rgb8
from klein_mcp.jobs.demo import DEMO
from klein_mcp.jobs.service import Service
from klein_mcp.mcp_server.client_profiles import CLIENTS, image_mode
from tests.fakes import FakeExecutor
from tests.images import file, noise, pixels, scene
from tests.tool_calls import call, kinds, line, preview, refused

pytestmark = pytest.mark.anyio

MESSAGE = 1_000_000
"""Bytes: Claude Desktop refuses a larger result."""


async def test_json_line_holds_everything_a_text_only_client_needs(client: Client):
    payload = line(await client.call_tool("generate_image", {"prompt": "a dot", "seed": 7}))
    assert list(payload) == ["image", "warnings", "seed", "size", "path"]
    assert (payload["seed"], payload["size"]) == ("7", [128, 128])
    assert payload["path"].endswith(f"/images/{payload['image']}.png")
    (content,) = (await client.read_resource(f"klein://images/{payload['image']}/recipe")).contents
    recipe = json.loads(content.text)  # type: ignore[union-attr]
    assert (recipe["seed"], recipe["model"], recipe["steps"], recipe["parents"]) == ("7", "nano", 4, [])
    assert recipe["cache"] == {"prompt": "miss", "references": "none"}
    assert {"prompt", "denoise", "decode"} <= set(recipe["ms"])


async def test_path_leads_to_the_exact_image(client: Client, painter: FakeExecutor):
    payload = await call(client, "generate_image", prompt="a dot", seed=7)
    with open(payload["path"], "rb") as file:
        assert (pixels(file.read()) == painter.paint(painter.jobs[0])).all()


async def test_result_is_text_then_preview_then_user_link(client: Client):
    result = await client.call_tool("generate_image", {"prompt": "a dot"})
    assert kinds(result) == ["text", "image", "resource_link"]
    assert result.structured_content is None
    link = result.content[2].model_dump(mode="json", by_alias=True, exclude_none=True)
    payload = line(result)
    assert link["uri"] == f"klein://images/{payload['image']}"
    assert (link["mimeType"], link["annotations"]["audience"]) == ("image/png", ["user"])


async def test_several_images_come_as_one_labelled_sheet(client: Client, painter: FakeExecutor):
    painter.paint = lambda job: scene(128, 128)
    result = await client.call_tool("generate_image", {"prompt": "a dot", "count": 4, "seed": 10})
    assert kinds(result) == ["text", "image", *["resource_link"] * 4]
    payload = line(result)
    assert [one["label"] for one in payload["images"]] == ["A", "B", "C", "D"]
    assert [one["seed"] for one in payload["images"]] == ["10", "11", "12", "13"]
    assert len({one["image"] for one in payload["images"]}) == 4
    sheet = preview(result)
    # Two by two: cells of 128 with gaps of 8, and a band of 24 above each for its label.
    assert sheet.shape == (320, 272, 3)
    bands = [sheet[top : top + 24, left : left + 128] for top in (0, 160) for left in (4, 140)]
    # The images are equal, so the bands differ by their letters.
    assert len({band.tobytes() for band in bands}) == 4
    cells = [sheet[top : top + 128, left : left + 128] for top in (24, 184) for left in (4, 140)]
    apart = [abs(cell.astype(int) - cells[0]).max() for cell in cells]
    assert max(apart) < 24, "no letter covers an image"  # JPEG alone: 13


async def test_image_of_a_count_equals_the_one_generated_alone(client: Client):
    payload = await call(client, "generate_image", prompt="a dot", count=3, seed=10)
    alone = await call(client, "generate_image", prompt="a dot", seed=12)
    with open(payload["images"][2]["path"], "rb") as one, open(alone["path"], "rb") as other:
        assert (pixels(one.read()) == pixels(other.read())).all()


@pytest.mark.parametrize(
    ("show", "expected"),
    [
        ("inline", ["text", "image", "resource_link"]),
        ("link", ["text", "resource_link"]),
        ("none", ["text"]),
    ],
)
async def test_show_decides_what_comes_with_the_line(client: Client, show: str, expected: list[str]):
    assert kinds(await client.call_tool("generate_image", {"prompt": "a dot", "show": show})) == expected


async def test_show_argument_overrides_setting_which_overrides_client_profile(service: Any, connect: Any):
    lost = Implementation(name="zed", version="1")  # drops images
    async with connect(client_info=lost) as client:
        assert kinds(await client.call_tool("generate_image", {"prompt": "a dot"})) == ["text", "resource_link"]
        service.settings = replace(service.settings, show="none")
        assert kinds(await client.call_tool("generate_image", {"prompt": "a dot"})) == ["text"]
        shown = await client.call_tool("generate_image", {"prompt": "a dot", "show": "inline"})
        assert kinds(shown) == ["text", "image", "resource_link"]


@pytest.mark.parametrize("mode", ["legacy", "auto"])
@pytest.mark.parametrize("row", CLIENTS, ids=lambda row: row.name)
async def test_each_known_client_gets_its_image_mode(connect: Any, row: Any, mode: str):
    async with connect(mode=mode, client_info=Implementation(name=row.name, version="1")) as client:
        shown = kinds(await client.call_tool("generate_image", {"prompt": "a dot"}))
    assert ("image" in shown) == (row.image_mode == "inline")


def test_client_profiles_name_their_sources():
    assert all(row.source for row in CLIENTS)
    assert [row.name for row in CLIENTS if row.verified] == ["mcp"]


def test_unknown_client_gets_a_preview_and_longer_names_match():
    assert image_mode("somebody-new") == "inline"
    assert image_mode("Zed Preview 1.2") == "link"


@pytest.mark.parametrize("count", [1, 4])
async def test_noisiest_image_stays_within_the_message_limit(client: Client, painter: FakeExecutor, count: int):
    def worst(job: Job) -> Rgb8:
        return noise(2048, 2048, job.seed)

    painter.paint = worst
    arguments = {"prompt": "noise", "width": 2048, "height": 2048, "count": count, "seed": 1}
    result = await client.call_tool("generate_image", arguments)
    assert kinds(result)[1] == "image"
    size = len(json.dumps(result.model_dump(mode="json", by_alias=True, exclude_none=True)))
    assert size < MESSAGE
    handle = line(result)["image"] if count == 1 else line(result)["images"][0]["image"]
    again = await client.call_tool("view_image", {"image": handle, "max_size": 1568})
    assert len(json.dumps(again.model_dump(mode="json", by_alias=True, exclude_none=True))) < MESSAGE


async def test_demo_model_warning_comes_once_per_client(client: Client):
    first = await call(client, "generate_image", prompt="a dot")
    second = await call(client, "generate_image", prompt="a dot")
    assert (DEMO in first.get("warnings", []), DEMO in second.get("warnings", [])) == (True, False)


async def test_no_demo_warning_when_nano_is_requested(client: Client):
    payload = await call(client, "generate_image", prompt="a dot", model="nano")
    assert DEMO not in payload.get("warnings", [])


@pytest.mark.parametrize(("model", "warned"), [("nano", False), ("auto", True)])
async def test_demo_warning_of_a_waited_job_depends_on_its_model(
    client: Client, painter: FakeExecutor, service: Service, model: str, warned: bool
):
    service.settings = replace(service.settings, wait_budget=0)
    painter.seconds_per_step = 1.0
    pending = await call(client, "generate_image", prompt="a dot", model=model)
    painter.hurry()
    service.settings = replace(service.settings, wait_budget=20)
    payload = await call(client, "wait_for_job", job=pending["job"])
    assert (DEMO in payload.get("warnings", [])) == warned


async def test_view_image_shows_a_small_region_enlarged(client: Client, painter: FakeExecutor):
    painter.paint = lambda job: scene(128, 128)
    await call(client, "generate_image", prompt="a dot")
    result = await client.call_tool("view_image", {"image": "last", "region": [96, 0, 32, 16], "max_size": 640})
    assert preview(result).shape == (320, 640, 3)
    assert line(result)["region"] == [96, 0, 32, 16]
    right, left = preview(result)[:, -64:, 0].mean(), preview(result)[:, :64, 0].mean()
    assert right > left > 180  # red grows to the right, and this is the right quarter


async def test_view_image_does_not_change_last(client: Client):
    first = await call(client, "generate_image", prompt="one")
    second = await call(client, "generate_image", prompt="two")
    await call(client, "view_image", image=first["image"])
    assert (await call(client, "view_image", image="last"))["image"] == second["image"]


async def test_list_images_pages_newest_first_with_parents(client: Client):
    first = await call(client, "generate_image", prompt="a red dot")
    second = await call(client, "edit_image", image="last", prompt="make it blue")
    page = await call(client, "list_images", limit=1)
    assert [one["image"] for one in page["images"]] == [second["image"]]
    assert page["images"][0]["parents"] == [first["image"]]
    rest = await call(client, "list_images", cursor=page["next"])
    assert [one["image"] for one in rest["images"]] == [first["image"]]
    assert rest["next"] is None
    found = await call(client, "list_images", search="RED")
    assert [one["image"] for one in found["images"]] == [first["image"]]
    for words in ("dot red", "a  dot", first["image"]):
        found = await call(client, "list_images", search=words)
        assert [one["image"] for one in found["images"]] == [first["image"]], words
    assert (await call(client, "list_images", search="red square"))["images"] == []
    assert (await call(client, "list_images", search="%"))["images"] == []


async def test_preview_is_a_jpeg_of_at_most_1024_pixels(client: Client):
    result = await client.call_tool("generate_image", {"prompt": "x", "width": 2048, "height": 1024})
    (block,) = (block for block in result.content if block.type == "image")
    assert block.mime_type == "image/jpeg"
    assert base64.b64decode(block.data)[:2] == b"\xff\xd8"
    assert max(preview(result).shape) == 1024


@pytest.mark.parametrize(
    ("colour", "seen", "value"),
    [((200, 30, 40), "grey", 128), ((128, 128, 130), "white", 255), ((150, 200, 240), "grey", 128)],
)
async def test_view_names_the_colour_behind_a_transparent_image(
    client: Client, tmp_path: Path, colour: tuple[int, int, int], seen: str, value: int
):
    image = np.zeros((64, 64, 4), np.uint8)
    image[16:48, 16:48] = (*colour, 255)
    (tmp_path / "sticker.png").write_bytes(file(image))
    result = await client.call_tool("view_image", {"image": str(tmp_path / "sticker.png")})
    assert line(result)["background"] == f"transparent; the preview shows it on plain {seen}"
    assert np.abs(preview(result)[4, 4].astype(int) - value).max() < 12  # JPEG's error


async def test_comparison_shows_both_images_on_one_colour(client: Client, tmp_path: Path):
    """A colour for each would count as a change of all that is transparent."""
    for name, grey in (("first", 60), ("second", 128)):
        image = np.zeros((64, 64, 4), np.uint8)
        image[16:48, 16:48] = (grey, grey, grey, 255)
        (tmp_path / f"{name}.png").write_bytes(file(image))
    first, second = (str(tmp_path / f"{name}.png") for name in ("first", "second"))
    facts = await call(client, "view_image", image=first, compare_with=second)
    assert facts["changed"]["box"] == [16, 16, 32, 32]
    assert facts["background"].startswith("transparent; ")
    whole = preview(await client.call_tool("view_image", {"image": first, "compare_with": second}))
    last = whole[:, -whole.shape[1] // 3 :].max(axis=2).astype(int)
    # Dark where they are equal; twice the difference of 68 where not. JPEG blurs the edge of the square.
    assert ((last < 12).sum(), (abs(last - 136) < 12).sum()) == pytest.approx((64 * 64 - 32 * 32, 32 * 32), rel=0.15)
    result = await client.call_tool("view_image", {"image": first, "compare_with": second, "region": [8, 8, 16, 16]})
    # A quarter of the region changed, and it is shown enlarged.
    changed = line(result)["changed"]
    assert (round(changed["share"], 1), changed["box"]) == (0.2, [16, 16, 8, 8])  # a lone corner is no visible change
    assert preview(result).shape[1] > 900
    assert "Leave out background" in await refused(
        client, "view_image", image=first, compare_with=second, background="transparent"
    )


async def test_draft_that_changed_nothing_is_named_and_no_empty_claim_made(client: Client, painter: FakeExecutor):
    start = await call(client, "generate_image", prompt="a dot")
    painter.paint = lambda job: job.references[0] if job.seed == 10 else 255 - job.references[0]
    sheet = await call(
        client, "edit_image", image="last", prompt="invert it", count=2, seed=10, region=[0, 0, *start["size"]]
    )
    same, other = sheet["images"]
    assert sheet["warnings"][0] == f"{same['image']}: nothing visible changed"
    # The region is all of the image: there is no byte outside that could have been kept.
    assert [each["changed"]["kept"] for each in (same, other)] == [False, False]
