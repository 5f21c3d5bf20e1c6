"""A daemon that is up for weeks: what it promised is kept, what is long finished leaves memory and disk."""

import errno
import json
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from klein_mcp import atomic
from klein_mcp.jobs import manager as kept_module
from klein_mcp.jobs.backend import UnknownJob
from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.manager import JobManager
from klein_mcp.jobs.outcome import JobResult
from klein_mcp.jobs.request import ImageRequest

pytestmark = pytest.mark.anyio

ORDER = ImageRequest("generate_image", "a cat").to_json()


class Service:
    """Finishes each order when `go` is set."""

    def __init__(self) -> None:
        self.go = anyio.Event()
        self.painted: list[str] = []

    async def paint(self, order: ImageRequest, call: CallContext) -> JobResult:
        assert call.tell
        await call.tell(10, 100, "step 1 of 4")
        await self.go.wait()
        self.painted.append(order.prompt)
        return JobResult((), (), {"total": 1.0})

    def close(self) -> None:
        """Nothing is open."""


@pytest.fixture
async def service() -> Service:
    return Service()


@pytest.fixture
async def kept(tmp_path: Path, service: Service) -> AsyncIterator[JobManager]:
    kept = JobManager(tmp_path / "jobs", lambda: service)  # type: ignore[arg-type, return-value]
    yield kept
    await kept.aclose()


async def finished(kept: JobManager, name: str) -> dict[str, Any]:
    with anyio.fail_after(10):
        while (state := await kept.state(name))["state"] != "done":
            pass
    return state


async def take(kept: JobManager) -> str:
    return await kept.take(ORDER, client="me", made=None)


def files(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "jobs").iterdir()}


async def test_a_finished_job_is_forgotten_after_a_day_though_the_daemon_lives(
    kept: JobManager, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    service.go.set()
    old = await take(kept)
    await finished(kept, old)
    now = time.time()
    monkeypatch.setattr(kept_module.time, "time", lambda: now + kept_module.REMEMBERED - 60)
    recent = await take(kept)
    assert (await kept.state(old))["state"] == "done"
    await finished(kept, recent)
    monkeypatch.setattr(kept_module.time, "time", lambda: now + kept_module.REMEMBERED + 60)
    third = await take(kept)
    with pytest.raises(UnknownJob):
        await kept.state(old)
    await finished(kept, recent)
    assert files(tmp_path) == {f"{recent}.json", f"{third}.json"}


async def test_a_day_begins_when_the_job_is_done(kept: JobManager, service: Service, monkeypatch: pytest.MonkeyPatch):
    slow = await take(kept)
    now = time.time()
    monkeypatch.setattr(kept_module.time, "time", lambda: now + kept_module.REMEMBERED + 60)
    other = await take(kept)
    assert (await kept.state(slow))["state"] == "painting", "what is promised is never forgotten"
    service.go.set()
    await finished(kept, slow)
    await finished(kept, other)
    await take(kept)
    assert (await kept.state(slow))["state"] == "done"


async def test_a_client_that_loops_fills_neither_memory_nor_disk(
    kept: JobManager, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kept_module, "MOST", 5)
    service.go.set()
    names = []
    for _ in range(20):
        names.append(await take(kept))
        await finished(kept, names[-1])
    assert len(files(tmp_path)) == len(kept._jobs) == 6
    for name in names[-6:]:
        await finished(kept, name)


async def test_the_next_daemon_forgets_too_and_sweeps_what_a_crash_left(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kept_module, "MOST", 2)
    folder = tmp_path / "jobs"
    folder.mkdir()
    done = {"order": ORDER, "client": "me", "made": None, "attempts": 1, "state": "done"}
    for n in range(4):
        (folder / f"j{n}.json").write_text(json.dumps({**done, "since": time.time() - n}))
    (folder / "jolder.json").write_text(json.dumps({**done, "since": time.time() - kept_module.REMEMBERED - 60}))
    (folder / "jhalf.json.1234").write_text('{"order')
    (folder / "jstrange.json").write_text('{"state": "done", "since": "yesterday"}')
    kept = JobManager(folder, lambda: service)  # type: ignore[arg-type, return-value]
    kept.resume()
    assert files(tmp_path) == {"j0.json", "j1.json", "jstrange.json"}
    assert (await kept.state("j0"))["state"] == "done"


async def test_what_cannot_be_written_down_is_not_promised(
    kept: JobManager, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fdopen", lambda descriptor, *rest, **more: (os.close(descriptor), full()))
    with pytest.raises(OSError, match="No space left"):
        await take(kept)
    assert not kept.busy
    assert not service.painted
    assert files(tmp_path) == set(), "not half a file either"


async def test_an_order_that_cannot_be_counted_is_painted_all_the_same(
    kept: JobManager, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The disk is full when the next daemon starts."""
    name = await take(kept)
    await kept.aclose()
    following = JobManager(tmp_path / "jobs", lambda: service)  # type: ignore[arg-type, return-value]
    monkeypatch.setattr(kept_module.atomic, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    service.go.set()
    following.resume()
    await finished(following, name)


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "file.json"
    atomic.write(path, "first")
    assert path.stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        atomic.write(path, "second")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]
