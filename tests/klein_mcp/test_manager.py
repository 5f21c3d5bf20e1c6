"""Jobs that outlast a call: the daemon finishes them and saves their images, whoever still waits."""

import json
import math
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from filelock import FileLock

from engine.contract import EngineError, EngineFailed
from klein_mcp.daemon import launch
from klein_mcp.daemon.client import DaemonClient
from klein_mcp.daemon.endpoint import ENGINE_LOCK, BuildInfo
from klein_mcp.errors import RequestError
from klein_mcp.jobs import service as service_module
from klein_mcp.jobs.api import UnknownJob
from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.request import edit, generate
from klein_mcp.jobs.results import JobResult, PendingJob
from klein_mcp.jobs.service import Service
from klein_mcp.jobs.status import OVER
from klein_mcp.settings import Settings
from tests.klein_mcp.daemons import daemons, gone
from tests.klein_mcp.fake_daemon import COMMAND, LOST

pytestmark = pytest.mark.anyio

ME = CallContext("me")


@pytest.fixture
async def home(tmp_path: Path) -> AsyncIterator[Path]:
    yield tmp_path
    async with front_end(tmp_path) as service:
        await service.jobs.stop()  # type: ignore[attr-defined]
    await gone(tmp_path)


@asynccontextmanager
async def front_end(home: Path, command: Sequence[str] = COMMAND) -> AsyncIterator[Service]:
    """A Service and its connection to the daemon of `home`."""
    jobs = DaemonClient(Settings(home=home), command)
    service = Service(Settings(home=home), jobs)
    try:
        yield service
    finally:
        service.close()
        await jobs.aclose()


async def detached(home: Path, prompt: str, seconds: float = 0.5, **more: Any) -> PendingJob:
    """Start a job by a front end that is gone afterwards."""
    async with front_end(home) as service:
        await service.run(generate("warm"), ME)
        result = await service.run_within(seconds, generate(prompt, **more), ME)
    assert isinstance(result, PendingJob)
    return result


async def wait(service: Service, job: str) -> JobResult:
    result = await service.wait_within(60, job, ME)
    assert isinstance(result, JobResult)
    return result


async def test_call_that_outlasts_its_budget_is_a_job_that_goes_on(home):
    pending = await detached(home, "pause=0.2 steps=10", seed=5)
    assert pending.job.startswith("j")
    assert pending.state in ("queued", "painting")
    assert 0 <= pending.progress < 1
    async with front_end(home) as later:
        result = await wait(later, pending.job)
        assert [image.seed for image in result.images] == [5]
        assert later.store.path(later.store.get(result.images[0].handle)).exists()
        status = await later.jobs.status()
    assert status.queue
    assert status.queue.done == 2, "the warm-up and this: it was not begun again"


async def test_detached_image_is_in_the_library_though_nobody_waits(home):
    await detached(home, "pause=0.2 steps=12 unattended")
    async with front_end(home) as later:
        with anyio.fail_after(120):
            while not (found := later.store.search("unattended", limit=5)[0]):
                await anyio.sleep(0.1)
        assert found[0].client == "me"
        assert later.store.latest("me", 0) == found[0]


async def test_images_before_and_after_detaching_come_together(home):
    pending = await detached(home, "pause=0.2 steps=6", seed=7, count=3, seconds=1.8)
    async with front_end(home) as later:
        result = await wait(later, pending.job)
    assert [image.seed for image in result.images] == [7, 8, 9]
    assert len({image.handle for image in result.images}) == 3


async def test_detached_edit_keeps_size_and_parent(home):
    async with front_end(home) as service:
        first = (await service.run(generate("a", width=128, height=96), ME)).images[0]
        pending = await service.run_within(0.4, edit(first.handle, "pause=0.2 steps=12"), ME)
        assert isinstance(pending, PendingJob)
        image = (await wait(service, pending.job)).images[0]
        assert (image.width, image.height) == (128, 96)
        assert service.store.get(image.handle).parents == (first.handle,)


@pytest.mark.parametrize("count", [1, 2])
async def test_killed_daemon_leaves_detached_jobs_to_the_next(home, count):
    pending = await detached(home, "pause=0.2 steps=10", count=count)
    (pid,) = daemons(home)
    if count == 2:
        await noted(home, pending.job, 1)
    os.kill(pid, signal.SIGKILL)
    async with front_end(home) as later:
        result = await wait(later, pending.job)
        assert len(result.images) == count
        assert len(later.store.everything()) == 1 + count, "what was saved before is not made again"
    assert daemons(home) != [pid]


