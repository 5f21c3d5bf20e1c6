"""Recipes repeated and edits replayed by agents, relative paths as input, and what a history lists."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mcp import Client
from mcp_types import ListRootsResult, Root
from PIL import Image

from engine.contract import Rgb8
from klein_mcp.errors import RequestError, did_you_mean
from klein_mcp.images import paths, preserve
from klein_mcp.images.record import Record
from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.execute import prepare_pixels
from klein_mcp.jobs.replay import repeat, replay
from klein_mcp.jobs.request import Aspect, Exact, Native, edit, generate
from klein_mcp.jobs.service import Service
from tests.embedded import SIDE
from tests.fakes import FakeExecutor, painted
from tests.images import file, noise, pixels, scene
from tests.real_server import RealServer
from tests.tool_calls import call, kinds, line, preview, refused

pytestmark = pytest.mark.anyio


OTHER_RECIPES: list[dict[str, Any]] = [{"seed": 8}, {"model": "klein-4b"}, {"width": 64, "height": 64}]


def record(request: Any, **recipe: Any) -> Record:
    made = {"seed": str(request.seed), "model": "nano", "request": request.to_json(), **recipe}
    return Record("k7f3q2", "", "", 128, 128, 0, 0.0, "me", request.tool, None, request.prompt, made)


# The core


def test_recipe_is_repeated_with_what_is_given() -> None:
    draft = record(generate("a cat", seed=7))
    assert repeat(draft) == generate("a cat", seed=7, model="nano")
    final = repeat(draft, aspect="16:9", model="klein-4b", count=2, seed=9)
    assert (final.size, final.model, final.count, final.seed) == (Aspect(16, 9), "klein-4b", 2, 9)
    assert repeat(draft, width=250, height=250).warnings == (
        "250×250 was rounded to 256×256: sides are multiples of 16",
    )


def test_recipe_asks_for_the_model_that_was_asked_for() -> None:
    by_path = replace(generate("a cat", seed=7), model="/models/mine")
    assert repeat(record(by_path, model="klein-4b")).model == "/models/mine"
    assert repeat(record(generate("a cat", seed=7), model="klein-4b")).model == "klein-4b"


def test_same_image_again_is_computed_in_the_recorded_mode() -> None:
    draft = record(generate("a cat", seed=7), mode="compiled")
    several = repeat(draft, seed=7, model="nano", count=2)
    assert repeat(draft).mode == several.mode == "compiled"
    assert [prepare_pixels(several, []).job(index).mode for index in range(2)] == ["compiled", None]
    assert [repeat(draft, **other).mode for other in OTHER_RECIPES] == [None] * 3
    assert repeat(record(generate("a cat", seed=7), mode="of another version")).mode is None


def test_recipe_of_an_edit_keeps_its_references() -> None:
    request = repeat(record(edit("aaaaaa", "make it blue", seed=1)), width=64, height=64)
    assert (request.images, request.size) == (("aaaaaa",), Exact(64, 64))
    with pytest.raises(RequestError, match="region and mask keep"):
        repeat(record(edit("aaaaaa", "make it blue", region=[0, 0, 64, 64])), width=64, height=64)


@pytest.mark.parametrize("recipe", [{}, {"request": None}, {"request": {"tool": 1}}, {"order": []}])
def test_image_without_a_recipe_cannot_be_repeated(recipe: dict[str, Any]) -> None:
    opened = Record("k7f3q2", "", "", 8, 8, 0, 0.0, "me", "open", "/a.png", None, recipe)
    with pytest.raises(RequestError, match="no recipe"):
        repeat(opened)


@pytest.mark.parametrize("text", ["cat.png", "sunset.png", "out/cat.png", "./cat", " 'my cat.webp' ", "..\\cat.png"])
def test_relative_paths_are_recognised(text: str) -> None:
    assert paths.is_relative(text)


OTHERS = "/a/b.png k7f3q2 last last.B last~1 ~/a.png cat klein://images/k7f3q2 https://a/b.png data:,x"


@pytest.mark.parametrize("text", [*OTHERS.split(), "file:///cat.png"])
def test_other_references_are_no_relative_paths(text: str) -> None:
    assert not paths.is_relative(text)


RATIOS = ("1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16", "21:9", "9:21")


@pytest.mark.parametrize(
    ("asked", "nearest"),
    [("5:4", "4:3"), ("4:5", "3:4"), ("16:10", "3:2"), ("1.91:1", "16:9"), ("5x5", "1:1"), ("2:1", "16:9")],
)
def test_nearest_shape_is_suggested(asked: str, nearest: str) -> None:
    assert did_you_mean(asked, RATIOS) == f"Did you mean {nearest}?"


@pytest.mark.parametrize(("word", "known"), [("INLIN", "inline"), ("of", "off"), ("K7F3Q3", "k7f3q2")])
def test_near_miss_is_suggested_in_any_letter_case(word: str, known: str) -> None:
    assert did_you_mean(word, ["inline", "off", "k7f3q2"]) == f"Did you mean {known}?"


def test_drafts_are_alike_by_what_can_be_seen() -> None:
    first = noise(64, 64)
    faint = (first // 2 + 64).astype(np.uint8)
    other = faint.copy()
    other[:16, :16] = 0  # 6 % of the pixels
    assert preserve.are_alike([faint, faint, (faint + 9).astype(np.uint8)])
    assert not preserve.are_alike([faint, faint, other])
    assert not preserve.are_alike([faint, other], changed=0.1)


# Through the server, around a fake executor


async def test_relative_path_is_read_from_the_clients_roots(connect: Any, tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    # `circle` has the length of a handle, `sunset` could be one.
    for name in ("shot.png", "circle.png", "sunset.png"):
        (tmp_path / "project" / name).write_bytes(file(scene(64, 64)))

    async def roots(context: Any) -> ListRootsResult:
        return ListRootsResult(roots=[Root(uri=(tmp_path / "project").as_uri())])  # type: ignore[arg-type]

    async with connect(mode="legacy", list_roots_callback=roots) as client:
        facts = await call(client, "view_image", image="shot.png")
        assert facts["source"].endswith("project/shot.png")
        for name in ("circle.png", "sunset.png", f"{facts['image']}.png"):
            assert (await call(client, "view_image", image=name))["image"] == facts["image"]
        assert (await call(client, "edit_image", image="./shot.png", prompt="x"))["image"]
        assert "There is no file" in await refused(client, "view_image", image="other.png")
        assert "outside the folders" in await refused(client, "view_image", image="../../etc/passwd.png")


async def test_prompt_or_again_is_asked_for(client: Client) -> None:
    assert "prompt is missing" in await refused(client, "generate_image")
    assert "prompt is missing" in await refused(client, "edit_image", image="last")
    made = await call(client, "generate_image", prompt="a cat")
    assert "again repeats the prompt" in await refused(client, "generate_image", prompt="a dog", again="last")
    assert "without region" in await refused(client, "edit_image", image="last", again="last", region=[0, 0, 9, 9])
    assert "was not made from another" in await refused(client, "edit_image", image="last", again=made["image"])


async def test_modes_are_understood_in_any_letter_case(client: Client, painter: FakeExecutor) -> None:
    await call(client, "generate_image", prompt="a dot", show="INLINE", model="Nano", aspect_ratio="16:9")
    await call(client, "edit_image", image="LAST", prompt="x", preserve="OFF")
    assert painter.jobs[-1].find_change is False
    assert "Did you mean 4:3?" in await refused(client, "generate_image", prompt="x", aspect_ratio="5:4")
    made = await call(client, "generate_image", prompt="a dot")
    typo = made["image"][:-1] + ("2" if made["image"][-1] != "2" else "3")
    assert f"Did you mean {made['image']}?" in await refused(client, "view_image", image=typo)
    assert f"Did you mean {made['image']}?" in await refused(client, "view_image", image=made["image"][:-1])


async def test_edits_of_a_copy_are_replayed_on_the_other_image(
    client: Client, painter: FakeExecutor, service: Service, tmp_path: Path
) -> None:
    service.settings = replace(service.settings, write_roots=(tmp_path,))
    first = (await call(client, "generate_image", prompt="a cat", seed=1))["image"]
    copy, twice = str(tmp_path / "copy.jpg"), str(tmp_path / "copy of the copy.jpg")
    await call(client, "save_image", image=first, path=copy, max_size=96)
    await call(client, "save_image", image=copy, path=twice, max_size=80)
    edited = (await call(client, "edit_image", image=twice, prompt="make it red", preserve="off"))["image"]
    other = await call(client, "generate_image", prompt="a dog", seed=2)

    await call(client, "edit_image", image=other["image"], again=edited)
    assert np.array_equal(painter.jobs[-1].references[0], image(other))
    me = CallContext("me")
    await replay(service, edited, me, onto=other["image"])
    assert np.array_equal(painter.jobs[-1].references[0], image(other))
    again, _ = await replay(service, edited, me, seed=9)
    assert np.array_equal(
        painter.jobs[-1].references[0], service.sources.pixels(service.store.get(again.images[0].handle))
    )
    await replay(service, edited, me)
    assert painter.jobs[-1].references[0].shape == (80, 80, 3), "with its own seeds it is the same again"


async def test_mask_of_a_chain_is_the_same_image_at_every_step(
    client: Client, painter: FakeExecutor, service: Service
) -> None:
    masks = {"last": 0, "last~1": 1, "A": 1}
    for mask, back in masks.items():
        half = np.zeros((128, 128, 3), np.uint8)
        half[:64] = 255
        painter.paint = lambda job, half=half: half
        made = (await call(client, "generate_image", prompt="a mask", count=2))["images"]
        painter.paint = painted
        facts = await call(client, "edit_image", image=made[0]["image"], prompt=["one", "two", "three"], mask=mask)
        steps = [service.store.get(step["image"]).recipe["request"]["mask"] for step in facts["steps"]]
        assert steps == [made[1 - back]["image"]] * 3


async def test_warnings_of_opened_files_reach_the_result(
    client: Client, painter: FakeExecutor, service: Service, tmp_path: Path
) -> None:
    (tmp_path / "moving.gif").write_bytes(
        file(Image.fromarray(noise(64, 64)), "GIF", save_all=True, append_images=[Image.fromarray(noise(64, 64, 1))])
    )
    moving = str(tmp_path / "moving.gif")
    steps = await call(client, "edit_image", image=moving, prompt=["one", "two"], preserve="off")
    again = await call(client, "edit_image", image=moving, again=steps["image"])
    compared = await call(client, "view_image", image=steps["image"], compare_with=moving)
    service.settings = replace(service.settings, wait_budget=0, write_roots=(tmp_path,))
    saved = await call(client, "save_image", image=moving, path=str(tmp_path / "still.png"))
    painter.seconds_per_step = 30.0
    pending = await call(
        client, "edit_image", image=moving, prompt=["one", "two"], width=100, height=64, preserve="off"
    )
    painter.hurry()
    for facts in (steps, again, compared, saved, pending):
        assert [warning for warning in facts["warnings"] if "first" in warning], facts["warnings"]
    assert [warning for warning in pending["warnings"] if "100×64 was rounded" in warning]


# On the embedded model


@pytest.fixture
async def agent(server: RealServer, tmp_path: Path) -> Any:
    """A client of a stdio server of its own, with a project to write into."""
    async with Client(server.stdio(KLEIN_WRITE_ROOTS=str(tmp_path), KLEIN_READ_ROOTS=str(tmp_path))) as client:
        yield client


def image(facts: dict[str, Any]) -> Rgb8:
    return pixels(Path(facts["path"]).read_bytes())


async def test_draft_becomes_final_by_its_own_recipe(agent: Client) -> None:
    drafts = await call(agent, "generate_image", prompt="a cat on a green background", count=2, seed=3)
    same = await call(agent, "generate_image", again="B")
    assert np.array_equal(image(same), image(drafts["images"][1]))
    result = await agent.call_tool(
        "generate_image", {"again": drafts["images"][1]["image"], "width": 512, "height": 512}
    )
    final = line(result)
    assert (final["size"], final["seed"]) == ([512, 512], "4")
    # It was generated smaller and enlarged: the preview shows what was generated, at a part of the price.
    assert preview(result).shape == (SIDE, SIDE, 3)
    seen = await agent.call_tool("view_image", {"image": final["image"]})
    assert preview(seen).shape == (SIDE, SIDE, 3)


async def test_edits_are_replayed_on_another_image(agent: Client) -> None:
    await call(agent, "generate_image", prompt="a cat on a white background", seed=5)
    prompts = ["make the background green", "add a small star in the top right corner"]
    edited = await call(agent, "edit_image", image="last", prompt=prompts, seed=5)
    dog = await call(agent, "generate_image", prompt="a dog on a pink background", seed=6)
    result = await agent.call_tool("edit_image", {"image": dog["image"], "again": edited["image"]})
    facts = line(result)
    assert kinds(result) == ["text", "image", "resource_link"]
    assert len(facts["steps"]) == 2
    history = (await call(agent, "list_images", image=facts["image"]))["history"]
    assert [step["prompt"] for step in history] == ["a dog on a pink background", *prompts]
    # The dog's background is the cat's now, star included.
    corner = image(facts)[:40, -40:].astype(int) - image(edited)[:40, -40:]
    assert np.abs(corner).mean() < 12, "observed 1.6"


async def test_saved_image_is_opened_by_its_relative_path_and_listed(agent: Client, tmp_path: Path) -> None:
    made = await call(agent, "generate_image", prompt="a dog on a blue background", seed=1)
    saved = await call(agent, "save_image", image="last", path="art/dog.png")
    edited = await call(agent, "edit_image", image="art/dog.png", prompt="make the background red", seed=1)
    history = (await call(agent, "list_images", image=edited["image"]))["history"]
    assert history[0]["image"] == made["image"]
    assert history[0]["saved"] == [saved["saved"]] == [str(tmp_path / "art" / "dog.png")]
    Path(saved["saved"]).unlink()
    assert "saved" not in (await call(agent, "list_images", image=edited["image"]))["history"][0]


async def test_drafts_that_are_all_alike_get_a_warning(agent: Client) -> None:
    drafts = await call(agent, "generate_image", prompt="a red apple on a white background", count=4, seed=1)
    assert "the drafts are alike: another seed changes little here; vary the words" in drafts["warnings"]


async def test_masks_are_no_parents(agent: Client, tmp_path: Path) -> None:
    mask = np.zeros((SIDE, SIDE, 3), np.uint8)
    mask[:, : SIDE // 2] = 255
    (tmp_path / "mask.png").write_bytes(file(mask))
    made = await call(agent, "generate_image", prompt="a dog on a blue background", seed=1)
    edited = await call(agent, "edit_image", image="last", prompt="make the background red", mask="mask.png", seed=1)
    seen = await call(agent, "view_image", image=edited["image"])
    assert seen["parents"] == [made["image"]]


def test_sizes_of_a_recipe_are_kept() -> None:
    assert isinstance(repeat(record(generate("a cat", seed=1))).size, Native)
