"""The job API over loopback.

Finds or starts the daemon, and submits again after a crash.
"""

import json
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import anyio

from engine.contract import EngineFailed, Loading
from klein_mcp.daemon.endpoint import DRAINING, LAST_STEP, REFUSED, UNKNOWN, BuildInfo, Endpoint
from klein_mcp.daemon.launch import DAEMON, Launcher, authorization
from klein_mcp.jobs import events, status
from klein_mcp.jobs.api import UnknownJob
from klein_mcp.jobs.events import LAST, NO_PREVIEWS, ImageSaved, JobEvent, Listen, Starting
from klein_mcp.jobs.request import ImageRequest
from klein_mcp.jobs.results import SavedImage
from klein_mcp.jobs.status import DaemonStatus, JobStatus
from klein_mcp.limits import JOB_ID
from klein_mcp.settings import Settings

if TYPE_CHECKING:
    import httpx2

log = logging.getLogger(__name__)

PATIENCE = 10.0
"""Seconds for an engine that is starting, ending or hanging to be asked to end."""

SILENCE = 60.0
"""Seconds without a byte after which the daemon is taken for dead; it sends the latest progress every second."""


class _Lost(Exception):
    """The daemon went away before it answered."""


class _Draining(Exception):
    """The daemon takes no more jobs, as another replaces it."""