async def test_daemon_that_lost_its_device_leaves_detached_jobs_to_the_next(home):
    pending = await detached(home, "pause=0.2 steps=15")
    (pid,) = daemons(home)
    (home / LOST).touch()
    async with front_end(home) as later:
        assert len((await wait(later, pending.job)).images) == 1
    assert daemons(home) != [pid]


async def noted(home: Path, job: str, images: int) -> None:
    """Wait until the file of a detached job holds so many images."""
    (file,) = home.rglob(f"{job}.json")
    with anyio.fail_after(120):
        while len(json.loads(file.read_text())["saved"]) < images:
            await anyio.sleep(0.05)


async def test_stopped_daemon_leaves_detached_jobs_to_the_next(home):
    pending = await detached(home, "pause=0.2 steps=10")
    async with front_end(home) as later:
        await later.jobs.stop()  # type: ignore[attr-defined]
        await gone(home)
        assert len((await wait(later, pending.job)).images) == 1


async def test_job_that_crashes_every_daemon_fails_in_one_line(home):
    pending = await detached(home, "pause=0.3 steps=10 crash=4")
    async with front_end(home) as later:
        with pytest.raises(EngineError, match="crashed 2 times"):
            await later.wait_within(600, pending.job, ME)
        assert (await later.run(generate("next"), ME)).images


async def test_unknown_job_is_an_error(home):
    async with front_end(home) as service:
        with pytest.raises(UnknownJob):
            await service.jobs.job("j../../etc/passwd")
        for name in ("jnothing", "watch", "."):
            with pytest.raises(RequestError, match="There is no job"), anyio.fail_after(30):
                await service.wait_within(1, name, ME)


async def test_detached_request_finds_a_place_in_a_full_queue(home, monkeypatch):
    monkeypatch.setenv("KLEIN_QUEUE_SIZE", "1")
    pending = await detached(home, "pause=0.2 steps=6", seed=7, count=2, seconds=0.3)
    async with front_end(home) as later, front_end(home) as other, anyio.create_task_group() as tasks:
        tasks.start_soon(other.run, generate("pause=0.1 steps=5", count=2), CallContext("other"))
        assert len((await wait(later, pending.job)).images) == 2


async def test_equal_calls_are_jobs_of_their_own(home):
    """A client that loses patience asks again: one job must not take the other's image away."""
    same = generate("pause=0.2 steps=6", seed=5)
    async with front_end(home) as service:
        await service.run(generate("warm"), ME)
        pending: list[PendingJob] = []

        async def ask() -> None:
            result = await service.run_within(0.3, same, ME)
            assert isinstance(result, PendingJob)
            pending.append(result)

        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(ask)
        with anyio.move_on_after(0.5):
            await service.run(same, ME)  # and one that is cancelled
        assert len({each.job for each in pending}) == 3
        for each in pending:
            assert len((await wait(service, each.job)).images) == 1


async def test_budget_spent_before_the_daemon_is_up_gives_a_job(home):
    async with front_end(home) as service:
        pending = await service.run_within(0.0, generate("pause=0.2 steps=12"), ME)
        assert isinstance(pending, PendingJob)
        assert len((await wait(service, pending.job)).images) == 1


@pytest.mark.parametrize(
    ("does", "message"), [("time.sleep(0.3); sys.exit('No disk.')", "No disk"), ("time.sleep(60)", "did not answer")]
)
async def test_daemon_that_cannot_start_is_an_error_though_the_budget_is_spent(home, monkeypatch, does, message):
    monkeypatch.setattr(launch, "START_TIMEOUT", 5.0)
    async with front_end(home, (sys.executable, "-c", f"import sys, time; {does}")) as service:
        with pytest.raises(EngineFailed, match=message), anyio.fail_after(120):
            await service.run_within(0.0, generate("a"), ME)


