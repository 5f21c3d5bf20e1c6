"""Finds the daemon of this user or starts it.

One at a time, however many front ends look at once.
"""

import contextlib
import errno
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

import klein_mcp
from engine.contract import EngineFailed
from klein_mcp.atomic import next_step
from klein_mcp.daemon import endpoint as endpoints
from klein_mcp.daemon.endpoint import ENGINE_LOCK, INSTALLED, BuildInfo, Endpoint
from klein_mcp.private import open_log
from klein_mcp.settings import Settings, hub_environment

if TYPE_CHECKING:
    import httpx2

START_TIMEOUT = 60.0
"""Seconds until a daemon that was started must answer; 1 s is usual, a cold disk under load took 10 times that."""

GREETING = 5.0
"""Seconds for a daemon to say hello, which it does at once unless its machine is very busy."""

ROOM = 2**16
"""Bytes of disk below which an engine does not start: its endpoint, its log, and SQLite's shared memory of 32 KiB."""

ELSEWHERE = 1.0
"""Seconds for which a locked data folder may still name another machine: its new engine notes its own at once."""

DAEMON = (sys.executable, "-m", "klein_mcp.daemon")


@dataclass(frozen=True, slots=True)
class DaemonInfo:
    """A daemon that has proved itself ours."""

    endpoint: Endpoint
    build: BuildInfo
    draining: bool
    folder: str = ""


class Launcher:
    """Finds or starts one daemon.

    settings.home says which one, `build` which code this front end runs, `command` how a daemon is started.
    """

    def __init__(
        self, settings: Settings, http: "httpx2.AsyncClient", build: BuildInfo, command: Sequence[str]
    ) -> None:
        self._settings = settings
        self._http = http
        self._command = command
        self._build = build

    async def find(self) -> DaemonInfo | None:
        """Return the daemon that runs now, if one does. Starts nothing."""
        endpoint = endpoints.read(self._settings.home)
        if not endpoint:
            return None
        import httpx2

        nonce = secrets.token_hex(16)
        try:
            response = await self._http.get(f"{endpoint.url}/hello", params={"nonce": nonce}, timeout=GREETING)
            answer = response.json()
            proved = secrets.compare_digest(answer["proof"], endpoint.proof(nonce))
            build, folder = BuildInfo(**answer["build"]), str(answer.get("folder", ""))
            return DaemonInfo(endpoint, build, answer["draining"], folder) if proved else None
        except (httpx2.HTTPError, ValueError, TypeError, KeyError):
            return None  # nobody there, or somebody else on a stale port

    async def ready(self) -> AsyncGenerator[Endpoint | None]:
        """Yield None while the daemon is started or replaced.

        At least every second, at last its endpoint.
        Raises EngineFailed if it does not start, is on another machine, or is newer than this front end.
        """
        heard, held = time.monotonic(), None  # held: since when its lock is, while nobody answers
        while True:
            hello = await self.find()
            if hello and not hello.draining and self._same(hello):
                yield hello.endpoint
                return
            if hello:
                heard, held = time.monotonic(), None
                if not hello.draining:
                    await self._ask_to_leave(hello)
            elif time.monotonic() - heard > START_TIMEOUT:
                raise self.timeout_error(START_TIMEOUT)
            elif self.lock_is_held():  # too busy to answer, or on its way out: a second one would only wait for it
                held = held or time.monotonic()
                self.check_host(time.monotonic() - held)
            else:
                held = None
                async with aclosing(self._start_if_nobody_does()) as starting:
                    async for _ in starting:
                        yield None
            yield None
            await anyio.sleep(0.1)

    def _same(self, hello: DaemonInfo) -> bool:
        if hello.build.fingerprint == self._build.fingerprint:
            return True
        if hello.build.newer_than(self._build):
            raise EngineFailed(
                f"The engine that runs, {hello.build.name} in {hello.folder or 'another folder'}, is newer than this"
                f" server, {self._build.name} in {INSTALLED}.",
                hint="Update this server's folder, or restart it if that was done; or run `klein-mcp stop`.",
            )
        return False

    def lock_is_held(self) -> bool:
        """Whether a process holds the engine's lock, as every daemon does."""
        from filelock import FileLock, Timeout

        path = self._settings.home / ENGINE_LOCK
        try:
            if path.exists():
                with FileLock(path, timeout=0):
                    pass
        except Timeout:
            return True
        except OSError:
            pass  # not ours to write: reported when we try to start one
        return False

    def reads(self, endpoint: Endpoint) -> bool:
        """Whether the endpoint file still says `endpoint`."""
        return endpoints.read(self._settings.home) == endpoint

    def has_exited(self, endpoint: Endpoint) -> bool:
        """Whether that daemon has released its lock, the last thing it does.

        Another may run by now.
        """
        return not self.lock_is_held() or endpoints.read(self._settings.home) not in (None, endpoint)

    def check_host(self, silent: float) -> None:
        """Raise EngineFailed if the engine is on another machine.

        That one shares the data folder.
        silent: seconds for which it has held its lock and not answered.
        """
        home = self._settings.home
        if silent > ELSEWHERE and (host := endpoints.other_host(home)):
            raise EngineFailed(
                f"The engine of the data folder {home} runs on {host}, and only programs there can reach it.",
                hint="Set KLEIN_HOME to a folder of this machine alone.",
            )

    def timeout_error(self, seconds: float) -> EngineFailed:
        """Make the error for an engine that does not answer."""
        endpoint = endpoints.read(self._settings.home)
        process = f"process {endpoint.pid}" if endpoint else "its process"
        return EngineFailed(f"The engine has not answered for {seconds:.0f} s.", hint=f"End {process}, and try again.")

    async def _ask_to_leave(self, hello: DaemonInfo) -> None:
        import httpx2

        with contextlib.suppress(httpx2.HTTPError):  # it has left already, or hangs: the caller looks again
            await self._http.post(f"{hello.endpoint.url}/drain", headers=authorization(hello.endpoint), timeout=5)

    async def _start_if_nobody_does(self) -> AsyncGenerator[None]:
        from filelock import FileLock, Timeout

        home = self._settings.home
        try:
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = FileLock(home / "launch.lock", timeout=0)
            lock.acquire()
        except Timeout:
            return  # another front end is at it; the caller looks again
        except OSError as exc:
            raise EngineFailed(
                f"The data folder {home} cannot be used: {exc.strerror}.",
                hint="Make it writable, or set KLEIN_HOME to a folder that is.",
            ) from None
        try:
            if await self.find():
                return
            process = self._spawn()
            # Not by a cancel scope: between two yields it would be open in whoever listens, and cancel that.
            deadline = time.monotonic() + START_TIMEOUT
            while not await self.find():
                if process.poll() is not None:
                    raise _why_it_ended(home, process.returncode)
                if time.monotonic() > deadline:
                    process.kill()
                    raise EngineFailed(
                        f"The engine did not answer within {START_TIMEOUT:.0f} s.", hint="See `klein-mcp doctor`."
                    )
                yield None
                await anyio.sleep(0.05)
        finally:
            lock.release()

    def _spawn(self) -> "subprocess.Popen[Any]":
        home = self._settings.home
        try:
            with open_log(home / "daemon.err") as errors:
                process = _start_detached(
                    self._command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,  # an inherited stdout would corrupt the front end's MCP stream
                    stderr=errors,
                    cwd=Path(klein_mcp.__file__).parents[1],  # finds the package even where it is not installed
                    env={**os.environ, **hub_environment(), "KLEIN_HOME": str(home)},
                )
        except OSError as exc:
            raise EngineFailed(
                f"The engine cannot be started: {exc}.", hint="`klein-mcp doctor` looks for causes."
            ) from None
        # Somebody has to wait for its end, or it stays behind as a zombie while the front end runs.
        threading.Thread(target=process.wait, name="reaper", daemon=True).start()
        return process