class DaemonClient:
    """The job API of every front end, see `jobs.api.Jobs`.

    One per process; its connections close with it.
    """

    def __init__(self, settings: Settings, command: Sequence[str] = DAEMON) -> None:
        self._settings = settings
        self._command = command
        # Of the code this process has loaded; read later, it would be that of an upgrade made meanwhile.
        self._build = BuildInfo.read()
        self._http: httpx2.AsyncClient | None = None
        self._known: Endpoint | None = None

    async def submit(self, request: ImageRequest, *, client: str) -> str:
        """Start a job and return its id."""
        answer = await self._ask("POST", "/jobs", json=_body(request, client, None, ()))
        return answer["job"]

    async def run(
        self, request: ImageRequest, *, client: str, listen: Listen = NO_PREVIEWS
    ) -> AsyncGenerator[JobEvent]:
        """Submit and listen.

        Submit once more after a crash, as the same job gives the same images.
        """
        saved: list[SavedImage] = []
        crashes = 0
        while crashes < 2:
            endpoint = None
            async with aclosing(self._ready()) as starting:
                async for endpoint in starting:
                    if not endpoint:
                        yield Starting(len(saved), Loading(request.model, 0.0))
            assert endpoint
            try:
                body = _body(request, client, listen, saved)
                async with aclosing(self._stream(endpoint, "POST", "/jobs", json=body)) as stream:
                    async for event in stream:
                        if isinstance(event, ImageSaved):
                            if event.image < len(saved):
                                continue  # saved before the crash, and passed on then
                            saved.append(event.saved)
                        yield event
                return
            except _Draining:
                self._known = None
            except _Lost:
                self._known = None
                crashes += 1
                log.warning("the engine went away in the middle of a job")
        raise EngineFailed(
            "The engine crashed twice on this image.", hint="Try a smaller size; see `klein-mcp doctor`."
        )

    async def events(self, job: str, listen: Listen = NO_PREVIEWS) -> AsyncGenerator[JobEvent]:
        """Listen to a job, through whichever daemon runs it."""
        seen = 0
        path, asked = f"{_path(job)}/events", {"listen": json.dumps(asdict(listen))}
        # The daemon that runs may be of an early build of 0.2, which reads these three alone.
        asked |= {"preview": str(listen.preview), "each": str(listen.each), "steps": str(int(listen.steps))}
        for _ in range(3):  # two daemons may crash on the job, the third one says so
            endpoint = await self._running()
            try:
                async with aclosing(self._stream(endpoint, "GET", path, params=asked)) as stream:
                    async for event in stream:
                        if isinstance(event, ImageSaved):
                            if event.image < seen:
                                continue
                            seen = event.image + 1
                        yield event
                return
            except _Lost:
                self._known = None
        raise EngineFailed("The engine went away three times.", hint="Try again, or see `klein-mcp doctor`.")

    async def watch(self) -> AsyncGenerator[tuple[JobStatus, JobEvent | None] | None]:
        """Follow the jobs of all clients.

        Ends with the daemon, and never starts one.
        """
        import httpx2

        hello = await self._launcher().find()
        if not hello:
            return
        url, timeout = f"{hello.endpoint.url}/jobs/watch", httpx2.Timeout(SILENCE, connect=5)
        try:
            async with self._client().stream(
                "GET", url, headers=authorization(hello.endpoint), timeout=timeout
            ) as response:
                async for line in response.aiter_lines():
                    if not line:
                        yield None
                        continue
                    news = json.loads(line)
                    event = news["event"] and events.from_json(news["event"])
                    yield status.job_from_json(news["job"]), event
        except (httpx2.TransportError, ValueError, KeyError, TypeError):
            return  # gone, or of another version

    async def detach(self, job: str) -> JobStatus:
        """Let a job go on without listeners."""
        return status.job_from_json(await self._ask("POST", f"{_path(job)}/detach"))

    async def cancel(self, job: str) -> None:
        """Stop a job within one step."""
        await self._ask("POST", f"{_path(job)}/cancel")

    async def job(self, job: str) -> JobStatus:
        """Return how far a job is."""
        return status.job_from_json(await self._ask("GET", _path(job)))

    async def list(self) -> list[JobStatus]:
        """Return the jobs of the daemon that runs, none where none does."""
        if not await self._launcher().find():
            return []
        return [status.job_from_json(job) for job in await self._ask("GET", "/jobs")]

    async def status(self) -> DaemonStatus:
        """Describe the daemon that runs.

        Never starts one.
        """
        import httpx2

        launcher = self._launcher()
        hello = await launcher.find()
        if not hello:
            return DaemonStatus(False, silent=launcher.lock_is_held())
        try:
            answer = await self._client().get(f"{hello.endpoint.url}/status", headers=authorization(hello.endpoint))
            return status.daemon_from_json(answer.json())
        except (httpx2.HTTPError, ValueError, TypeError, KeyError, AttributeError):
            return DaemonStatus(False, silent=True)  # it runs, and its answer makes no sense

    async def stop(self) -> bool:
        """End the daemon and wait until it is gone.

        Returns whether there was one. Raises EngineFailed.
        """
        import httpx2

        launcher, began = self._launcher(), time.monotonic()
        deadline = began + PATIENCE
        while not (hello := await launcher.find()):
            if not launcher.lock_is_held():
                return False
            launcher.check_host(time.monotonic() - began)
            if time.monotonic() > deadline:
                raise launcher.timeout_error(PATIENCE)
            await anyio.sleep(0.1)  # it is starting, and answers in a moment, or ending, and is gone in a moment
        with suppress(httpx2.HTTPError):  # it is ending already, or hangs: the loop below sees which
            await self._client().post(f"{hello.endpoint.url}/stop", headers=authorization(hello.endpoint))
        patience = LAST_STEP + PATIENCE
        deadline = time.monotonic() + patience
        while not launcher.has_exited(hello.endpoint):
            if time.monotonic() > deadline:
                raise launcher.timeout_error(patience)
            await anyio.sleep(0.1)
        return True

    async def aclose(self) -> None:
        """Close all connections.

        Jobs that are listened to are cancelled.
        """
        if self._http:
            await self._http.aclose()
            self._http = None

    # -- the way to the daemon -----------------------------------------------------------------------------------------

    async def _ready(self) -> AsyncGenerator[Endpoint | None]:
        """Yield None while the daemon starts, at last its endpoint."""
        launcher = self._launcher()
        # The lock says that the daemon which proved itself before is alive, and so that nobody else has its port.
        if self._known and launcher.reads(self._known) and launcher.lock_is_held():
            yield self._known
            return
        async with aclosing(launcher.ready()) as starting:
            async for endpoint in starting:
                self._known = endpoint
                yield endpoint

    async def _running(self) -> Endpoint:
        """Return the daemon that runs, draining or not, else start one."""
        if hello := await self._launcher().find():
            return hello.endpoint
        async with aclosing(self._ready()) as starting:
            *_, endpoint = [endpoint async for endpoint in starting]
        assert endpoint
        return endpoint

    async def _ask(self, method: str, path: str, **content: Any) -> Any:
        """Return the JSON answer to one question. Raises UnknownJob or EngineError."""
        import httpx2

        for _ in range(2):
            endpoint = await self._running()
            with suppress(httpx2.TransportError):
                answer = await self._client().request(
                    method, endpoint.url + path, headers=authorization(endpoint), timeout=30, **content
                )
                if answer.status_code == 200:
                    return answer.json()
                if answer.status_code != DRAINING:
                    raise _error(answer.status_code, answer.text)
                await anyio.sleep(0.1)
        raise EngineFailed("The engine went away twice.", hint="Try again, or see `klein-mcp doctor`.")

    async def _stream(self, endpoint: Endpoint, method: str, path: str, **content: Any) -> AsyncGenerator[JobEvent]:
        """Yield a job's events to its last.

        Raises _Lost, _Draining, UnknownJob or EngineError.
        """
        import httpx2

        timeout = httpx2.Timeout(SILENCE, connect=5)
        try:
            async with self._client().stream(
                method, endpoint.url + path, headers=authorization(endpoint), timeout=timeout, **content
            ) as response:
                if response.status_code == DRAINING:
                    raise _Draining
                if response.status_code != 200:
                    await response.aread()
                    raise _error(response.status_code, response.text)
                async for line in response.aiter_lines():
                    event = events.from_json(json.loads(line))
                    yield event
                    if isinstance(event, LAST):
                        return
        except (httpx2.TransportError, ValueError, KeyError, TypeError):
            pass
        raise _Lost

    def _client(self) -> "httpx2.AsyncClient":
        if not self._http:
            import httpx2

            # A proxy has no business between two processes of one machine.
            # As many calls at once as a front end has: the queue says when it is full.
            limits = httpx2.Limits(max_connections=None)
            self._http = httpx2.AsyncClient(trust_env=False, limits=limits)
        return self._http

    def _launcher(self) -> Launcher:
        return Launcher(self._settings, self._client(), self._build, self._command)


def _body(request: ImageRequest, client: str, listen: Listen | None, saved: Sequence[SavedImage]) -> dict[str, Any]:
    return {
        "request": request.to_json(),
        "client": client,
        "listen": listen and asdict(listen),
        "saved": [asdict(image) for image in saved],
    }


def _path(job: str) -> str:
    """Return a job's path.

    Raises UnknownJob for a name whose path would be another's, such as watch.
    """
    if not JOB_ID.fullmatch(job):
        raise _error(UNKNOWN, "")
    return f"/jobs/{job}"


def _error(code: int, text: str) -> Exception:
    """Return the error that an unsuccessful answer stands for."""
    if code == UNKNOWN:
        return UnknownJob("There is no such job.")
    if code == REFUSED:
        with suppress(ValueError, KeyError, TypeError):
            return events.error_from_json(json.loads(text))
    return EngineFailed(f"The engine refused the request: {text[:200]}")
