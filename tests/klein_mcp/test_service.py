"""From a call to a picture: sizes, progress, cancel, whose turn and whose `last` it is, jobs that are handed over."""

import time
from dataclasses import replace
from typing import Any

import anyio
import pytest
from mcp import Client

from engine.contract import Loading, Queued
from klein_mcp.jobs import progress as progress_module
from klein_mcp.jobs.service import Service
from tests.fakes import FakePainter
from tests.images import file, scene
from tests.tool_calls import call, complaint, line, refused

pytestmark = pytest.mark.anyio


async def test_a_size_off_the_grid_is_rounded_and_said(client: Client, painter: FakePainter):
    told = await call(client, "generate_image", prompt="x", width=250, height=200)
    assert (told["width"], told["height"]) == (256, 192)
    assert any("250×200 was rounded to 256×192" in warning for warning in told["warnings"])


async def test_a_shape_is_passed_on_and_a_size_overrules_it(client: Client, painter: FakePainter):
    await call(client, "generate_image", prompt="x", aspect_ratio="16:9")
    told = await call(client, "generate_image", prompt="x", aspect_ratio="16:9", width=64, height=64)
    assert [job.aspect for job in painter.jobs] == [(16, 9), None]
    assert any("aspect_ratio was ignored" in warning for warning in told["warnings"])


async def test_a_shape_that_the_model_misses_is_said_with_the_real_size(client: Client):
    told = await call(client, "generate_image", prompt="x", aspect_ratio="16:9", count=2)
    said = "the picture is 176×96, not quite 16:9: nano paints in steps of 16 pixels"
    assert [warning for warning in told["warnings"] if "16:9" in warning] == [said]
    told = await call(client, "generate_image", prompt="x", aspect_ratio="1:1")
    assert not any("1:1" in warning for warning in told["warnings"])


async def test_edit_keeps_the_size_of_its_input_when_none_is_given(client: Client, painter: FakePainter, tmp_path: Any):
    path = tmp_path / "odd.png"
    path.write_bytes(file(scene(199, 83)))
    told = await call(client, "edit_image", image=str(path), prompt="x")
    assert (told["width"], told["height"]) == (199, 83)
    assert painter.jobs[0].align


async def test_edit_takes_a_size_when_told(client: Client, painter: FakePainter):
    await call(client, "generate_image", prompt="x")
    told = await call(client, "edit_image", image="last", prompt="x", width=256, height=128)
    assert (told["width"], told["height"]) == (256, 128)
    assert not painter.jobs[1].align


async def test_a_picture_over_four_megapixels_is_worked_on_smaller_and_comes_back_whole(
    client: Client, painter: FakePainter, tmp_path: Any
):
    path = tmp_path / "large.png"
    path.write_bytes(file(scene(3000, 2001)))
    told = await call(client, "edit_image", image=str(path), prompt="x")
    height, width = painter.jobs[0].references[0].shape[:2]
    assert width * height <= 2048 * 2048
    assert width / height == pytest.approx(3000 / 2001, rel=0.01)
    assert (told["width"], told["height"]) == (3000, 2001)


async def test_compose_sends_every_reference_in_order(client: Client, painter: FakePainter):
    first = await call(client, "generate_image", prompt="one", width=64, height=64)
    second = await call(client, "generate_image", prompt="two", width=96, height=64)
    told = await call(client, "compose_references", images=[second["image"], "last~1"], prompt="image 1 on image 2")
    assert [reference.shape[1] for reference in painter.jobs[2].references] == [96, 64]
    assert told["parents"] == [second["image"], first["image"]]
    assert not any("the prompt names" in warning for warning in told["warnings"])


async def test_a_reference_that_is_named_and_was_not_given_is_said(client: Client):
    await call(client, "generate_image", prompt="one")
    told = await call(client, "compose_references", images=["last"], prompt="image 1 next to Image 2")
    assert "the prompt names image 2; 1 reference was given" in told["warnings"]


async def test_last_belongs_to_a_client(connect: Any):
    async with connect() as one, connect() as other:
        mine = await call(one, "generate_image", prompt="mine")
        await refused(other, "view_image", image="last")
        theirs = await call(other, "generate_image", prompt="theirs")
        assert (await call(one, "view_image", image="last"))["image"] == mine["image"]
        assert (await call(other, "view_image", image="last"))["image"] == theirs["image"]
        # A handle is anybody's.
        assert (await call(other, "view_image", image=mine["image"]))["image"] == mine["image"]


