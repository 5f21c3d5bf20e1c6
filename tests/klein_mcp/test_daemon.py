"""The engine's process behind real doors: found, started, shared, hung up on, crashed, replaced, stopped."""

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

from engine.contract import Busy, EngineFailed, InvalidJob, Job, Loading, Queued, Result, Stage, Step
from klein_mcp.cli.status import in_words
from klein_mcp.daemon import client, launch
from klein_mcp.daemon import endpoint as addresses
from klein_mcp.daemon.client import DaemonBackend
from klein_mcp.settings import Settings
from tests.klein_mcp.fake_daemon import COMMAND

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[DaemonBackend]:
    async with a_door(tmp_path) as backend:
        yield backend
        await backend.stop()
        await gone(tmp_path)


@asynccontextmanager
async def a_door(home: Path, **settings: Any) -> AsyncIterator[DaemonBackend]:
    backend = DaemonBackend(Settings(home=home, **settings), COMMAND)
    try:
        yield backend
    finally:
        await backend.aclose()


async def paint(door: DaemonBackend, prompt: str = "a", **more: Any) -> list[Any]:
    client = more.pop("client", "me")
    async with aclosing(door.run(Job(prompt, **more), client=client)) as events:
        return [event async for event in events]


async def until(condition: Callable[[], Any], seconds: float = 10.0) -> float:
    """How long it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, f"not within {seconds} s"
        await asyncio.sleep(0.01)
    return time.monotonic() - started


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


async def test_the_first_job_starts_the_daemon_and_tells_every_stage(door, tmp_path):
    events = await paint(door, references=())
    assert isinstance(events[0], Loading)
    kinds = [type(event) for event in events if not isinstance(event, Loading)]
    assert kinds == [Queued, Stage, Stage, Step, Step, Step, Step, Stage, Result]
    assert len(daemons(tmp_path)) == 1


async def test_it_answers_while_it_loads_and_tells_whoever_waits_how_far_it_is(door):
    loading = []
    async with aclosing(door.run(Job("load=1.5"), client="me")) as events:
        async for event in events:
            if isinstance(event, Loading) and event.fraction:
                loading.append(event.fraction)
                status = await door.status()
                assert status["queue"]["running"]
                assert not status["engine"]["loaded"]
            elif loading:
                break
    assert loading[0] == 0.5


async def test_a_full_queue_is_said_to_the_door_with_seconds_to_come_again(tmp_path, monkeypatch):
    monkeypatch.setenv("KLEIN_QUEUE_SIZE", "1")
    async with a_door(tmp_path) as door, aclosing(door.run(Job("pause=0.2 steps=1000"), client="a")) as running:
        async for event in running:
            if isinstance(event, Step):
                break
        async with aclosing(door.run(Job("waits"), client="b")) as waiting:
            assert await anext(waiting) == Queued(1)
            with pytest.raises(Busy, match="The queue is full: 1 pictures") as full:
                await paint(door, client="c")
            assert full.value.retry_after >= 1
        await door.stop()
        await gone(tmp_path)


async def test_the_second_job_finds_it_warm(door):
    await paint(door)
    assert not [event for event in await paint(door) if isinstance(event, Loading)]


async def test_the_address_file_is_for_its_owner_alone(door, tmp_path):
    await paint(door)
    assert stat.S_IMODE((tmp_path / "daemon.json").stat().st_mode) == 0o600


async def test_without_the_token_nothing_is_told_but_a_greeting(door, tmp_path):
    await paint(door)
    address = addresses.read(tmp_path)
    assert address
    async with httpx2.AsyncClient(base_url=address.url) as stranger:
        assert (await stranger.get("/hello?nonce=1")).status_code == 200
        for method, path in [
            ("GET", "/status"),
            ("POST", "/run"),
            ("POST", "/keep"),
            ("GET", "/kept/j"),
            ("POST", "/drain"),
            ("POST", "/stop"),
        ]:
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": address.token[:-1]}):
                answer = await stranger.request(method, path, headers=headers)
                assert answer.status_code == 401, (method, path, headers)
    assert (await door.status())["queue"]["done"] == 1


async def test_bytes_that_are_no_job_are_refused_and_the_next_job_is_painted(door, tmp_path):
    await paint(door)
    address = addresses.read(tmp_path)
    assert address
    async with httpx2.AsyncClient(base_url=address.url, headers={"authorization": f"Bearer {address.token}"}) as client:
        for body in (b"", b"noise", b"\0\0\0\2\0\0\0\0{}"):
            assert (await client.post("/run", content=body)).status_code == 400
        for body in (b"", b"noise", b"{}", b'{"order": {}, "client": "a", "made": null}'):
            assert (await client.post("/keep", content=body)).status_code == 400
        assert (await client.get("/kept/nothing")).status_code == 404
    assert isinstance((await paint(door))[-1], Result)


async def test_an_error_of_the_engine_reaches_the_door_in_its_own_words(door):
    with pytest.raises(InvalidJob, match=r"^You asked me to fail\. Ask for something else\.$"):
        await paint(door, "fail")
    assert isinstance((await paint(door))[-1], Result)


async def test_a_daemon_whose_settings_make_no_engine_does_not_keep_the_next_door_from_painting(door, monkeypatch):
    monkeypatch.setenv("KLEIN_DEVICE", "broken")
    with pytest.raises(InvalidJob, match="no such device"):
        await paint(door)
    monkeypatch.delenv("KLEIN_DEVICE")
    assert isinstance((await paint(door))[-1], Result)


async def test_hanging_up_cancels_within_a_step(door):
    await paint(door)
    async with aclosing(door.run(Job("pause=0.2 steps=100"), client="me")) as events:
        async for event in events:
            if isinstance(event, Step):
                break
    started = time.monotonic()
    assert isinstance((await paint(door))[-1], Result)
    assert time.monotonic() - started < 1.0
    assert (await door.status())["queue"]["done"] == 2


async def test_a_door_that_is_killed_takes_its_job_with_it(door, tmp_path):
    await paint(door)
    script = (
        "import asyncio, sys; from pathlib import Path; from tests.klein_mcp.test_daemon import *\n"
        "async def main():\n"
        "    async with a_door(Path(sys.argv[1])) as door:\n"
        "        async for event in door.run(Job('pause=0.2 steps=1000'), client='doomed'): print(event, flush=True)\n"
        "asyncio.run(main())"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    while "Step" not in process.stdout.readline():
        pass
    assert (await door.status())["queue"]["running"]
    process.kill()
    process.wait()
    process.stdout.close()
    killed = time.monotonic()
    while (await door.status())["queue"]["running"]:
        assert time.monotonic() - killed < 2.0
        await asyncio.sleep(0.05)


async def test_a_daemon_that_is_killed_mid_job_is_started_again_and_the_job_retried(door, tmp_path):
    victim, events = None, []
    async with aclosing(door.run(Job("pause=0.1 steps=8", seed=5), client="me")) as stream:
        async for event in stream:
            events.append(event)
            if isinstance(event, Step) and event.done == 3 and not victim:
                (victim,) = daemons(tmp_path)
                os.kill(victim, signal.SIGKILL)
    assert isinstance(events[-1], Result)
    assert events[-1].seed == 5
    assert daemons(tmp_path) != [victim]


async def test_a_second_crash_is_one_clear_error_and_the_next_job_is_painted(door):
    with pytest.raises(EngineFailed, match="crashed twice on this picture"):
        await paint(door, "crash=2")
    assert isinstance((await paint(door))[-1], Result)


async def test_stop_ends_it_and_tells_whoever_waits(door, tmp_path):
    await paint(door)

    async def stop() -> None:
        await asyncio.sleep(0.5)
        assert await door.stop()

    stopping = asyncio.create_task(stop())
    with pytest.raises(EngineFailed, match="The engine was stopped"):
        await paint(door, "pause=0.1 steps=1000")
    await stopping
    await gone(tmp_path)
    assert await door.status() == {"running": False}
    assert not (tmp_path / "daemon.json").exists()


async def test_sigterm_ends_it_like_stop(door, tmp_path):
    await paint(door)
    (pid,) = daemons(tmp_path)
    os.kill(pid, signal.SIGTERM)
    await gone(tmp_path)
    assert not (tmp_path / "daemon.json").exists()
    assert isinstance((await paint(door))[-1], Result)


async def test_idle_weights_leave_and_later_the_process(tmp_path, monkeypatch):
    monkeypatch.setenv("KLEIN_KEEP_ALIVE", "0.3")
    monkeypatch.setenv("KLEIN_EXIT_AFTER", "1.5")
    async with a_door(tmp_path) as door:
        await paint(door)
        (first,) = daemons(tmp_path)
        await asyncio.sleep(0.7)
        engine = (await door.status())["engine"]
        assert (engine["loaded"], engine["placement"]) == (None, "released 1×")
        assert any(isinstance(event, Loading) and event.model == "fake" for event in await paint(door))
        await gone(tmp_path)
        assert isinstance((await paint(door))[-1], Result)
        assert daemons(tmp_path) != [first]
        await door.stop()
        await gone(tmp_path)


async def test_a_daemon_whose_data_folder_was_deleted_leaves(tmp_path):
    home = tmp_path / "home"
    async with a_door(home) as door:
        await paint(door)
        shutil.rmtree(home)
        await until(lambda: not daemons(home), 15)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"port": "x"}', b'{"port": 1, "pid": 1, "token": "t"}'])
async def test_an_address_file_that_leads_nowhere_is_written_anew(content, tmp_path):
    path = tmp_path / "daemon.json"
    path.write_bytes(content)
    path.chmod(0o600)
    async with a_door(tmp_path) as door:
        assert await door.status() == {"running": False}
        assert isinstance((await paint(door))[-1], Result)
        await door.stop()
        await gone(tmp_path)


async def test_a_stranger_on_a_stale_port_gets_neither_token_nor_picture(tmp_path):
    heard = []

    async def stranger(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.readuntil(b"\r\n\r\n"))
        body = json.dumps(
            {"proof": "0" * 64, "draining": False, "build": {"version": "9", "fingerprint": "", "changed": 0}}
        )
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(stranger, "127.0.0.1", 0)
    addresses.write(tmp_path, addresses.Endpoint(server.sockets[0].getsockname()[1], os.getpid(), "our secret"))
    async with server, a_door(tmp_path) as door:
        assert isinstance((await paint(door, "nobody else shall read this"))[-1], Result)
        await door.stop()
        await gone(tmp_path)
    assert heard
    assert not any(b"our secret" in words or b"nobody else" in words for words in heard)


async def test_an_address_file_that_others_can_read_or_write_is_not_believed(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        addresses.write(tmp_path, addresses.Endpoint(listener.getsockname()[1], 1, "planted"))
        (tmp_path / "daemon.json").chmod(0o644)
        assert addresses.read(tmp_path) is None


async def test_a_daemon_of_another_build_is_replaced_once_it_has_finished_its_work(door, tmp_path):
    await paint(door)
    (old,) = daemons(tmp_path)
    long = asyncio.create_task(paint(door, "pause=0.1 steps=10", client="other"))
    await asyncio.sleep(0.3)
    async with a_door(tmp_path) as newer:
        newer._build = addresses.BuildInfo("0.0.0", "other", 2**62)
        with pytest.raises(EngineFailed, match="is newer"):
            await paint(newer)
        newer._build = addresses.BuildInfo("999", "other", 2**62)
        monkey = asyncio.create_task(paint(newer))
        assert isinstance((await long)[-1], Result)
        await until(lambda: (address := addresses.read(tmp_path)) and address.pid != old)
        monkey.cancel()
        await asyncio.gather(monkey, return_exceptions=True)


async def test_eight_doors_that_start_at_once_share_one_daemon(tmp_path):
    for round in range(10):
        home = tmp_path / str(round)
        doors = [DaemonBackend(Settings(home=home), COMMAND) for _ in range(8)]
        results = await asyncio.gather(*(paint(door, client=str(n)) for n, door in enumerate(doors)))
        assert all(isinstance(events[-1], Result) for events in results)
        assert len(daemons(home)) == 1
        assert (await doors[0].status())["queue"]["done"] == 8
        await doors[0].stop()
        [await door.aclose() for door in doors]
        await gone(home)


async def test_a_daemon_that_lives_but_does_not_answer_is_waited_for_and_not_doubled(tmp_path):
    with FileLock(tmp_path / addresses.ENGINE_LOCK):
        async with a_door(tmp_path) as door:
            painting = asyncio.create_task(paint(door))
            await asyncio.sleep(1.0)
            assert not daemons(tmp_path)
            assert not painting.done()
            painting.cancel()
            await asyncio.gather(painting, return_exceptions=True)
    async with a_door(tmp_path) as door:
        assert isinstance((await paint(door))[-1], Result)
        await door.stop()
        await gone(tmp_path)


async def test_a_daemon_that_never_answers_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "START_TIMEOUT", 0.5)
    with FileLock(tmp_path / addresses.ENGINE_LOCK):
        async with a_door(tmp_path) as door:
            with pytest.raises(EngineFailed, match="has not answered"):
                await paint(door)


async def test_stop_and_status_do_not_say_that_an_engine_which_hangs_is_not_there(door, tmp_path, monkeypatch):
    await paint(door)
    monkeypatch.setattr(client, "PATIENCE", 0.5)
    monkeypatch.setattr(launch, "GREETING", 0.5)
    (pid,) = daemons(tmp_path)
    os.kill(pid, signal.SIGSTOP)
    try:
        status = await door.status()
        assert status == {"running": False, "silent": True}
        assert "does not answer" in in_words(status)
        with pytest.raises(EngineFailed, match=f"End process {pid}"):
            await door.stop()
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_after_stop_the_engine_is_gone_even_from_within_a_step(door):
    painting = asyncio.create_task(paint(door, "pause=2 steps=2"))
    while not (await door.status()).get("queue", {}).get("running"):
        await asyncio.sleep(0.05)
    assert await door.stop()
    assert await door.status() == {"running": False}
    with pytest.raises(EngineFailed, match="was stopped"):
        await painting


async def test_an_engine_that_does_not_end_when_told_to_is_one_clear_error(door, tmp_path, monkeypatch):
    await paint(door)
    monkeypatch.setattr(client, "PATIENCE", 0.3)
    monkeypatch.setattr(client, "LAST_STEP", 0.0)
    monkeypatch.setattr(launch.Launcher, "gone", lambda self, address: False)
    with pytest.raises(EngineFailed, match=r"End .*process"):
        await door.stop()
    await gone(tmp_path)


async def test_stop_ends_an_engine_that_is_just_starting(tmp_path):
    process = subprocess.Popen(COMMAND, env={**os.environ, "KLEIN_HOME": str(tmp_path)})
    async with a_door(tmp_path) as door:
        await until(door._launcher().alive)  # its lock is held some tenths of a second before it can be asked
        assert await door.stop()
    await asyncio.to_thread(process.wait, 10)


def test_the_log_rotates_and_is_bounded(tmp_path):
    script = (
        "import logging, sys; from pathlib import Path; from klein_mcp.daemon.__main__ import _log_to\n"
        "_log_to(Path(sys.argv[1]), 'info')\n"
        "for n in range(40_000): logging.getLogger('klein_mcp').info('%06d %s', n, 'x' * 100)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "daemon.log")], check=True, timeout=60)
    logs = sorted(tmp_path.iterdir())
    assert [log.name for log in logs] == ["daemon.log", "daemon.log.1", "daemon.log.2"]
    assert sum(log.stat().st_size for log in logs) <= 3 * 2**20
    assert "039999" in logs[0].read_text()


async def test_status_of_no_daemon_starts_none(tmp_path):
    async with a_door(tmp_path) as door:
        assert await door.status() == {"running": False}
        assert not await door.stop()
    assert not daemons(tmp_path)
    assert list(tmp_path.iterdir()) == []


async def test_a_daemon_that_cannot_start_says_why_in_one_line(tmp_path):
    (tmp_path / "config.toml").write_text("queue_size = 0\n")
    async with a_door(tmp_path) as door:
        with pytest.raises(EngineFailed, match="queue_size") as problem:
            await paint(door)
    assert "\n" not in str(problem.value)
