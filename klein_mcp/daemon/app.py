"""The daemon's HTTP interface for the front ends of one user.

The job API, hello, status, drain, stop.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import asdict, replace
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from engine.contract import EngineError
from klein_mcp.daemon.bearer import Handler, authorized
from klein_mcp.daemon.endpoint import DRAINING, INSTALLED, REFUSED, UNKNOWN, BuildInfo, Endpoint
from klein_mcp.jobs import events, status
from klein_mcp.jobs.api import UnknownJob
from klein_mcp.jobs.events import JobEvent, Listen
from klein_mcp.jobs.manager import JobManager
from klein_mcp.jobs.request import ImageRequest
from klein_mcp.jobs.results import SavedImage
from klein_mcp.jobs.status import DaemonStatus


class Daemon:
    """State that outlives a request.

    The jobs, who we are, and whether we are leaving.
    """

    def __init__(self, jobs: JobManager, endpoint: Endpoint, build: BuildInfo, about: DaemonStatus) -> None:
        """about: what every status repeats."""
        self.jobs = jobs
        self.endpoint = endpoint
        self.build = build
        self.about = about
        self.draining = False
        """Whether it takes no more jobs and ends once those it has are over."""
        self.stopping = False
        """Whether it ends at once."""
        self.changed = asyncio.Event()
        """Set when one of the two changes."""

    def drain(self) -> None:
        """Take no more jobs, and end after those there are."""
        self.draining = True
        self.changed.set()

    def stop(self) -> None:
        """End at once."""
        self.stopping = True
        self.drain()

    def app(self) -> Starlette:
        """Build the ASGI application."""
        return Starlette(
            routes=[
                Route("/hello", self._hello),
                Route("/status", self._authorized(self._status)),
                Route("/jobs", self._authorized(self._list), methods=["GET"]),
                Route("/jobs", self._authorized(self._submit), methods=["POST"]),
                Route("/jobs/watch", self._authorized(self._watch), methods=["GET"]),
                Route("/jobs/{job}", self._authorized(self._job), methods=["GET"]),
                Route("/jobs/{job}/events", self._authorized(self._events), methods=["GET"]),
                Route("/jobs/{job}/detach", self._authorized(self._detach), methods=["POST"]),
                Route("/jobs/{job}/cancel", self._authorized(self._cancel), methods=["POST"]),
                Route("/drain", self._authorized(self._drain), methods=["POST"]),
                Route("/stop", self._authorized(self._stop), methods=["POST"]),
            ],
            exception_handlers={UnknownJob: _unknown_job, EngineError: _engine_error},
        )

    def _authorized(self, handler: Handler) -> Handler:
        return authorized(self.endpoint.token, handler)

    async def _hello(self, request: Request) -> Response:
        """Prove that we hold the token before a front end shows it."""
        proof = self.endpoint.proof(request.query_params.get("nonce", ""))
        # The folder stands beside the build, which older front ends read whole.
        about = {"draining": self.draining, "build": asdict(self.build), "folder": INSTALLED}
        return JSONResponse({"proof": proof, **about})

    async def _status(self, request: Request) -> Response:
        now = await self.jobs.status()
        state = replace(self.about, draining=self.draining, queue=now.queue, seconds=now.seconds, engine=now.engine)
        return JSONResponse(status.to_json(state))

    async def _drain(self, request: Request) -> Response:
        self.drain()
        return JSONResponse({"draining": True})

    async def _stop(self, request: Request) -> Response:
        self.stop()
        return JSONResponse({"stopping": True})

    async def _submit(self, request: Request) -> Response:
        """Start a job.

        With "listen" its events are the answer, else its id.
        """
        body = await request.body()
        if self.draining:
            return JSONResponse({"error": "This engine is being replaced."}, DRAINING)
        try:
            asked = json.loads(body)
            wanted, client = ImageRequest.from_json(asked["request"]), str(asked["client"])
            listen = Listen(**asked["listen"]) if asked["listen"] is not None else None
            saved = [SavedImage.from_json(image) for image in asked["saved"]]
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as exc:
            return JSONResponse({"error": f"Not a request: {exc}"}, 400)
        if listen is None:
            return JSONResponse({"job": await self.jobs.submit(wanted, client=client)})
        return await _streamed(self.jobs.run(wanted, client=client, listen=listen, saved=saved))

    async def _events(self, request: Request) -> Response:
        try:
            listen = _listen(request.query_params)
        except (ValueError, KeyError, TypeError) as exc:
            return JSONResponse({"error": f"Not a request: {exc}"}, 400)
        return await _streamed(self.jobs.events(request.path_params["job"], listen))

    async def _watch(self, request: Request) -> Response:
        """Answer with a line per event of any job.

        An empty line now and then is a sign of life.
        """

        async def lines() -> AsyncIterator[bytes]:
            async with aclosing(self.jobs.watch()) as changes:
                async for news in changes:
                    if news is None:
                        yield b"\n"
                        continue
                    job, event = news
                    content = {"job": status.to_json(job), "event": event and events.to_json(event)}
                    yield json.dumps(content, separators=(",", ":")).encode() + b"\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    async def _list(self, request: Request) -> Response:
        return JSONResponse([status.to_json(job) for job in await self.jobs.list()])

    async def _job(self, request: Request) -> Response:
        return JSONResponse(status.to_json(await self.jobs.job(request.path_params["job"])))

    async def _detach(self, request: Request) -> Response:
        return JSONResponse(status.to_json(await self.jobs.detach(request.path_params["job"])))

    async def _cancel(self, request: Request) -> Response:
        await self.jobs.cancel(request.path_params["job"])
        return JSONResponse({})


def _listen(asked: Mapping[str, str]) -> Listen:
    """Read how a client listens. Raises KeyError, TypeError or ValueError."""
    if "listen" in asked:
        return Listen(**json.loads(asked["listen"]))
    # A front end of an early build of 0.2 sends these three alone.
    return Listen(int(asked["preview"]), int(asked["each"]), asked["steps"] == "1")


async def _streamed(stream: AsyncGenerator[JobEvent]) -> Response:
    """Answer with one line of JSON per event.

    A client that disconnects closes the stream, and so leaves the job.
    """
    first = await anext(stream, None)  # an error that comes before any event is the answer itself

    async def lines() -> AsyncIterator[bytes]:
        async with aclosing(stream):
            if first:
                yield _line(first)
            async for event in stream:
                yield _line(event)

    return StreamingResponse(lines(), media_type="application/x-ndjson")


def _line(event: JobEvent) -> bytes:
    return json.dumps(events.to_json(event), separators=(",", ":")).encode() + b"\n"


async def _unknown_job(request: Request, exc: Exception) -> Response:
    return JSONResponse({"error": "There is no such job."}, UNKNOWN)


async def _engine_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, EngineError)
    content: dict[str, Any] = events.error_to_json(exc)
    return JSONResponse(content, REFUSED)
