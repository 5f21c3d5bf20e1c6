"""The process that holds the engine: joins engine, queue and app; binds first, loads after."""

import asyncio
import contextlib
import faulthandler
import logging
import logging.handlers
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
from filelock import FileLock, Timeout

from klein_mcp.cli.paint import engine
from klein_mcp.daemon import endpoint as addresses
from klein_mcp.daemon.app import Daemon
from klein_mcp.daemon.endpoint import ENGINE_LOCK, HOST, BuildInfo, Endpoint
from klein_mcp.daemon.executors.local import LocalBackend
from klein_mcp.jobs.manager import JobManager
from klein_mcp.jobs.queue import Executor, Queue
from klein_mcp.jobs.timing import TimingHistory
from klein_mcp.settings import Settings, SettingsError

if TYPE_CHECKING:
    from klein_mcp.jobs.service import Service

log = logging.getLogger("klein_mcp.daemon")

LOST = 5.0
"""Idle seconds after which a daemon whose address was taken away leaves: its data folder was deleted."""

Make = Callable[[Settings], Executor]


def main(make: Make = engine) -> int:
    faulthandler.enable()
    try:
        settings = Settings.load()
        with _alone(settings.home):
            _log_to(settings.home / "daemon.log", settings.log_level)
            asyncio.run(_serve(settings, make))
    except (SettingsError, OSError, Timeout) as problem:
        # The door that started us shows the last line of stderr.
        print(f"The engine cannot start: {str(problem).splitlines()[0]}", file=sys.stderr, flush=True)
        return 1
    return 0


def _alone(home: Path) -> FileLock:
    """Held for life: one engine per data folder, however it was started. The operating system frees it on any death."""
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    # A replaced daemon needs a moment to unload before its successor may load.
    return FileLock(home / ENGINE_LOCK, timeout=30)


async def _serve(settings: Settings, make: Make) -> None:
    listener = _bind()
    address = Endpoint(listener.getsockname()[1], os.getpid(), addresses.new_token())
    build = BuildInfo.read()
    history = TimingHistory(settings.home / "history.json")

    def painter() -> Executor:
        try:
            return make(settings)
        except Exception:
            # What it was started with may be at fault; the next door's settings make another.
            daemon.draining = True
            raise

    queue = Queue(painter, size=settings.queue_size, keep_alive=settings.keep_alive, history=history)
    kept = JobManager(settings.home / "jobs", lambda: _service(settings, queue))
    about = {
        "version": build.version,
        "pid": address.pid,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "log": str(settings.home / "daemon.log"),
    }
    daemon = Daemon(queue, kept, address, build, about=about)
    server = _Server(
        uvicorn.Config(daemon.app(), log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=2)
    )
    if os.name == "posix":
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, daemon.leaving.set)
    worker = threading.Thread(target=queue.work, name="painter", daemon=True)
    serving = asyncio.create_task(server.serve([listener]))
    try:
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        addresses.write(settings.home, address)
        worker.start()
        kept.resume()
        log.info("listening on port %d, pid %d", address.port, address.pid)
        await _until_it_should_end(daemon, server, settings)
    finally:
        daemon.draining = True
        # First the address goes, so that a door that looks now starts another; then the jobs are told.
        with contextlib.suppress(OSError):
            addresses.remove(settings.home, address)
        await kept.aclose()
        queue.close()
        server.should_exit = True
        await serving
        if worker.is_alive():
            await asyncio.to_thread(worker.join, addresses.LAST_STEP)
    log.info("ended")


class _Server(uvicorn.Server):
    """Leaves signals to us: uvicorn raises them again once it has ended, before the address is taken down."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _service(settings: Settings, queue: Queue) -> "Service":
    """The road that every picture takes, for orders that were handed over; they are not handed over again."""
    from klein_mcp.jobs.service import Service

    return Service(replace(settings, wait_budget=math.inf), LocalBackend(queue, kept=True))  # type: ignore[arg-type]


def _bind() -> socket.socket:
    # With the protocol left at 0 asyncio does not switch Nagle's algorithm off, and each job starts 40 ms late.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind((HOST, 0))
    listener.listen(128)
    return listener


async def _until_it_should_end(daemon: Daemon, server: uvicorn.Server, settings: Settings) -> None:
    while not server.should_exit:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(daemon.leaving.wait(), 0.3)
        if daemon.leaving.is_set():
            return
        idle = daemon.idle_seconds
        # At least a second, or a daemon would be gone before the job for which it was started arrives.
        if idle > max(settings.exit_after, 1.0) or (daemon.draining and idle > 0):
            return
        if idle > LOST and addresses.read(settings.home) != daemon.address:
            log.warning("the address file is gone, so no door can find this process any more")
            return


def _log_to(path: Path, level: str) -> None:
    handler = logging.handlers.RotatingFileHandler(path, maxBytes=2**20, backupCount=2, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    # Our own few lines of start and end are worth having at the default level too.
    logging.getLogger("klein_mcp").setLevel(min(logging.INFO, logging.getLevelName(level.upper())))


if __name__ == "__main__":
    # Left at once: an interpreter that tears torch down beside a thread still inside it can crash.
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
