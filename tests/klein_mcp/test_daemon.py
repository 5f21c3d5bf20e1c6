"""The engine's process behind front ends: found, started, shared, left, crashed, replaced, stopped."""

import asyncio
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from filelock import FileLock

from engine.contract import Busy, EngineFailed, InvalidJob, Loading, Queued, Stage, Step
from klein_mcp.cli.status import format_status
from klein_mcp.daemon import client, launch
from klein_mcp.daemon import endpoint as endpoints
from klein_mcp.daemon.client import DaemonClient
from klein_mcp.jobs.events import Done, Failed, ImageSaved, JobEvent, Listen, Progressed, Saving, Submitted
from klein_mcp.jobs.request import generate
from klein_mcp.jobs.status import DaemonStatus
from klein_mcp.settings import Settings
from tests.klein_mcp.fake_daemon import COMMAND

pytestmark = pytest.mark.anyio


@pytest.fixture
async def front_end(tmp_path: Path) -> AsyncIterator[DaemonClient]:
    async with connection(tmp_path) as front_end:
        yield front_end
        await front_end.stop()
        await gone(tmp_path)


@asynccontextmanager
async def connection(home: Path, **settings: Any) -> AsyncIterator[DaemonClient]:
    front_end = DaemonClient(Settings(home=home, **settings), COMMAND)
    try:
        yield front_end
    finally:
        await front_end.aclose()


async def run(front_end: DaemonClient, prompt: str = "a", *, client: str = "me", **more: Any) -> list[JobEvent]:
    """All events of one job. Raises what it failed with."""
    events: list[JobEvent] = []
    async with aclosing(front_end.run(generate(prompt, **more), client=client)) as stream:
        async for event in stream:
            if isinstance(event, Failed):
                raise event.error
            events.append(event)
    return events


def inner(event: JobEvent) -> Any:
    return event.event if isinstance(event, Progressed) else event


async def until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, f"not within {seconds} s"
        await asyncio.sleep(0.01)


async def gone(home: Path) -> None:
    await until(lambda: not daemons(home))


