"""Tests how the studio follows jobs: watchers, and the feed of their news."""

import sqlite3
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from typing import Any

import anyio
import pytest

from engine.contract import Step
from klein_mcp.images.library import Store
from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.events import Done, Progressed
from klein_mcp.jobs.manager import JobManager
from klein_mcp.jobs.request import generate
from klein_mcp.jobs.service import Service
from klein_mcp.jobs.status import JobStatus
from klein_mcp.studio.feed import Feed
from tests.fakes import FakeExecutor
from tests.images import file, scene

pytestmark = pytest.mark.anyio


async def follow(jobs: JobManager, seen: list[tuple[JobStatus, Any]], until: type) -> None:
    async with aclosing(jobs.watch()) as changes:
        async for news in changes:
            if news is not None:
                seen.append(news)
                if isinstance(news[1], until):
                    return


async def test_watcher_sees_every_step_with_a_preview(service: Service, jobs: JobManager) -> None:
    seen: list[tuple[JobStatus, Any]] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(follow, jobs, seen, Done)
        await anyio.wait_all_tasks_blocked()
        await service.run(generate("a cat"), CallContext("agent"))
    steps = [event for _, event in seen if isinstance(event, Progressed) and isinstance(event.event, Step)]
    assert len(steps) == 4
    assert all(step.preview is not None for step in steps)
    assert {status.client for status, _ in seen} == {"agent"}


