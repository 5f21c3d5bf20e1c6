"""A daemon that is up for weeks: detached jobs are finished, old ones leave memory and disk."""

import asyncio
import contextlib
import errno
import json
import os
import shutil
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from engine.contract import EngineFailed
from klein_mcp import atomic
from klein_mcp.images.library import Store
from klein_mcp.jobs import manager as managers
from klein_mcp.jobs.api import UnknownJob
from klein_mcp.jobs.events import Cancelled, Done, Failed, JobEvent
from klein_mcp.jobs.manager import JobManager
from klein_mcp.jobs.queue import Queue
from klein_mcp.jobs.request import generate
from tests.fakes import FakeExecutor, painted
from tests.waiting import until

pytestmark = pytest.mark.anyio


@pytest.fixture
async def manager(tmp_path: Path, painter: FakeExecutor) -> AsyncIterator[JobManager]:
    queue = Queue(lambda: painter, size=32, keep_alive=600)
    manager = JobManager(tmp_path / "jobs", tmp_path / "library", queue)
    yield manager
    painter.hurry()
    queue.close(10)
    await manager.aclose()


async def ending(manager: JobManager, job: str) -> JobEvent:
    with anyio.fail_after(120):
        return [event async for event in manager.events(job)][-1]


async def start(manager: JobManager) -> str:
    """A detached job."""
    job = await manager.submit(generate("a cat"), client="me")
    await manager.detach(job)
    return job


def files(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "jobs").iterdir()}


async def test_finished_job_is_forgotten_after_a_day(manager, tmp_path, monkeypatch):
    old = await start(manager)
    assert isinstance(await ending(manager, old), Done)
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + managers.REMEMBERED - 60)
    recent = await start(manager)
    assert (await manager.job(old)).state == "done"
    await ending(manager, recent)
    monkeypatch.setattr("time.time", lambda: now + managers.REMEMBERED + 60)
    third = await start(manager)
    with pytest.raises(UnknownJob):
        await manager.job(old)
    await ending(manager, recent)
    assert files(tmp_path) == {f"{recent}.json", f"{third}.json"}


async def test_running_job_is_never_forgotten(manager, painter, monkeypatch):
    painter.seconds_per_step = 30
    slow = await start(manager)
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + managers.REMEMBERED + 60)
    await start(manager)
    assert (await manager.job(slow)).state in ("queued", "painting")
    painter.hurry()
    await ending(manager, slow)
    await start(manager)
    assert (await manager.job(slow)).state == "done", "the day begins when it is done"


async def test_client_in_a_loop_fills_neither_memory_nor_disk(manager, tmp_path, monkeypatch):
    monkeypatch.setattr(managers, "MOST", 5)
    names = []
    for _ in range(20):
        names.append(await start(manager))
        await ending(manager, names[-1])
    assert len(files(tmp_path)) == len(await manager.list()) == 6
    for name in names[-6:]:
        await ending(manager, name)


async def test_next_daemon_forgets_too_and_deletes_what_a_crash_left(manager, tmp_path, monkeypatch):
    monkeypatch.setattr(managers, "MOST", 2)
    await ending(manager, await start(manager))
    folder = tmp_path / "jobs"
    (done,) = folder.glob("*.json")
    content = json.loads(done.read_text())
    done.unlink()
    for n in range(4):
        (folder / f"j{n}.json").write_text(json.dumps({**content, "changed": time.time() - n}))
    (folder / "jolder.json").write_text(json.dumps({**content, "changed": time.time() - managers.REMEMBERED - 60}))
    (folder / "jhalf.json.1234").write_text('{"request')
    (folder / "jforeign.json").write_text('{"changed": "yesterday"}')
    following = JobManager(folder, tmp_path / "library", manager._queue)
    following.resume()
    assert files(tmp_path) == {"j0.json", "j1.json", "jforeign.json"}
    assert isinstance(await ending(following, "j0"), Done)


async def test_job_that_cannot_be_written_is_not_detached(manager, painter, tmp_path, monkeypatch):
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    painter.seconds_per_step = 30
    job = await manager.submit(generate("a cat"), client="me")
    with monkeypatch.context() as disk:
        disk.setattr(os, "fdopen", lambda descriptor, *rest, **more: (os.close(descriptor), full()))
        with pytest.raises(EngineFailed, match="No space left"):
            await manager.detach(job)
    assert not (await manager.job(job)).detached
    assert files(tmp_path) == set(), "not half a file either"


