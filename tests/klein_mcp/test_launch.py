"""Tests of the engine's process: started, crashed, idle, replaced, stopped."""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import aclosing

import pytest
from filelock import FileLock

from engine.contract import EngineFailed, Loading, Step
from klein_mcp.cli.status import format_status
from klein_mcp.daemon import client, launch
from klein_mcp.daemon import endpoint as endpoints
from klein_mcp.daemon.client import DaemonClient
from klein_mcp.jobs.events import Done, ImageSaved, Progressed
from klein_mcp.jobs.request import generate
from klein_mcp.jobs.status import DaemonStatus
from klein_mcp.settings import Settings
from tests.klein_mcp.daemons import connection, daemons, gone, inner, run
from tests.klein_mcp.fake_daemon import COMMAND, LOST
from tests.waiting import until

pytestmark = pytest.mark.anyio


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


async def test_lost_device_costs_a_process_and_no_job(front_end, tmp_path):
    await run(front_end)
    (old,) = daemons(tmp_path)
    waiting, events = None, []
    async with aclosing(front_end.run(generate("pause=0.1 steps=40", seed=5), client="me")) as stream:
        async for event in stream:
            events.append(event)
            if isinstance(inner(event), Step) and not waiting:
                waiting = asyncio.create_task(run(front_end, seed=6, client="other"))
                while not (waiting.done() or (await front_end.status()).queue.waiting):
                    await asyncio.sleep(0.01)
                (tmp_path / LOST).touch()
    assert waiting
    for ended, seed in ((events, 5), (await waiting, 6)):
        assert isinstance(ended[-1], Done)
        assert [event.saved.seed for event in ended if isinstance(event, ImageSaved)] == [seed]
    assert daemons(tmp_path) != [old]


async def test_job_that_loses_each_device_is_an_error_and_the_next_runs(front_end):
    with pytest.raises(EngineFailed, match="crashed twice on this image"):
        await run(front_end, "lose")
    assert isinstance((await run(front_end))[-1], Done)


async def test_daemon_that_is_replaced_counts_as_no_crash(front_end, tmp_path):
    await run(front_end)
    long = asyncio.create_task(run(front_end, "pause=0.1 steps=10", client="other"))
    await asyncio.sleep(0.3)
    launcher, victim, events = front_end._launcher(), None, []
    await launcher._ask_to_leave(await launcher.find())
    async with aclosing(front_end.run(generate("pause=0.1 steps=8"), client="me")) as stream:
        async for event in stream:
            events.append(event)
            if isinstance(inner(event), Step) and not victim:
                (victim,) = daemons(tmp_path)
                os.kill(victim, signal.SIGKILL)
    assert isinstance(events[-1], Done)
    assert isinstance((await long)[-1], Done)


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


async def test_engine_on_another_machine_is_named_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "ELSEWHERE", 0.1)
    (tmp_path / endpoints.HOST_FILE).write_text("gpu-box")
    with FileLock(tmp_path / endpoints.ENGINE_LOCK):
        async with connection(tmp_path) as front_end:
            for ask in (run(front_end), front_end.stop()):
                with pytest.raises(EngineFailed, match=f"{tmp_path} runs on gpu-box.*KLEIN_HOME"):
                    await ask


async def test_data_folder_that_an_engine_elsewhere_left_is_taken_over(front_end, tmp_path):
    (tmp_path / endpoints.HOST_FILE).write_text("gpu-box")
    assert endpoints.other_host(tmp_path) == "gpu-box"
    await run(front_end)
    assert not endpoints.other_host(tmp_path)
    assert (tmp_path / endpoints.HOST_FILE).read_text() == socket.gethostname()
    await front_end.stop()
    assert not (tmp_path / endpoints.HOST_FILE).exists()


ON_EXFAT = """
import os
from klein_mcp import atomic
from klein_mcp.daemon.__main__ import main
from tests.klein_mcp.fake_daemon import make

def write(path, text, **more):
    keep_to_ourselves(path, text, **more)
    os.chmod(path, 0o755)

keep_to_ourselves, atomic.atomic_write = atomic.atomic_write, write
os._exit(main(make))
"""


async def test_disk_that_cannot_keep_the_address_secret_is_named(tmp_path):
    async with aclosing(DaemonClient(Settings(home=tmp_path), (sys.executable, "-c", ON_EXFAT))) as front_end:
        with pytest.raises(EngineFailed, match="Set KLEIN_HOME to a folder on another disk") as error:
            await run(front_end)
    assert "\n" not in str(error.value)


async def test_daemon_searches_the_hub_folder_of_its_front_end(tmp_path, monkeypatch):
    say_hub = "import sys; from klein_mcp.settings import Settings; sys.exit(str(Settings.load().hub))"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", "hf")
    async with aclosing(DaemonClient(Settings(home=tmp_path), (sys.executable, "-c", say_hub))) as front_end:
        with pytest.raises(EngineFailed) as ended:
            await run(front_end)
    assert ended.value.message == str(Settings.load().hub) == str(tmp_path / "hf" / "hub")


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


@pytest.mark.parametrize("refused", [False, True])
def test_daemon_on_windows_leaves_window_and_job(monkeypatch, refused):
    """A job object that lets nothing break away refuses the flag."""
    flags = {"CREATE_NO_WINDOW": 0x08000000, "CREATE_NEW_PROCESS_GROUP": 0x200, "CREATE_BREAKAWAY_FROM_JOB": 0x01000000}
    for name, value in flags.items():
        monkeypatch.setattr(subprocess, name, value, raising=False)
    tried = []

    def start(command, *, creationflags):
        tried.append(creationflags)
        if refused and creationflags & 0x01000000:
            raise PermissionError("Access is denied")
        return command

    with monkeypatch.context() as windows:
        windows.setattr(subprocess, "Popen", start)
        windows.setattr(os, "name", "nt")
        assert launch._start_detached(["python"]) == ["python"]
    assert tried == [0x09000200, *([0x08000200] if refused else [])], "detached, python.exe's child opens a window"