async def test_nobody_watching_means_no_previews(
    service: Service, painter: FakeExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    previews: list[Any] = []
    run = painter.run

    def recorded(job: Any, watched: Callable[[], bool]) -> Iterator[Any]:
        for event in run(job, watched):
            previews.extend([event.preview] if isinstance(event, Step) else [])
            yield event

    monkeypatch.setattr(painter, "run", recorded)
    await service.run(generate("a cat"), CallContext("agent"))
    assert previews == [None] * 4


async def test_watcher_that_comes_late_hears_of_jobs_that_run(
    service: Service, jobs: JobManager, painter: FakeExecutor
) -> None:
    painter.seconds_per_step = 0.2
    seen: list[tuple[JobStatus, Any]] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(service.run, generate("a slow cat"), CallContext("agent"))
        with anyio.fail_after(120):
            while not painter.jobs:
                await anyio.sleep(0.01)
        await follow(jobs, seen, Done)
    assert seen[0][0].prompt == "a slow cat"


async def test_watcher_neither_cancels_a_job_nor_keeps_it(
    service: Service, jobs: JobManager, painter: FakeExecutor
) -> None:
    painter.seconds_per_step = 0.2
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(follow, jobs, [], Progressed)  # leaves at the first news
        await service.run(generate("finished"), CallContext("agent"))
        with anyio.move_on_after(0.3):
            await service.run(generate("given up"), CallContext("agent"))
        with anyio.fail_after(120):
            while any(status.state not in ("done", "failed", "cancelled") for status in await jobs.list()):
                await anyio.sleep(0.02)
    states = {status.prompt: status.state for status in await jobs.list()}
    assert states == {"finished": "done", "given up": "cancelled"}


async def test_feed_tells_of_jobs_and_marks_the_readers_own(service: Service, painter: FakeExecutor) -> None:
    painter.seconds_per_step = 0.1
    feed = Feed(service)
    views: list[Any] = []
    async with anyio.create_task_group() as tasks:

        async def listen() -> None:
            async with aclosing(feed.stream("me")) as stream:
                async for now in stream:
                    views.append(now)  # noqa: PERF401 - one by one, as they come

        tasks.start_soon(listen)
        await anyio.sleep(0.1)
        await service.run(generate("a cat"), CallContext("me"))
        await service.run(generate("a dog"), CallContext("someone else"))
        with anyio.fail_after(120):
            while not views or views[-1] is None or views[-1]["jobs"]:
                await anyio.sleep(0.02)
        tasks.cancel_scope.cancel()
    jobs = [job for now in views if now for job in now["jobs"]]
    assert {(job["prompt"], job["mine"]) for job in jobs} == {("a cat", True), ("a dog", False)}
    assert {job["step"] for job in jobs} >= {1, 2, 3, 4}
    assert any(job["preview"] and job["preview"].startswith("data:image/") for job in jobs)
    assert len({now["library"] for now in views if now}) >= 3  # at first, and after each of the two images


async def test_read_of_now_waits_a_second_for_news_at_most(service: Service) -> None:
    feed = Feed(service)
    first = await feed.now("me", after=0)
    with anyio.fail_after(120):
        second = await feed.now("me", after=first["seq"], seconds=0.2)
    assert second["jobs"] == []


async def test_feed_stops_following_when_nobody_reads(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("klein_mcp.studio.feed.LINGER", 0.5)
    feed = Feed(service)
    await feed.now("me", after=0)
    assert feed._task is not None
    with anyio.fail_after(120):
        while feed._task is not None:
            await anyio.sleep(0.05)


async def test_reader_that_comes_while_the_feed_ends_hears_news(
    service: Service, jobs: JobManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watch of jobs is slow to end, as a connection to the daemon may be."""
    ending, watch = anyio.Event(), jobs.watch

    async def slow_to_end() -> AsyncGenerator[Any]:
        try:
            async with aclosing(watch()) as changes:
                async for news in changes:
                    yield news
        finally:
            ending.set()
            with anyio.CancelScope(shield=True):
                await heard.wait()

    heard = anyio.Event()
    monkeypatch.setattr("klein_mcp.studio.feed.LINGER", 0.5)
    monkeypatch.setattr(jobs, "watch", slow_to_end)
    feed = Feed(service)
    await feed.now("me", after=0)
    with anyio.fail_after(20):
        await ending.wait()
        monkeypatch.setattr(jobs, "watch", watch)
        async with feed._reading(), anyio.create_task_group() as tasks:
            tasks.start_soon(service.run, generate("a cat"), CallContext("agent"))
            while (await feed.now("me", after=0))["library"] == 0:
                await anyio.sleep(0.02)
        heard.set()


@pytest.mark.parametrize(
    ("client", "who"),
    [
        ("front-end-1-ab", "an agent"),
        ("token-0", "an agent"),
        ("openai-token-0", "a client of the OpenAI API"),
        ("a1111-token-0", "a client of the A1111 API"),
        ("replay", "the command line"),
        ("studio", "the studio"),
    ],
)
async def test_job_names_whose_it_is(service: Service, painter: FakeExecutor, client: str, who: str) -> None:
    painter.seconds_per_step = 60.0
    feed = Feed(service)
    with anyio.fail_after(120):
        async with feed._reading(), anyio.create_task_group() as tasks:
            tasks.start_soon(service.run, generate("a cat"), CallContext(client))
            while not (now := await feed.now("me", after=0))["jobs"]:
                await anyio.sleep(0.02)
            painter.hurry()
            assert [job["who"] for job in now["jobs"]] == [who]


async def other_library(feed: Feed, known: int) -> None:
    """Wait for news of another library than `known`."""
    with anyio.fail_after(20):
        while (await feed.now("me", after=0))["library"] == known:
            await anyio.sleep(0.02)


async def looked(feed: Feed) -> None:
    with anyio.fail_after(20):
        while feed._revision is None:
            await feed.now("me", after=0)
            await anyio.sleep(0.02)


async def test_change_by_others_right_after_an_own_one_is_seen(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("klein_mcp.studio.feed.LIBRARY_EVERY", 0.3)
    feed = Feed(service)
    await looked(feed)
    feed.library_changed()
    own = (await feed.now("me", after=0))["library"]
    service.sources.add(file(scene(64, 48)), "The upload", "other")
    await other_library(feed, own)


async def test_library_that_fails_once_is_looked_at_again(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("klein_mcp.studio.feed.LIBRARY_EVERY", 0.05)
    feed, revision, failed = Feed(service), Store.revision, []

    def fails_once(store: Store) -> tuple[int, int]:
        if len(failed) < 2:
            failed.append(store)
            raise sqlite3.OperationalError("disk I/O error")
        return revision(store)

    monkeypatch.setattr(Store, "revision", fails_once)
    async with feed._reading():
        await looked(feed)
        before = (await feed.now("me", after=0))["library"]
        service.sources.add(file(scene(64, 48)), "The upload", "other")
        await other_library(feed, before)


async def test_fault_of_ours_that_ends_following_is_logged(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fault(store: Store) -> tuple[int, int]:
        raise AttributeError("a fault of ours")

    monkeypatch.setattr(Store, "revision", fault)
    feed = Feed(service)
    async with feed._reading():
        with anyio.fail_after(20):
            while "a fault of ours" not in caplog.text:
                await anyio.sleep(0.02)
