"""The daemon's process: joins executor, queue, jobs and HTTP interface.

Binds first, loads after.
"""

import asyncio
import contextlib
import faulthandler
import io
import logging
import logging.handlers
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from klein_mcp.daemon import endpoint as endpoints
from klein_mcp.daemon.app import Daemon
from klein_mcp.daemon.endpoint import ENGINE_LOCK, HOST, LAST_STEP, BuildInfo, Endpoint
from klein_mcp.daemon.executors import make_executor as make_from_settings
from klein_mcp.jobs.executor import Executor
from klein_mcp.jobs.manager import JobManager
from klein_mcp.jobs.queue import Queue
from klein_mcp.jobs.status import DaemonStatus
from klein_mcp.jobs.timing import HISTORY, TimingHistory
from klein_mcp.private import open_log
from klein_mcp.settings import Settings, SettingsError
from klein_mcp.web_server import BACKLOG, WebServer

log = logging.getLogger("klein_mcp.daemon")

LOG = "daemon.log"

LOOK = 2.0
"""Seconds between looks at whether the daemon should end; it does nothing else while it is idle."""

LOST = 5.0
"""Idle seconds after which a daemon whose endpoint file is gone leaves: its data folder was deleted."""

MakeExecutor = Callable[[Settings], Executor]


def main(make: MakeExecutor = make_from_settings) -> int:
    """Run the daemon until it should end.

    make: called with the first job. Returns the exit code.
    """
    faulthandler.enable()
    try:
        settings = Settings.load()
        with _only_one(settings):
            endpoints.claim(settings.home)
            _configure_log(settings)
            asyncio.run(_serve(settings, make))
    except (SettingsError, OSError, Timeout) as exc:
        # The front end that started us shows the last line of stderr.
        print(f"The engine cannot start: {str(exc).splitlines()[0]}", file=sys.stderr, flush=True)
        return 1
    return 0


def _only_one(settings: Settings) -> FileLock:
    """Lock the data folder for life, one engine each.

    The operating system frees the lock on any death.
    """
    settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)
    # A replaced daemon needs a moment to unload before its successor may load.
    return FileLock(settings.home / ENGINE_LOCK, timeout=30)


async def _serve(settings: Settings, make: MakeExecutor) -> None:
    loop = asyncio.get_running_loop()
    listener = _bind()
    endpoint = Endpoint(listener.getsockname()[1], os.getpid(), endpoints.new_token())
    build = BuildInfo.read()

    def make_executor() -> Executor:
        try:
            return make(settings)
        except Exception:
            # The settings it was started with may be at fault; the next front end's settings make another.
            loop.call_soon_threadsafe(daemon.drain)
            raise

    def stop() -> None:
        # Waiting listeners get an error, and a front end that comes later starts another daemon.
        loop.call_soon_threadsafe(daemon.stop)

    def start_anew() -> None:
        # As after a crash: who listens submits again, and so starts the process that takes over.
        loop.call_soon_threadsafe(jobs.hand_over)
        stop()

    history = TimingHistory(settings.home / HISTORY)
    queue = Queue(
        make_executor,
        size=settings.queue_size,
        keep_alive=settings.keep_alive,
        history=history,
        on_death=stop,
        on_broken=start_anew,
    )
    jobs = JobManager(settings.home / "jobs", settings.library, queue)
    about = DaemonStatus(
        True,
        version=build.version,
        pid=endpoint.pid,
        started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        log=str(settings.home / LOG),
    )
    daemon = Daemon(jobs, endpoint, build, about)
    server = _Server(daemon)
    if os.name == "posix":
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, daemon.stop)
    serving = asyncio.create_task(server.serve([listener]))
    try:
        await server.answering.wait()
        endpoints.write(settings.home, endpoint)
        jobs.resume()
        log.info("listening on port %d, pid %d", endpoint.port, endpoint.pid)
        await _until_it_should_end(daemon, settings)
    finally:
        daemon.drain()
        # First the endpoint goes, so that a front end that looks now starts another; then listeners hear of it.
        with contextlib.suppress(OSError):
            endpoints.remove(settings.home, endpoint)
        await jobs.aclose()
        server.end()
        await serving
        await asyncio.to_thread(queue.close, LAST_STEP)
    log.info("ended")


class _Server(WebServer):
    """The server of the daemon, which handles signals itself."""

    def __init__(self, daemon: Daemon) -> None:
        super().__init__(daemon.app(), lifespan="off", timeout_graceful_shutdown=2)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _bind() -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind((HOST, 0))
    listener.listen(BACKLOG)
    return listener


async def _until_it_should_end(daemon: Daemon, settings: Settings) -> None:
    while not daemon.stopping:
        daemon.changed.clear()
        idle = daemon.jobs.idle_seconds
        # At least a second, or a daemon would be gone before the job for which it was started arrives.
        if idle > max(settings.exit_after, 1.0) or (daemon.draining and idle > 0):
            return
        if idle > LOST and endpoints.read(settings.home) != daemon.endpoint:
            log.warning("the endpoint file is gone, so no front end can find this process any more")
            return
        # While it drains, another daemon waits for it to leave.
        pause = 0.1 if daemon.draining else min(LOOK, max(0.1, settings.exit_after - idle))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(daemon.changed.wait(), pause)


class _PrivateLog(logging.handlers.RotatingFileHandler):
    """A log that follows no link and waits for no FIFO."""

    def _open(self) -> io.TextIOWrapper:
        return io.TextIOWrapper(open_log(Path(self.baseFilename), append=True), encoding=self.encoding)


def _configure_log(settings: Settings) -> None:
    handler = _PrivateLog(settings.home / LOG, maxBytes=2**20, backupCount=2, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    # Our own few lines of start and end are worth having at the default level too.
    logging.getLogger("klein_mcp").setLevel(min(logging.INFO, logging.getLevelName(settings.log_level.upper())))


if __name__ == "__main__":
    # Left at once: an interpreter that tears torch down beside a thread still inside it can crash.
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