async def test_last_counts_back_and_a_result_names_what_it_was(client: Client):
    handles = [(await call(client, "generate_image", prompt=str(n)))["image"] for n in range(3)]
    told = await call(client, "edit_image", image="last~2", prompt="x")
    assert told["parents"] == [handles[0]]


async def test_each_door_takes_its_own_turn_in_the_queue(connect: Any, painter: FakePainter):
    async with connect() as one, connect() as other:
        for client in (one, one, other):
            await call(client, "generate_image", prompt="x")
    assert painter.clients[0] == painter.clients[1] != painter.clients[2]


@pytest.mark.parametrize("mode", ["legacy", "auto"])
async def test_progress_rises_with_every_step_and_names_it(connect: Any, painter: FakePainter, mode: str):
    painter.events_before = [Queued(2), Queued(1), Queued(0), Loading("nano", 0.5), Loading("nano", 0.5)]
    told: list[tuple[float, float, str]] = []

    async def hear(progress: float, total: float | None, message: str | None) -> None:
        told.append((progress, total or 0, message or ""))

    async with connect(mode=mode) as client:
        arguments = {"prompt": "x", "count": 2}
        await client.call_tool("generate_image", arguments, progress_callback=hear)
        await anyio.sleep(0.05)
    values = [done for done, _, _ in told]
    assert values == sorted(set(values))
    assert values[-1] <= told[-1][1] == 200
    words = " | ".join(message for _, _, message in told)
    for expected in ("2 ahead in the queue", "loading nano 50%", *(f"step {n} of 4" for n in (1, 2, 3, 4))):
        assert f"picture 1 of 2: {expected}" in words
        assert expected in words.split("picture 2 of 2", 1)[1]
    assert "picture 1 of 2: saving" in words
    assert words.endswith("picture 2 of 2: saving")


async def test_a_silent_engine_is_no_silent_call(client: Client, painter: FakePainter, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress_module, "HEARTBEAT", 0.05)
    painter.seconds_per_step = 0.15
    told: list[float] = []

    async def hear(progress: float, total: float | None, message: str | None) -> None:
        told.append(progress)

    await client.call_tool("generate_image", {"prompt": "x"}, progress_callback=hear)
    assert told == sorted(set(told))
    assert len(told) >= 9 + 6  # nine events, and at least six beats in 0.6 s


@pytest.mark.parametrize("asked", [{"prompt": "x"}, {"job": "j0"}], ids=["painting", "waiting"])
async def test_a_picture_that_takes_long_to_save_is_no_standstill(
    client: Client, service: Service, painter: FakePainter, monkeypatch: pytest.MonkeyPatch, asked: dict[str, str]
):
    """On a slow disk, or in the daemon that says no more than "saving"."""
    monkeypatch.setattr(progress_module, "HEARTBEAT", 0.05)
    put, told = service.store.put, []

    def slowly(*arguments: Any, **more: Any) -> Any:
        time.sleep(0.5)
        return put(*arguments, **more)

    async def saving(job: str) -> dict[str, Any]:
        await anyio.sleep(0.05)
        return {"state": "painting", "progress": 1.0, "message": "saving", "eta_s": 0.0}

    async def hear(progress: float, total: float | None, message: str | None) -> None:
        told.append((progress, total, message))

    monkeypatch.setattr(service.store, "put", slowly)
    painter.kept = saving  # type: ignore[method-assign] - a fake of a fake, for this test alone
    service.settings = replace(service.settings, wait_budget=0.5)
    await client.call_tool("wait_for_job" if "job" in asked else "generate_image", asked, progress_callback=hear)
    values = [progress for progress, _, message in told if message == "saving"]
    assert len(values) > 3
    assert values == sorted(set(values))
    assert values[-1] < 100


@pytest.mark.parametrize("mode", ["legacy", "auto"])
async def test_a_cancelled_call_hangs_up_on_the_engine(connect: Any, painter: FakePainter, mode: str):
    painter.seconds_per_step = 30
    async with connect(mode=mode) as client:
        with anyio.move_on_after(0.3):
            await client.call_tool("generate_image", {"prompt": "x"})
        with anyio.fail_after(2):
            while not painter.cancelled:
                await anyio.sleep(0.01)
        painter.seconds_per_step = 0
        await call(client, "generate_image", prompt="x")


