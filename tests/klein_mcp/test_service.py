"""From a call to an image: sizes, progress, cancelling, whose turn and whose `last` it is, jobs that outlast a call."""

import threading
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import anyio
import pytest
from mcp import Client

from engine.contract import Aspect, Exact, Job, KeepSource, Loading, OutOfMemory, Queued
from klein_mcp.errors import RequestError
from klein_mcp.images.library import Store
from klein_mcp.jobs import events
from klein_mcp.jobs import progress as progress_module
from klein_mcp.jobs.events import Failed, Progressed, Starting, Submitted
from klein_mcp.jobs.manager import JobManager
from klein_mcp.jobs.record import JobRecord
from klein_mcp.jobs.service import Service
from klein_mcp.jobs.status import JobStatus
from tests.fakes import FakeExecutor
from tests.images import file, scene
from tests.tool_calls import call, complaint, line, refused
from tests.waiting import until

pytestmark = pytest.mark.anyio


def every(kind: type[RequestError]) -> list[type[RequestError]]:
    return [kind, *(found for child in kind.__subclasses__() for found in every(child))]


@pytest.mark.parametrize("kind", every(RequestError))
def test_error_of_the_daemon_keeps_its_kind(kind: type[RequestError]):
    error = kind("The reason.", hint="The way out.", action="list", shows="handles")
    failed = events.from_json(events.to_json(Failed(error)))
    assert isinstance(failed, Failed)
    assert type(failed.error) is kind
    assert vars(failed.error) == vars(error)


def test_error_without_an_action_is_read_by_an_older_build():
    error = RequestError("The reason.", hint="The way out.")
    written = events.error_to_json(error)
    assert written == {"kind": "RequestError", "message": "The reason.", "hint": "The way out."}
    assert vars(events.error_from_json(written)) == vars(error)


async def test_size_off_the_grid_is_rounded_with_a_warning(client: Client, painter: FakeExecutor):
    payload = await call(client, "generate_image", prompt="x", width=250, height=200)
    assert payload["size"] == [256, 192]
    assert any("250×200 was rounded to 256×192" in warning for warning in payload.get("warnings", []))


async def test_size_overrules_aspect_ratio(client: Client, painter: FakeExecutor):
    await call(client, "generate_image", prompt="x", aspect_ratio="16:9")
    payload = await call(client, "generate_image", prompt="x", aspect_ratio="16:9", width=64, height=64)
    assert [job.size for job in painter.jobs] == [Aspect(16, 9), Exact(64, 64)]
    assert any("aspect_ratio was ignored" in warning for warning in payload.get("warnings", []))


async def test_missed_aspect_ratio_is_a_warning_with_the_real_size(client: Client):
    payload = await call(client, "generate_image", prompt="x", aspect_ratio="3:2", count=2)
    expected = "the image is 160×112, not quite 3:2: nano paints in steps of 32 pixels"
    assert [warning for warning in payload.get("warnings", []) if "3:2" in warning] == [expected]
    payload = await call(client, "generate_image", prompt="x", aspect_ratio="1:1")
    assert not any("1:1" in warning for warning in payload.get("warnings", []))