async def test_budget_bounds_the_wait_for_a_daemon_that_hangs(home, monkeypatch):
    monkeypatch.setattr(service_module, "SILENT", 1.0)
    monkeypatch.setattr(service_module, "START_PATIENCE", 1.0)
    monkeypatch.setattr(launch, "GREETING", 0.5)
    async with front_end(home) as service:
        await service.run(generate("warm"), ME)
        (pid,) = daemons(home)
        os.kill(pid, signal.SIGSTOP)
        try:
            with anyio.fail_after(30), pytest.raises(EngineFailed, match="has not answered"):
                await service.run_within(0.5, generate("x"), ME)
            with anyio.fail_after(30), pytest.raises(EngineFailed, match="has not answered"):
                await service.wait_within(0.5, "j0123456789ab", ME)
        finally:
            os.kill(pid, signal.SIGCONT)
        assert isinstance(await service.run(generate("after"), ME), JobResult)


async def test_daemon_that_stops_in_the_middle_of_a_job_is_an_error(home, monkeypatch):
    monkeypatch.setattr(service_module, "SILENT", 1.0)
    async with front_end(home) as service:
        await service.run(generate("warm"), ME)
        (pid,) = daemons(home)
        async with anyio.create_task_group() as tasks:

            async def stop_it() -> None:
                await anyio.sleep(0.5)
                os.kill(pid, signal.SIGSTOP)

            tasks.start_soon(stop_it)
            try:
                with anyio.fail_after(30), pytest.raises(EngineFailed, match="has not answered"):
                    await service.run_within(1.0, generate("pause=0.1 steps=100"), ME)
            finally:
                os.kill(pid, signal.SIGCONT)


async def test_budget_bounds_the_wait_for_a_lock_of_another_user(tmp_path, monkeypatch):
    monkeypatch.setattr(service_module, "SILENT", 0.5)
    monkeypatch.setattr(service_module, "START_PATIENCE", 1.0)
    with FileLock(tmp_path / ENGINE_LOCK):
        async with front_end(tmp_path) as service:
            with anyio.fail_after(20), pytest.raises(EngineFailed, match="has not answered"):
                await service.run_within(0.5, generate("x"), ME)


JOB = {
    "request": {"tool": "generate_image", "prompt": "x", "seed": "1"},
    "client": "me",
    "created": 1.0,
    "changed": 1.0,
    "attempts": 0,
    "saved": [],
    "warnings": [],
    "ms": {},
    "ending": None,
}


def job_file(field: str = "", value: Any = None, **request: Any) -> bytes:
    """A file of a detached job with something odd in it."""
    return json.dumps({**JOB, "request": {**JOB["request"], **request}, **({field: value} if field else {})}).encode()


ODD_JOBS = [
    b"", b"[]", b"\xff", b"[" * 100_000, b'{"request": {}}',
    job_file(prompt=7), job_file(count=0), job_file(count="x"), job_file(count=10**9), job_file(seed=math.inf),
    job_file(size={"exact": ["a", 2]}), job_file(size={"exact": [10**400, 2]}), job_file(model=[]),
    job_file("created", math.nan), job_file("changed", "yesterday"), job_file("attempts", math.inf),
    job_file("ms", {"denoise": math.nan}), job_file("saved", [{}]), job_file("ending", {"error": {"kind": "x"}}),
]  # fmt: skip


async def test_odd_job_files_and_history_stop_nothing(home):
    """A damaged file of the data folder costs itself: the daemon starts, lists its jobs and makes images."""
    (home / "jobs").mkdir()
    for number, content in enumerate(ODD_JOBS):
        (home / "jobs" / f"j{number:012}.json").write_bytes(content)
        (home / "jobs" / f"j{number:012}.json").chmod(0o600)
    (home / "history.json").write_bytes(b'{"seconds": {"auto": [[0, 1]], "fake": [[0, 0]]}, "native": {"auto": 0}}')
    (home / "history.json").chmod(0o600)
    async with front_end(home) as service:
        result = await service.run(generate("after"), ME)
        assert isinstance(result, JobResult)
        jobs = await service.jobs.list()
        assert all(job.state in OVER for job in jobs)
        assert (await service.jobs.status()).queue is not None


async def test_of_two_builds_with_the_same_times_one_is_newer():
    one, two = BuildInfo("1.0", "aaaa", 5), BuildInfo("1.0", "bbbb", 5)
    assert two.newer_than(one)
    assert not one.newer_than(two)


async def test_status_of_a_daemon_with_an_odd_answer_says_that_it_runs(home, monkeypatch):
    async with front_end(home) as service:
        await service.run(generate("warm"), ME)
        monkeypatch.setattr("klein_mcp.jobs.status.daemon_from_json", lambda data: data["of another version"])
        status = await service.jobs.status()
        assert status.silent