async def test_job_that_cannot_be_counted_is_run_all_the_same(manager, painter, tmp_path, monkeypatch):
    """The disk is full when the next daemon starts."""
    painter.seconds_per_step = 30
    name = await start(manager)
    await manager.aclose()
    painter.hurry()
    queue = Queue(lambda: painter, size=32, keep_alive=600)
    following = JobManager(tmp_path / "jobs", tmp_path / "library", queue)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(atomic, "atomic_write", full)
    following.resume()
    assert isinstance(await ending(following, name), Done)
    queue.close(10)
    await following.aclose()


async def test_failed_job_keeps_its_error_across_a_restart(manager, painter, tmp_path):
    painter.error = EngineFailed("The device is gone.", hint="Plug it in.")
    name = await start(manager)
    await ending(manager, name)
    following = JobManager(tmp_path / "jobs", tmp_path / "library", manager._queue)
    following.resume()
    last = await ending(following, name)
    assert isinstance(last, Failed)
    assert (type(last.error), str(last.error)) == (EngineFailed, "The device is gone. Plug it in.")


async def test_job_that_nobody_listens_to_is_cancelled(manager, painter, monkeypatch):
    monkeypatch.setattr(managers, "LISTEN_WITHIN", 0.05)
    painter.seconds_per_step = 0.2
    job = await manager.submit(generate("a cat"), client="me")
    with anyio.fail_after(120):
        while (await manager.job(job)).state != "cancelled":
            await anyio.sleep(0.01)


@pytest.mark.parametrize("stopped", [False, True])
async def test_job_whose_last_image_is_being_saved_is_done(manager, painter, tmp_path, monkeypatch, stopped):
    """Whether it is cancelled meanwhile, or the daemon stops."""
    put, began, go_on = Store.put, threading.Event(), threading.Event()

    def slowly(*arguments: Any, **more: Any) -> Any:
        began.set()
        assert go_on.wait(60)
        return put(*arguments, **more)

    monkeypatch.setattr(Store, "put", slowly)
    name = await start(manager)
    await anyio.to_thread.run_sync(began.wait)
    stopping = asyncio.create_task(manager.aclose() if stopped else manager.cancel(name))
    await anyio.sleep(0.05)
    go_on.set()
    await stopping
    following = JobManager(tmp_path / "jobs", tmp_path / "library", manager._queue)
    if stopped:
        following.resume()
    assert isinstance(await ending(following if stopped else manager, name), Done)
    assert len(painter.jobs) == 1, "it is not made again"
    await following.aclose()


async def test_image_that_is_being_saved_outlives_the_next_ones_failure(manager, painter, tmp_path, monkeypatch):
    """And the daemon's end: it cancels the job once more, and closes the library."""
    put, began, go_on = Store.put, threading.Event(), threading.Event()

    def slowly(*arguments: Any, **more: Any) -> Any:
        began.set()
        assert go_on.wait(60)
        return put(*arguments, **more)

    def fails(job: Any) -> Any:
        if job.seed == 2:
            raise EngineFailed("The GPU is gone.")
        return painted(job)

    monkeypatch.setattr(Store, "put", slowly)
    painter.paint = fails
    await manager.submit(generate("a cat", count=2, seed=1), client="me")
    await anyio.to_thread.run_sync(began.wait)
    await until(lambda: manager._queue.status().failed)
    closing = asyncio.create_task(manager.aclose())
    await anyio.sleep(0.05)
    assert not closing.done()
    go_on.set()
    await closing
    with contextlib.closing(Store(tmp_path / "library")) as library:
        assert [record.recipe["seed"] for record in library.everything()] == ["1"]


async def test_job_that_is_cancelled_before_it_begins_is_over(manager):
    name = await manager.submit(generate("a cat"), client="me")
    await manager.cancel(name)
    assert isinstance(await ending(manager, name), Cancelled)


async def test_job_that_only_waited_is_not_blamed_for_crashes(manager, painter, tmp_path):
    painter.seconds_per_step = 30
    await manager.submit(generate("it crashes every daemon"), client="other")
    await until(lambda: painter.jobs)
    name, managers, folder = await start(manager), [], tmp_path / "jobs"
    for crash in range(3):
        folder = shutil.copytree(folder, tmp_path / f"jobs {crash}")
        managers.append(JobManager(folder, tmp_path / "library", manager._queue))
        waiting = manager._queue.status().waiting
        managers[-1].resume()
        await until(lambda waiting=waiting: manager._queue.status().waiting > waiting)
        assert (await managers[-1].job(name)).state == "queued"
    painter.hurry()
    assert isinstance(await ending(managers[-1], name), Done)
    for each in managers:
        await each.aclose()


def test_file_is_replaced_whole_or_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "file.json"
    atomic.atomic_write(path, "first")
    assert path.stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        atomic.atomic_write(path, "second")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]