async def test_missed_aspect_ratio_of_a_model_without_a_row(client: Client, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("klein_mcp.jobs.execute.VARIANTS", {})
    payload = await call(client, "generate_image", prompt="x", aspect_ratio="3:2")
    assert any(warning.endswith("nano paints in coarser steps") for warning in payload.get("warnings", []))


async def test_edit_keeps_the_size_of_its_input_when_none_is_given(
    client: Client, painter: FakeExecutor, tmp_path: Any
):
    path = tmp_path / "odd.png"
    path.write_bytes(file(scene(199, 83)))
    payload = await call(client, "edit_image", image=str(path), prompt="x")
    assert payload["size"] == [199, 83]
    assert painter.jobs[0].size == KeepSource()


async def test_edit_takes_a_size_when_given(client: Client, painter: FakeExecutor):
    await call(client, "generate_image", prompt="x")
    payload = await call(client, "edit_image", image="last", prompt="x", width=256, height=128)
    assert payload["size"] == [256, 128]
    assert painter.jobs[1].size != KeepSource()


async def test_image_over_four_megapixels_is_edited_smaller_and_returned_whole(
    client: Client, painter: FakeExecutor, tmp_path: Any
):
    path = tmp_path / "large.png"
    path.write_bytes(file(scene(3000, 2001)))
    payload = await call(client, "edit_image", image=str(path), prompt="x")
    height, width = painter.jobs[0].references[0].shape[:2]
    assert width * height <= 2048 * 2048
    assert width / height == pytest.approx(3000 / 2001, rel=0.01)
    assert payload["size"] == [3000, 2001]


async def test_compose_sends_every_reference_in_order(client: Client, painter: FakeExecutor):
    first = await call(client, "generate_image", prompt="one", width=64, height=64)
    second = await call(client, "generate_image", prompt="two", width=96, height=64)
    payload = await call(client, "compose_references", images=[second["image"], "last~1"], prompt="image 1 on image 2")
    assert [reference.shape[1] for reference in painter.jobs[2].references] == [96, 64]
    assert (await call(client, "view_image", image=payload["image"]))["parents"] == [second["image"], first["image"]]
    assert not any("the prompt names" in warning for warning in payload.get("warnings", []))
    edited = (await call(client, "edit_image", image=first["image"], prompt="three"))["image"]
    await call(client, "compose_references", images=[first["image"], edited], prompt="image 1 on image 2")
    history = (await call(client, "list_images", image="last"))["history"]
    assert history[-1]["parents"] == [first["image"], edited]
    assert history[0]["branches"] == [payload["image"]]  # an ancestor is none


async def test_prompt_that_names_a_missing_reference_is_a_warning(client: Client):
    await call(client, "generate_image", prompt="one")
    payload = await call(client, "compose_references", images=["last"], prompt="image 1 next to Image 2")
    assert "the prompt names image 2; 1 reference was given" in payload.get("warnings", [])


async def test_last_belongs_to_a_client(connect: Any):
    async with connect() as one, connect() as other:
        mine = await call(one, "generate_image", prompt="mine")
        await refused(other, "view_image", image="last")
        theirs = await call(other, "generate_image", prompt="theirs")
        assert (await call(one, "view_image", image="last"))["image"] == mine["image"]
        assert (await call(other, "view_image", image="last"))["image"] == theirs["image"]
        # A handle is anybody's.
        assert (await call(other, "view_image", image=mine["image"]))["image"] == mine["image"]


async def test_last_counts_back_and_parents_name_its_handle(client: Client):
    handles = [(await call(client, "generate_image", prompt=str(n)))["image"] for n in range(3)]
    payload = await call(client, "edit_image", image="last~2", prompt="x")
    assert (await call(client, "view_image", image=payload["image"]))["parents"] == [handles[0]]


async def test_each_front_end_takes_its_own_turn_in_the_queue(connect: Any, jobs: JobManager):
    async with connect() as one, connect() as other:
        for client in (one, one, other):
            await call(client, "generate_image", prompt="x")
    third, second, first = [job.client for job in await jobs.list()]
    assert first == second != third


@pytest.mark.parametrize("mode", ["legacy", "auto"])
async def test_progress_rises_with_every_step_and_names_it(connect: Any, painter: FakeExecutor, mode: str):
    painter.events_before = [Queued(2), Queued(1), Queued(0), Loading("nano", 0.5), Loading("nano", 0.5)]
    payload: list[tuple[float, float, str]] = []

    async def hear(progress: float, total: float | None, message: str | None) -> None:
        payload.append((progress, total or 0, message or ""))

    async with connect(mode=mode) as client:
        arguments = {"prompt": "x", "count": 2}
        await client.call_tool("generate_image", arguments, progress_callback=hear)
        await until(lambda: payload and payload[-1][2] == "image 2 of 2: saving")
    values = [done for done, _, _ in payload]
    assert values == sorted(set(values))
    assert values[-1] <= payload[-1][1] == 200
    words = " | ".join(message for _, _, message in payload)
    for expected in ("2 ahead in the queue", "loading nano 50%", *(f"step {n} of 4" for n in (1, 2, 3, 4))):
        assert f"image 1 of 2: {expected}" in words
        assert expected in words.split("image 2 of 2", 1)[1]
    assert "image 1 of 2: saving" in words


async def test_progress_goes_on_while_the_engine_is_silent(
    client: Client, painter: FakeExecutor, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(progress_module, "HEARTBEAT", 0.05)
    painter.seconds_per_step = 60.0
    payload: list[float] = []
    words: list[str | None] = []

    async def hear(progress: float, total: float | None, message: str | None) -> None:
        payload.append(progress)
        words.append(message)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: client.call_tool("generate_image", {"prompt": "x"}, progress_callback=hear))
        await until(lambda: words.count("painting") > 6)  # one event, then beats until the first step
        painter.hurry()
    assert payload == sorted(set(payload))


async def test_progress_goes_on_while_an_image_is_saved(
    client: Client, painter: FakeExecutor, monkeypatch: pytest.MonkeyPatch
):
    """On a slow disk."""
    monkeypatch.setattr(progress_module, "HEARTBEAT", 0.05)
    put, go_on = Store.put, threading.Event()
    values: list[float] = []

    def slowly(*arguments: Any, **more: Any) -> Any:
        go_on.wait(60)
        return put(*arguments, **more)

    async def hear(progress: float, total: float | None, message: str | None) -> None:
        if message == "saving":
            values.append(progress)
        if len(values) > 3:
            go_on.set()

    monkeypatch.setattr(Store, "put", slowly)
    await client.call_tool("generate_image", {"prompt": "x"}, progress_callback=hear)
    assert len(values) > 3
    assert values == sorted(set(values))
    assert values[-1] < 100


@pytest.mark.parametrize("mode", ["legacy", "auto"])
async def test_cancelled_call_cancels_its_job(connect: Any, jobs: JobManager, painter: FakeExecutor, mode: str):
    painter.seconds_per_step = 0.2
    async with connect(mode=mode) as client:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: client.call_tool("generate_image", {"prompt": "x"}))
            await until(lambda: painter.jobs)
            tasks.cancel_scope.cancel()
        with anyio.fail_after(120):
            while (await jobs.list())[0].state != "cancelled" or not painter.cancelled:
                await anyio.sleep(0.01)
        painter.seconds_per_step = 0
        await call(client, "generate_image", prompt="x")


