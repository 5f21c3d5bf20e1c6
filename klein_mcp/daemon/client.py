"""Paints in the daemon: finds or starts it, posts the job, passes its events on."""

import logging
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import anyio

from engine.contract import EngineError, EngineFailed, Event, InvalidJob, Job, Loading, Result
from klein_mcp.daemon.endpoint import LAST_STEP, BuildInfo, Endpoint
from klein_mcp.daemon.launch import DAEMON, Launcher, authorization
from klein_mcp.jobs.backend import UnknownJob
from klein_mcp.settings import Settings

if TYPE_CHECKING:
    import httpx2

log = logging.getLogger(__name__)

PATIENCE = 10.0
"""Seconds for an engine that is starting, ending or hanging to be asked to end."""


class _Lost(Exception):
    """The daemon went away, or was about to, before it answered."""


class DaemonBackend:
    """The Backend of every door. One per process; its connections close with it."""

    def __init__(self, settings: Settings, command: Sequence[str] = DAEMON) -> None:
        self._settings = settings
        self._command = command
        # Of the code this process has loaded; read later, it would be that of an upgrade made meanwhile.
        self._build = BuildInfo.read()
        self._http: httpx2.AsyncClient | None = None

    async def run(self, job: Job, *, client: str) -> AsyncGenerator[Event]:
        """Events as they happen, the last one a Painting. Closing the iterator cancels the job. Raises EngineError."""
        for _ in range(2):  # a job is pure: after a crash, painting it again gives the same picture
            address = None
            async with aclosing(self._launcher().ready()) as waiting:
                async for address in waiting:
                    if not address:
                        yield Loading(job.model, 0.0)
            assert address
            try:
                async with aclosing(self._events(address, job, client)) as events:
                    async for event in events:
                        yield event
                return
            except _Lost:
                log.warning("the engine went away in the middle of a picture")
        raise EngineFailed(
            "The engine crashed twice on this picture.", hint="Try a smaller size; see `klein-mcp doctor`."
        )

    async def keep(self, order: Mapping[str, Any], *, client: str, made: Mapping[str, Any] | None = None) -> str:
        """As Backend.keep."""
        answer = await self._ask("POST", "/keep", json={"order": order, "client": client, "made": made})
        if answer.status_code != 200:
            raise EngineFailed(f"The engine did not take the order: {answer.text[:200]}")
        return answer.json()["job"]

    async def kept(self, job: str) -> dict[str, Any]:
        """As Backend.kept."""
        answer = await self._ask("GET", f"/kept/{quote(job, safe='')}")
        if answer.status_code == 404:
            raise UnknownJob(job)
        return answer.json()

    async def status(self) -> dict[str, Any]:
        """{"running": False} where no daemon is, with "silent": True where one does not answer; never starts one."""
        import httpx2

        launcher = self._launcher()
        hello = await launcher.find()
        if not hello:
            return {"running": False, **({"silent": True} if launcher.alive() else {})}
        try:
            answer = await self._client().get(f"{hello.address.url}/status", headers=authorization(hello.address))
            return {"running": True, **answer.json()}
        except (httpx2.HTTPError, ValueError):
            return {"running": False}

    async def stop(self) -> bool:
        """End the daemon and wait until it is gone; whether there was one. Raises EngineFailed if it does not go."""
        import httpx2

        launcher, deadline = self._launcher(), time.monotonic() + PATIENCE
        while not (hello := await launcher.find()):
            if not launcher.alive():
                return False
            if time.monotonic() > deadline:
                raise launcher.silent(PATIENCE)
            await anyio.sleep(0.1)  # it is starting, and answers in a moment, or ending, and is gone in a moment
        with suppress(httpx2.HTTPError):  # it is ending already, or hangs: seen below
            await self._client().post(f"{hello.address.url}/stop", headers=authorization(hello.address))
        patience = LAST_STEP + PATIENCE
        deadline = time.monotonic() + patience
        while not launcher.gone(hello.address):
            if time.monotonic() > deadline:
                raise launcher.silent(patience)
            await anyio.sleep(0.1)
        return True

    async def _ask(self, method: str, path: str, **content: Any) -> "httpx2.Response":
        """A question to whichever daemon runs, one that is being replaced too; without one, to a new one."""
        import httpx2

        for _ in range(2):
            hello = await self._launcher().find()
            address = hello.address if hello else await self._started()
            with suppress(httpx2.TransportError):
                return await self._client().request(
                    method, address.url + path, headers=authorization(address), timeout=30, **content
                )
        raise EngineFailed("The engine went away twice.", hint="Try again, or see `klein-mcp doctor`.")

    async def _started(self) -> Endpoint:
        async with aclosing(self._launcher().ready()) as waiting:
            *_, address = [address async for address in waiting]
        assert address
        return address

    async def aclose(self) -> None:
        if self._http:
            await self._http.aclose()
            self._http = None

    async def _events(self, address: Endpoint, job: Job, client: str) -> AsyncGenerator[Event]:
        """Raises _Lost, EngineError."""
        import httpx2

        from klein_mcp.daemon import wire

        headers = {**authorization(address), "x-klein-client": client}
        # Silent for a minute means dead: the daemon tells the latest event again every second.
        timeout = httpx2.Timeout(60, connect=5)
        try:
            content = wire.encode(job)
        except wire.BadFrame as problem:
            raise InvalidJob(f"The references are too large together: {problem}", hint="Send smaller ones.") from None
        try:
            async with self._client().stream(
                "POST", f"{address.url}/run", content=content, headers=headers, timeout=timeout
            ) as response:
                if response.status_code == 503:
                    raise _Lost
                if response.status_code != 200:
                    await response.aread()
                    raise EngineFailed(f"The engine refused the job: {response.text[:200]}")
                frames = wire.Frames()
                async for chunk in response.aiter_raw():
                    for frame in frames.feed(chunk):
                        event = wire.decode(frame)
                        if isinstance(event, EngineError):
                            raise event
                        yield event  # type: ignore[misc]
                        if isinstance(event, Result):
                            return
        except (httpx2.TransportError, wire.BadFrame):
            pass
        raise _Lost

    def _client(self) -> "httpx2.AsyncClient":
        if not self._http:
            import httpx2

            # A proxy has no business between two processes of one machine.
            # As many calls at once as a door has: the queue says when it is full.
            limits = httpx2.Limits(max_connections=None)
            self._http = httpx2.AsyncClient(trust_env=False, limits=limits)
        return self._http

    def _launcher(self) -> Launcher:
        return Launcher(self._settings, self._client(), self._build, self._command)
