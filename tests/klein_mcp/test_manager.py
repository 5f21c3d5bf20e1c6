"""What outlasts a call: the daemon paints it to its end and puts it into the library, whoever still waits."""

import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest

from engine.contract import EngineFailed, Job, Result
from klein_mcp.daemon import launch
from klein_mcp.daemon.client import DaemonBackend
from klein_mcp.errors import RequestError
from klein_mcp.jobs.backend import UnknownJob
from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.outcome import JobResult, PendingJob
from klein_mcp.jobs.request import ImageRequest
from klein_mcp.jobs.service import Service
from klein_mcp.settings import Settings
from tests.klein_mcp.fake_daemon import COMMAND
from tests.klein_mcp.test_daemon import daemons, gone

pytestmark = pytest.mark.anyio

ME = CallContext("me")


@pytest.fixture
async def home(tmp_path: Path) -> AsyncIterator[Path]:
    yield tmp_path
    async with DoorTo(tmp_path) as door:
        await door.backend.stop()  # type: ignore[attr-defined]
    await gone(tmp_path)


class DoorTo:
    """A Service and its connection to the daemon of `home`, as one door has them."""

    def __init__(self, home: Path, command: Sequence[str] = COMMAND) -> None:
        self.backend = DaemonBackend(Settings(home=home), command)
        self.service = Service(Settings(home=home), self.backend)

    async def __aenter__(self) -> Service:
        return self.service

    async def __aexit__(self, *error: object) -> None:
        self.service.close()
        await self.backend.aclose()


def order(prompt: str, **more: Any) -> ImageRequest:
    return ImageRequest("generate_image", prompt, **more)


async def hand_over(home: Path, what: ImageRequest, seconds: float = 0.5) -> PendingJob:
    """By a door that is gone afterwards. What is done within a second of handing over comes back as a picture."""
    async with DoorTo(home) as door:
        await door.paint(order("warm"), ME)
        outcome = await door.paint_within(seconds, what, ME)
    assert isinstance(outcome, PendingJob)
    return outcome


async def wait(door: Service, job: str) -> JobResult:
    outcome = await door.wait_within(20, job, ME)
    assert isinstance(outcome, JobResult)
    return outcome


async def test_a_call_that_outlasts_its_budget_returns_a_job_that_goes_on_without_its_door(home):
    started = time.monotonic()
    handed = await hand_over(home, order("pause=0.2 steps=10", seed=5))
    assert handed.job.startswith("j")
    assert handed.state in ("queued", "painting")
    assert 0 <= handed.progress < 1
    async with DoorTo(home) as later:
        outcome = await wait(later, handed.job)
        assert [made.painting.seed for made in outcome.made] == [5]
        assert later.store.path(outcome.made[0].record).exists()
        status = await later.backend.status()
    # The warm-up and this: the picture under the brush was taken over, not begun again.
    assert status["queue"]["done"] == 2
    assert time.monotonic() - started < 20


async def test_nobody_needs_to_wait_for_the_picture_to_be_in_the_library(home):
    await hand_over(home, order("pause=0.2 steps=12 unattended"))
    async with DoorTo(home) as later:
        with anyio.fail_after(20):
            while not (found := later.store.search("unattended", limit=5)[0]):
                await anyio.sleep(0.1)
        assert found[0].client == "me"
        assert later.store.latest("me", 0) == found[0]


async def test_pictures_painted_before_and_after_the_hand_over_come_together_in_their_order(home):
    handed = await hand_over(home, order("pause=0.2 steps=6", seed=7, count=3), seconds=1.8)
    async with DoorTo(home) as later:
        outcome = await wait(later, handed.job)
    assert [made.painting.seed for made in outcome.made] == [7, 8, 9]
    assert len({made.record.handle for made in outcome.made}) == 3


async def test_an_edit_that_was_handed_over_keeps_size_and_parent(home):
    async with DoorTo(home) as door:
        first = (await door.paint(order("a", width=128, height=96), ME)).made[0].record
        edit = ImageRequest("edit_image", "pause=0.2 steps=12", images=(first.handle,), keep_size=True)
        handed = await door.paint_within(0.4, edit, ME)
        assert isinstance(handed, PendingJob)
        made = (await wait(door, handed.job)).made[0]
    assert (made.record.width, made.record.height) == (128, 96)
    assert made.record.parents == (first.handle,)