async def test_two_calls_of_one_client_run_side_by_side(client: Client, painter: FakeExecutor):
    painter.seconds_per_step = 60.0
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: call(client, "generate_image", prompt="slow"))
        await until(lambda: painter.jobs)
        await call(client, "list_images")  # while the other one is being generated
        painter.hurry()


async def test_call_that_outlasts_its_budget_returns_a_job(client: Client, painter: FakeExecutor, service: Service):
    service.settings = replace(service.settings, wait_budget=0.15)
    painter.seconds_per_step = 1.0
    pending = await call(client, "generate_image", prompt="slow", seed=5, width=100, height=64)
    assert pending["state"] == "painting"
    assert 0 <= pending["progress"] < 1
    assert any("rounded" in warning for warning in pending["warnings"])
    assert "wait_for_job" in pending["next"]
    waiting = await call(client, "wait_for_job", job=pending["job"])
    assert (waiting["job"], waiting["state"]) == (pending["job"], "painting")
    painter.hurry()
    service.settings = replace(service.settings, wait_budget=20)
    done = await client.call_tool("wait_for_job", {"job": pending["job"]})
    assert line(done)["seed"] == "5"
    assert any("rounded" in warning for warning in line(done)["warnings"])
    assert [block.type for block in done.content] == ["text", "image", "resource_link"]
    # It is this client's image, as if it had waited.
    assert (await call(client, "view_image", image="last"))["image"] == line(done)["image"]


async def test_job_that_ends_while_it_is_detached_is_a_result(
    client: Client, jobs: JobManager, painter: FakeExecutor, service: Service, monkeypatch: pytest.MonkeyPatch
):
    detach = jobs.detach

    async def late(job: str) -> JobStatus:
        painter.hurry()
        while (await jobs.job(job)).state != "done":
            await anyio.sleep(0.01)
        return await detach(job)

    monkeypatch.setattr(jobs, "detach", late)
    service.settings = replace(service.settings, wait_budget=0.15)
    painter.seconds_per_step = 1.0
    payload = await call(client, "generate_image", prompt="slow", seed=5, count=2)
    assert [image["seed"] for image in payload["images"]] == ["5", "6"]