def daemons(home: Path) -> list[int]:
    """Processes that hold an engine for this data folder, zombies not counted."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            environ = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if any(word.endswith(b"_daemon") for word in words) and f"KLEIN_HOME={home}".encode() in environ:
            found.append(int(folder.name))
    return found


async def test_first_job_starts_the_daemon_and_passes_every_stage(front_end, tmp_path):
    events = await run(front_end)
    assert isinstance(inner(events[0]), Loading)
    kinds = [type(inner(event)) for event in events if not isinstance(inner(event), Loading)]
    assert kinds == [Submitted, Queued, Stage, Stage, Step, Step, Step, Step, Stage, Saving, ImageSaved, Done]
    assert len(daemons(tmp_path)) == 1


async def test_daemon_answers_while_it_loads_and_says_how_far_it_is(front_end):
    loading = []
    async with aclosing(front_end.run(generate("load=1.5"), client="me")) as events:
        async for event in events:
            seen = inner(event)
            if isinstance(seen, Loading) and seen.fraction:
                loading.append(seen.fraction)
                status = await front_end.status()
                assert status.queue.running
                assert not status.engine.loaded
            elif loading:
                break
    assert loading[0] == 0.5


async def test_full_queue_is_busy_with_seconds_to_retry(tmp_path, monkeypatch):
    monkeypatch.setenv("KLEIN_QUEUE_SIZE", "1")
    async with connection(tmp_path) as front_end:
        async with aclosing(front_end.run(generate("pause=0.2 steps=1000"), client="a")) as running:
            async for event in running:
                if isinstance(inner(event), Step):
                    break
            async with aclosing(front_end.run(generate("waits"), client="b")) as waiting:
                while not isinstance(event := inner(await anext(waiting)), Queued):
                    pass
                assert event == Queued(1)
                with pytest.raises(Busy, match="The queue is full: 1 images") as full:
                    await run(front_end, client="c")
                assert full.value.retry_after >= 1
        await front_end.stop()
        await gone(tmp_path)


async def test_second_job_finds_it_warm(front_end):
    await run(front_end)
    assert not [event for event in await run(front_end) if isinstance(inner(event), Loading)]


async def test_endpoint_file_is_for_its_owner_alone(front_end, tmp_path):
    await run(front_end)
    assert stat.S_IMODE((tmp_path / "daemon.json").stat().st_mode) == 0o600


async def test_without_the_token_only_the_greeting_is_answered(front_end, tmp_path):
    await run(front_end)
    address = endpoints.read(tmp_path)
    assert address
    async with httpx2.AsyncClient(base_url=address.url) as anybody:
        assert (await anybody.get("/hello?nonce=1")).status_code == 200
        for method, path in [
            ("GET", "/status"),
            ("GET", "/jobs"),
            ("POST", "/jobs"),
            ("GET", "/jobs/j"),
            ("GET", "/jobs/j/events"),
            ("POST", "/jobs/j/detach"),
            ("POST", "/jobs/j/cancel"),
            ("POST", "/drain"),
            ("POST", "/stop"),
        ]:
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": address.token[:-1]}):
                answer = await anybody.request(method, path, headers=headers)
                assert answer.status_code == 401, (method, path, headers)
    assert (await front_end.status()).queue.done == 1


async def test_bytes_that_are_no_request_are_refused(front_end, tmp_path):
    await run(front_end)
    address = endpoints.read(tmp_path)
    assert address
    async with httpx2.AsyncClient(base_url=address.url, headers={"authorization": f"Bearer {address.token}"}) as client:
        for body in (b"", b"noise", b"{}", b'{"request": {}, "client": "a", "listen": null, "saved": []}'):
            assert (await client.post("/jobs", content=body)).status_code == 400
        assert (await client.get("/jobs/nothing")).status_code == 404
    assert isinstance((await run(front_end))[-1], Done)


async def test_engine_error_arrives_in_its_own_words(front_end):
    with pytest.raises(InvalidJob, match=r"^You asked me to fail\. Ask for something else\.$"):
        await run(front_end, "fail")
    assert isinstance((await run(front_end))[-1], Done)


async def test_daemon_that_fails_to_make_its_engine_blocks_no_front_end(front_end, monkeypatch):
    monkeypatch.setenv("KLEIN_DEVICE", "broken")
    with pytest.raises(InvalidJob, match="no such device"):
        await run(front_end)
    monkeypatch.delenv("KLEIN_DEVICE")
    assert isinstance((await run(front_end))[-1], Done)


async def test_last_listener_to_leave_cancels_within_a_step(front_end):
    await run(front_end)
    async with aclosing(front_end.run(generate("pause=0.2 steps=1000"), client="me")) as events:
        async for event in events:
            if isinstance(inner(event), Step):
                break
    assert isinstance((await run(front_end))[-1], Done)
    assert [job.state for job in await front_end.list()] == ["done", "cancelled", "done"]
    assert (await front_end.status()).queue.done == 2


async def test_job_goes_on_while_one_of_two_listeners_is_left(front_end):
    await run(front_end)
    async with aclosing(front_end.run(generate("pause=0.05 steps=20"), client="me")) as first:
        submitted = await anext(first)
        async with aclosing(front_end.events(submitted.job, Listen(steps=True))) as second:
            async for event in second:
                if isinstance(event, Progressed) and event.preview:
                    break
            await first.aclose()
            assert isinstance([event async for event in second][-1], Done)


async def test_known_daemon_is_not_greeted_again(front_end, monkeypatch):
    await run(front_end)
    monkeypatch.setattr(launch.Launcher, "find", None)
    assert isinstance((await run(front_end))[0], Submitted)


async def test_cancel_ends_a_job_for_every_listener(front_end):
    await run(front_end)
    async with aclosing(front_end.run(generate("pause=0.1 steps=1000"), client="me")) as events:
        submitted = await anext(events)
        await front_end.cancel(submitted.job)
        assert type([event async for event in events][-1]).__name__ == "Cancelled"
    assert (await front_end.job(submitted.job)).state == "cancelled"


async def test_submitted_job_that_nobody_hears_is_listened_to_later(front_end):
    job = await front_end.submit(generate("pause=0.1 steps=4"), client="me")
    assert isinstance([event async for event in front_end.events(job)][-1], Done)
    assert [each.job for each in await front_end.list()] == [job]


async def test_killed_front_end_takes_its_job_with_it(front_end, tmp_path):
    await run(front_end)
    script = (
        "import asyncio, sys; from pathlib import Path; from tests.klein_mcp.test_daemon import *\n"
        "async def main():\n"
        "    async with connection(Path(sys.argv[1])) as front_end:\n"
        "        request = generate('pause=0.2 steps=1000')\n"
        "        async for event in front_end.run(request, client='doomed'): print(event, flush=True)\n"
        "asyncio.run(main())"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    while "Step" not in process.stdout.readline():
        pass
    assert (await front_end.status()).queue.running
    process.kill()
    process.wait()
    process.stdout.close()
    for _ in range(600):  # by itself the job would go on for 200 s
        if not (await front_end.status()).queue.running:
            return
        await asyncio.sleep(0.1)
    raise AssertionError("the job outlived its front end")


async def test_daemon_killed_mid_job_is_started_again_and_the_job_retried(front_end, tmp_path):
    victim, events = None, []
    async with aclosing(front_end.run(generate("pause=0.1 steps=8", seed=5, count=2), client="me")) as stream:
        async for event in stream:
            events.append(event)
            second = isinstance(event, Progressed) and event.image == 1 and isinstance(event.event, Step)
            if second and not victim and any(isinstance(event, ImageSaved) for event in events):
                (victim,) = daemons(tmp_path)
                os.kill(victim, signal.SIGKILL)
    saved = [event.saved for event in events if isinstance(event, ImageSaved)]
    assert [image.seed for image in saved] == [5, 6], "the first is neither lost nor made again"
    assert isinstance(events[-1], Done)
    assert victim
    assert daemons(tmp_path) != [victim]


async def test_second_crash_is_an_error_and_the_next_job_runs(front_end):
    with pytest.raises(EngineFailed, match="crashed twice on this image"):
        await run(front_end, "crash=2")
    assert isinstance((await run(front_end))[-1], Done)


async def test_stop_ends_it_and_tells_every_listener(front_end, tmp_path):
    await run(front_end)

    async def stop() -> None:
        await asyncio.sleep(0.5)
        assert await front_end.stop()

    stopping = asyncio.create_task(stop())
    with pytest.raises(EngineFailed, match="The engine was stopped"):
        await run(front_end, "pause=0.1 steps=1000")
    await stopping
    await gone(tmp_path)
    assert await front_end.status() == DaemonStatus(False)
    assert not (tmp_path / "daemon.json").exists()


async def test_sigterm_ends_it_like_stop(front_end, tmp_path):
    await run(front_end)
    (pid,) = daemons(tmp_path)
    os.kill(pid, signal.SIGTERM)
    await gone(tmp_path)
    assert not (tmp_path / "daemon.json").exists()
    assert isinstance((await run(front_end))[-1], Done)


async def test_idle_weights_leave_and_later_the_process(tmp_path, monkeypatch):
    monkeypatch.setenv("KLEIN_KEEP_ALIVE", "0.3")
    monkeypatch.setenv("KLEIN_EXIT_AFTER", "1.5")
    async with connection(tmp_path) as front_end:
        await run(front_end)
        (first,) = daemons(tmp_path)
        await until(lambda: "releasing the weights" in (tmp_path / "daemon.log").read_text())
        engine = (await front_end.status()).engine
        assert engine is not None
        assert not engine.loaded
        assert any(isinstance(inner(event), Loading) and inner(event).model == "fake" for event in await run(front_end))
        await gone(tmp_path)
        assert isinstance((await run(front_end))[-1], Done)
        assert daemons(tmp_path) != [first]
        await front_end.stop()
        await gone(tmp_path)


async def test_daemon_whose_data_folder_was_deleted_leaves(tmp_path):
    home = tmp_path / "home"
    async with connection(home) as front_end:
        await run(front_end)
        shutil.rmtree(home)
        await until(lambda: not daemons(home), 15)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"port": "x"}', b'{"port": 1, "pid": 1, "token": "t"}'])
async def test_endpoint_file_that_leads_nowhere_is_written_anew(content, tmp_path):
    path = tmp_path / "daemon.json"
    path.write_bytes(content)
    path.chmod(0o600)
    async with connection(tmp_path) as front_end:
        assert await front_end.status() == DaemonStatus(False)
        assert isinstance((await run(front_end))[-1], Done)
        await front_end.stop()
        await gone(tmp_path)


async def test_other_process_on_a_stale_port_gets_neither_token_nor_prompt(tmp_path):
    heard = []

    async def other(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.readuntil(b"\r\n\r\n"))
        body = json.dumps(
            {"proof": "0" * 64, "draining": False, "build": {"version": "9", "fingerprint": "", "changed": 0}}
        )
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(other, "127.0.0.1", 0)
    endpoints.write(tmp_path, endpoints.Endpoint(server.sockets[0].getsockname()[1], os.getpid(), "our secret"))
    async with server, connection(tmp_path) as front_end:
        assert isinstance((await run(front_end, "nobody else shall read this"))[-1], Done)
        await front_end.stop()
        await gone(tmp_path)
    assert heard
    assert not any(b"our secret" in words or b"nobody else" in words for words in heard)


async def test_endpoint_file_that_others_can_read_is_ignored(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoints.write(tmp_path, endpoints.Endpoint(listener.getsockname()[1], 1, "planted"))
        (tmp_path / "daemon.json").chmod(0o644)
        assert endpoints.read(tmp_path) is None


async def test_daemon_of_another_build_finishes_its_work_and_is_replaced(front_end, tmp_path):
    await run(front_end)
    (old,) = daemons(tmp_path)
    long = asyncio.create_task(run(front_end, "pause=0.1 steps=10", client="other"))
    await asyncio.sleep(0.3)
    async with connection(tmp_path) as newer:
        newer._build = endpoints.BuildInfo("0.0.0", "other", 2**62)
        with pytest.raises(EngineFailed, match="is newer"):
            await run(newer)
        newer._build = endpoints.BuildInfo("999", "other", 2**62)
        waiting = asyncio.create_task(run(newer))
        assert isinstance((await long)[-1], Done)
        await until(lambda: (address := endpoints.read(tmp_path)) and address.pid != old)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


async def test_eight_front_ends_that_start_at_once_share_one_daemon(tmp_path):
    for round in range(10):
        home = tmp_path / str(round)
        front_ends = [DaemonClient(Settings(home=home), COMMAND) for _ in range(8)]
        results = await asyncio.gather(*(run(each, client=str(n)) for n, each in enumerate(front_ends)))
        assert all(isinstance(events[-1], Done) for events in results)
        assert len(daemons(home)) == 1
        queue = (await front_ends[0].status()).queue
        assert queue is not None
        assert queue.done == 8
        await front_ends[0].stop()
        [await each.aclose() for each in front_ends]
        await gone(home)


async def test_daemon_that_does_not_answer_yet_is_waited_for(tmp_path):
    with FileLock(tmp_path / endpoints.ENGINE_LOCK):
        async with connection(tmp_path) as front_end:
            painting = asyncio.create_task(run(front_end))
            await asyncio.sleep(1.0)
            assert not daemons(tmp_path)
            assert not painting.done()
            painting.cancel()
            await asyncio.gather(painting, return_exceptions=True)
    async with connection(tmp_path) as front_end:
        assert isinstance((await run(front_end))[-1], Done)
        await front_end.stop()
        await gone(tmp_path)


async def test_daemon_that_never_answers_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "START_TIMEOUT", 0.5)
    with FileLock(tmp_path / endpoints.ENGINE_LOCK):
        async with connection(tmp_path) as front_end:
            with pytest.raises(EngineFailed, match="has not answered"):
                await run(front_end)


async def test_stop_and_status_see_a_daemon_that_hangs(front_end, tmp_path, monkeypatch):
    await run(front_end)
    monkeypatch.setattr(client, "PATIENCE", 0.5)
    monkeypatch.setattr(launch, "GREETING", 0.5)
    (pid,) = daemons(tmp_path)
    os.kill(pid, signal.SIGSTOP)
    try:
        status = await front_end.status()
        assert status == DaemonStatus(False, silent=True)
        assert "does not answer" in format_status(status)
        with pytest.raises(EngineFailed, match=f"End process {pid}"):
            await front_end.stop()
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_after_stop_it_is_gone_even_from_within_a_step(front_end):
    painting = asyncio.create_task(run(front_end, "pause=2 steps=2"))
    while not ((status := await front_end.status()).queue and status.queue.running):
        await asyncio.sleep(0.05)
    assert await front_end.stop()
    assert await front_end.status() == DaemonStatus(False)
    with pytest.raises(EngineFailed, match="was stopped"):
        await painting


async def test_daemon_that_does_not_end_when_asked_is_an_error(front_end, tmp_path, monkeypatch):
    await run(front_end)
    monkeypatch.setattr(client, "PATIENCE", 0.3)
    monkeypatch.setattr(client, "LAST_STEP", 0.0)
    monkeypatch.setattr(launch.Launcher, "has_exited", lambda self, address: False)
    with pytest.raises(EngineFailed, match=r"End .*process"):
        await front_end.stop()
    await gone(tmp_path)


async def test_stop_ends_a_daemon_that_is_just_starting(tmp_path):
    process = subprocess.Popen(COMMAND, env={**os.environ, "KLEIN_HOME": str(tmp_path)})
    async with connection(tmp_path) as front_end:
        await until(front_end._launcher().lock_is_held)
        assert await front_end.stop()
    await asyncio.to_thread(process.wait, 120)


def test_log_rotates_and_is_bounded(tmp_path):
    script = (
        "import logging, sys; from pathlib import Path; from klein_mcp.settings import Settings\n"
        "from klein_mcp.daemon.__main__ import _configure_log\n"
        "_configure_log(Settings(home=Path(sys.argv[1]), log_level='info'))\n"
        "for n in range(40_000): logging.getLogger('klein_mcp').info('%06d %s', n, 'x' * 100)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=300)
    logs = sorted(tmp_path.iterdir())
    assert [log.name for log in logs] == ["daemon.log", "daemon.log.1", "daemon.log.2"]
    assert sum(log.stat().st_size for log in logs) <= 3 * 2**20
    assert "039999" in logs[0].read_text()


async def test_status_of_no_daemon_starts_none(tmp_path):
    async with connection(tmp_path) as front_end:
        assert await front_end.status() == DaemonStatus(False)
        assert not await front_end.stop()
    assert not daemons(tmp_path)
    assert list(tmp_path.iterdir()) == []


async def test_daemon_that_cannot_start_says_why_in_one_line(tmp_path):
    (tmp_path / "config.toml").write_text("queue_size = 0\n")
    async with connection(tmp_path) as front_end:
        with pytest.raises(EngineFailed, match="queue_size") as error:
            await run(front_end)
    assert "\n" not in str(error.value)