async def test_a_daemon_that_is_killed_leaves_the_order_to_the_next(home):
    handed = await hand_over(home, order("pause=0.2 steps=10"))
    (pid,) = daemons(home)
    os.kill(pid, signal.SIGKILL)
    async with DoorTo(home) as later:
        assert len((await wait(later, handed.job)).made) == 1
    assert daemons(home) != [pid]


async def test_a_daemon_that_is_stopped_leaves_the_order_to_the_next(home):
    handed = await hand_over(home, order("pause=0.2 steps=10"))
    async with DoorTo(home) as later:
        await later.backend.stop()  # type: ignore[attr-defined]
        await gone(home)
        assert len((await wait(later, handed.job)).made) == 1


async def test_an_order_that_kills_every_daemon_fails_in_one_line_and_is_not_tried_for_ever(home):
    handed = await hand_over(home, order("pause=0.3 steps=10 crash=4"))
    async with DoorTo(home) as later:
        with pytest.raises(RequestError, match="crashed 2 times"):
            await wait(later, handed.job)
        assert isinstance([event async for event in later.backend.run(Job("next"), client="me")][-1], Result)


async def test_a_job_nobody_handed_over_is_unknown(home):
    async with DoorTo(home) as door:
        with pytest.raises(UnknownJob):
            await door.backend.kept("j../../etc/passwd")
        with pytest.raises(RequestError, match="There is no job"):
            await door.wait_within(1, "jnothing", ME)


async def test_a_hand_over_finds_a_place_in_a_full_queue(home, monkeypatch):
    monkeypatch.setenv("KLEIN_QUEUE_SIZE", "1")
    handed = await hand_over(home, order("pause=0.2 steps=6", seed=7, count=2), seconds=0.3)
    async with DoorTo(home) as later, DoorTo(home) as other, anyio.create_task_group() as tasks:
        tasks.start_soon(other.paint, order("pause=0.1 steps=5", count=2), CallContext("other"))
        assert len((await wait(later, handed.job)).made) == 2


async def test_calls_for_the_same_picture_that_are_handed_over_all_get_it(home):
    """A client that asks again because it lost patience: one of its jobs must not take the other's picture away."""
    same = order("pause=0.2 steps=12", seed=5)
    handed: list[PendingJob] = []
    async with DoorTo(home) as door:
        await door.paint(order("warm"), ME)

        async def ask() -> None:
            outcome = await door.paint_within(0.3, same, ME)
            assert isinstance(outcome, PendingJob)
            handed.append(outcome)

        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(ask)
        assert len({one.job for one in handed}) == 3
        for one in handed:
            assert len((await wait(door, one.job)).made) == 1


async def test_a_hang_up_leaves_the_same_picture_to_the_other_call_that_waits_for_it(home):
    same = order("pause=0.2 steps=12", seed=5)
    async with DoorTo(home) as door:
        await door.paint(order("warm"), ME)
        handed = await door.paint_within(0.3, same, ME)
        assert isinstance(handed, PendingJob)
        with anyio.move_on_after(0.5):
            await door.paint(same, ME)
        assert len((await wait(door, handed.job)).made) == 1


async def test_a_budget_that_is_spent_before_the_engine_is_up_is_a_job_as_soon_as_it_is(home):
    async with DoorTo(home) as door:
        handed = await door.paint_within(0.0, order("pause=0.2 steps=12"), ME)
        assert isinstance(handed, PendingJob)
        assert len((await wait(door, handed.job)).made) == 1


@pytest.mark.parametrize(
    ("does", "said"), [("time.sleep(0.3); sys.exit('No disk.')", "No disk"), ("time.sleep(60)", "did not answer")]
)
async def test_an_engine_that_cannot_start_is_said_though_the_budget_is_spent(home, monkeypatch, does, said):
    monkeypatch.setattr(launch, "START_TIMEOUT", 5.0)
    async with DoorTo(home, (sys.executable, "-c", f"import sys, time; {does}")) as door:
        with pytest.raises(EngineFailed, match=said), anyio.fail_after(20):
            await door.paint_within(0.0, order("a"), ME)