@pytest.mark.parametrize("noticed", [False, True])
async def test_engine_that_crashes_around_the_budget_gives_the_new_job(
    client: Client, jobs: JobManager, painter: FakeExecutor, service: Service, monkeypatch: pytest.MonkeyPatch, noticed
):
    """Whether the front end has noticed the crash when the budget is spent."""
    run, detached = jobs.run, list[str]()

    async def crash(*arguments: Any, **more: Any) -> Any:
        yield Submitted("j000000000000")
        await anyio.sleep(0.2)
        yield (Starting if noticed else Progressed)(0, Loading("auto", 0.0))
        async with aclosing(run(*arguments, **more)) as events:
            async for event in events:
                yield event

    async def detach(job: str) -> JobStatus:
        detached.append(job)
        return await JobManager.detach(jobs, job)

    monkeypatch.setattr(jobs, "run", crash)
    monkeypatch.setattr(jobs, "detach", detach)
    service.settings = replace(service.settings, wait_budget=0.1)
    painter.seconds_per_step = 60.0
    pending = await call(client, "generate_image", prompt="slow")
    assert (await jobs.job(pending["job"])).detached
    assert detached == [*([] if noticed else ["j000000000000"]), pending["job"]]


async def test_estimate_shortens_no_wait(
    client: Client, painter: FakeExecutor, service: Service, monkeypatch: pytest.MonkeyPatch
):
    """A wrong guess once cut small budgets to nothing: each wait returned at once, and its caller ran in circles."""
    monkeypatch.setattr(JobRecord, "_eta", lambda *_: 600.0)
    painter.events_before = [Queued(2, 600.0)]
    assert "image" in await call(client, "generate_image", prompt="behind others", seed=5)
    budget = service.settings.wait_budget
    service.settings = replace(service.settings, wait_budget=0)
    painter.seconds_per_step = 600.0
    pending = await call(client, "generate_image", prompt="slow", seed=5)
    assert pending["eta_s"] > budget
    service.settings = replace(service.settings, wait_budget=budget)
    words: list[str | None] = []

    async def hear(progress: float, total: float | None, message: str | None) -> None:
        words.append(message)
        if message == "painting":
            painter.hurry()

    waited = await client.call_tool("wait_for_job", {"job": pending["job"]}, progress_callback=hear)
    assert "image" in line(waited)


async def test_images_before_and_after_detaching_come_together_in_order(
    client: Client, painter: FakeExecutor, service: Service
):
    service.settings = replace(service.settings, wait_budget=0.55)
    painter.seconds_per_step = 0.1
    pending = await call(client, "generate_image", prompt="slow", seed=5, count=3)
    service.settings = replace(service.settings, wait_budget=20)
    done = await call(client, "wait_for_job", job=pending["job"])
    assert [image["seed"] for image in done["images"]] == ["5", "6", "7"]
    assert [job.seed for job in painter.jobs] == [5, 6, 7]


async def test_unknown_job_is_an_error_that_says_where_images_are(client: Client):
    assert "list_images" in await refused(client, "wait_for_job", job="j999")
    made = await call(client, "generate_image", prompt="a cat")
    assert "It is an image: view_image shows it." in await refused(client, "wait_for_job", job=made["image"])


async def test_detached_job_that_failed_says_why(client: Client, painter: FakeExecutor, service: Service):
    service.settings = replace(service.settings, wait_budget=0)
    painter.seconds_per_step = 0.2

    def fail(job: Job) -> Any:
        raise OutOfMemory("The device is full.", hint="Ask for less.")

    painter.paint = fail
    pending = await call(client, "generate_image", prompt="slow")
    service.settings = replace(service.settings, wait_budget=20)
    assert complaint(await client.call_tool("wait_for_job", {"job": pending["job"]})) == (
        "The device is full. Ask for less."
    )


def test_before_there_is_an_engine_auto_is_not_a_model():
    """It is the engine that knows which model auto is."""
    assert progress_module.describe(Loading("auto", 0.0))[1] == "starting the engine"
    assert progress_module.describe(Loading("nano", 0.0))[1] == "loading nano 0%"