def authorization(endpoint: Endpoint) -> dict[str, str]:
    return {"authorization": f"Bearer {endpoint.token}"}


def _start_detached(command: Sequence[str], **options: Any) -> "subprocess.Popen[Any]":
    """Start a process that outlives its terminal and, where allowed, its client."""
    if os.name == "posix":
        return subprocess.Popen(command, start_new_session=True, **options)
    # A console without a window, not none: the python.exe of an environment starts the real one, which without a
    # console to inherit would open its own, and end when somebody closes that window.
    flags: int = subprocess.CREATE_NO_WINDOW | subprocess.CREATE_NEW_PROCESS_GROUP  # type: ignore[attr-defined] - Windows'
    away: int = subprocess.CREATE_BREAKAWAY_FROM_JOB  # type: ignore[attr-defined] - Windows'
    try:
        # A client may have put its servers into a job object, which ends with it and takes all of their children along.
        return subprocess.Popen(command, creationflags=flags | away, **options)
    except PermissionError:  # that job lets nothing break away
        return subprocess.Popen(command, creationflags=flags, **options)


def _why_it_ended(home: Path, code: int) -> EngineFailed:
    """Make the error for an engine that ended at its start.

    On a full disk it could not even write why.
    """
    try:
        with tempfile.TemporaryFile(dir=home, buffering=0) as file:
            written = file.write(bytes(ROOM))
        failure = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if written < ROOM else None
    except OSError as exc:
        failure = exc
    if failure:
        return EngineFailed(
            f"The engine cannot start, as the data folder {home} cannot be written: {failure.strerror or failure}.",
            hint=next_step(failure, "it"),
        )
    if line := _last_line(home / "daemon.err"):
        return EngineFailed(line)
    return EngineFailed(
        f"The engine ended at its start, with exit code {code}.", hint="`klein-mcp doctor` looks for causes."
    )


def _last_line(path: Path) -> str:
    with contextlib.suppress(OSError):
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")
    return ""