async def test_two_calls_of_one_client_run_side_by_side(client: Client, painter: FakePainter):
    painter.seconds_per_step = 0.1
    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: call(client, "generate_image", prompt="slow"))
            await anyio.sleep(0.1)
            await call(client, "list_images")  # while the other one is being painted
            assert len(painter.jobs) == 1


async def test_a_call_that_outlasts_the_budget_returns_a_job_that_can_be_waited_for(
    client: Client, painter: FakePainter, service: Service
):
    service.settings = replace(service.settings, wait_budget=0.15)
    painter.seconds_per_step = 0.1
    promised = await call(client, "generate_image", prompt="slow", seed=5, width=100, height=64)
    assert (promised["job"], promised["state"], promised["progress"], promised["eta_s"]) == ("j0", "painting", 0.5, 3.0)
    assert any("rounded" in warning for warning in promised["warnings"])
    assert "wait_for_job" in promised["next"]
    waiting = await call(client, "wait_for_job", job="j0")
    assert (waiting["job"], waiting["state"]) == ("j0", "painting")
    painter.service = service
    done = await client.call_tool("wait_for_job", {"job": "j0"})
    assert line(done)["seed"] == "5"
    assert [block.type for block in done.content] == ["text", "image", "resource_link"]
    # It is this client's picture, as if it had waited.
    assert (await call(client, "view_image", image="last"))["image"] == line(done)["image"]


async def test_a_job_that_is_done_as_soon_as_it_is_handed_over_is_a_picture(
    client: Client, painter: FakePainter, service: Service
):
    service.settings = replace(service.settings, wait_budget=0.55)
    painter.seconds_per_step = 0.1
    painter.service = service
    told = await client.call_tool(
        "generate_image", {"prompt": "slow", "seed": 5, "count": 2, "width": 100, "height": 64}
    )
    assert len(painter.kept_orders) == 1, "it was handed over"
    assert [one["seed"] for one in line(told)["images"]] == ["5", "6"]
    assert "job" not in line(told)
    assert len([warning for warning in line(told)["warnings"] if "rounded" in warning]) == 1
    assert (await call(client, "view_image", image="last"))["image"] == line(told)["images"][-1]["image"]


@pytest.mark.parametrize(("seconds", "handed_over"), [(60.0, True), (1.0, False), (None, False)])
async def test_a_call_that_is_expected_to_outlast_the_budget_returns_a_job_at_once(
    client: Client, painter: FakePainter, seconds: float | None, handed_over: bool
):
    painter.events_before = [Queued(2, seconds)]
    with anyio.fail_after(10):  # the budget is 25 s
        facts = await call(client, "generate_image", prompt="behind others", seed=5)
    assert ("job" in facts) is handed_over


async def test_of_several_pictures_those_that_were_finished_in_time_are_kept(
    client: Client, painter: FakePainter, service: Service
):
    service.settings = replace(service.settings, wait_budget=0.55)
    painter.seconds_per_step = 0.1
    promised = await call(client, "generate_image", prompt="slow", seed=5, count=3)
    (order, _, made) = painter.kept_orders[promised["job"]]
    assert (order.seed, order.count, len(made["pictures"])) == (6, 2, 1)
    painter.service = service
    done = await call(client, "wait_for_job", job=promised["job"])
    assert [one["seed"] for one in done["images"]] == ["5", "6", "7"]


async def test_an_unknown_job_is_an_error_that_says_where_pictures_are(client: Client):
    assert "list_images" in await refused(client, "wait_for_job", job="j999")


async def test_a_job_that_failed_says_why(client: Client, painter: FakePainter):
    async def failed(job: str) -> dict[str, Any]:
        return {"state": "failed", "error": {"message": "The device is full.", "hint": "Ask for less."}}

    painter.kept = failed  # type: ignore[method-assign] - as above
    assert complaint(await client.call_tool("wait_for_job", {"job": "j0"})) == "The device is full. Ask for less."


def test_before_there_is_an_engine_nobody_is_told_that_auto_is_loading():
    """It is the engine that knows which model auto is."""
    assert progress_module.read(Loading("auto", 0.0))[1] == "starting the engine"
    assert progress_module.read(Loading("nano", 0.0))[1] == "loading nano 0%"
