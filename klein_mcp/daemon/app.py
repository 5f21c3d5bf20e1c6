"""The daemon's HTTP face, for the doors of one user: hello, status, run, keep, kept, drain, stop."""

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from engine.contract import EngineError, Job
from klein_mcp.daemon import wire
from klein_mcp.daemon.endpoint import BuildInfo, Endpoint
from klein_mcp.daemon.executors.local import LocalBackend
from klein_mcp.jobs.backend import UnknownJob
from klein_mcp.jobs.manager import JobManager
from klein_mcp.jobs.queue import Queue

Handler = Callable[[Request], Awaitable[Response]]


class Daemon:
    """State that outlives a request: the queue, the orders handed over, who we are, and whether we are leaving."""

    def __init__(
        self, queue: Queue, kept: JobManager, address: Endpoint, build: BuildInfo, *, about: dict[str, Any]
    ) -> None:
        self.queue = queue
        self.kept = kept
        self.address = address
        self.build = build
        self.about = about
        self.draining = False
        self.leaving = asyncio.Event()
        self._backend = LocalBackend(queue)

    @property
    def idle_seconds(self) -> float:
        return 0.0 if self.kept.busy else self.queue.idle_seconds

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/hello", self._hello),
                Route("/status", self._let_in(self._status)),
                Route("/run", self._let_in(self._run), methods=["POST"]),
                Route("/keep", self._let_in(self._keep), methods=["POST"]),
                Route("/kept/{job}", self._let_in(self._kept)),
                Route("/drain", self._let_in(self._drain), methods=["POST"]),
                Route("/stop", self._let_in(self._stop), methods=["POST"]),
            ]
        )

    def _let_in(self, endpoint: Handler) -> Handler:
        async def guarded(request: Request) -> Response:
            shown = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(shown.encode(), self.address.token.encode()):
                return JSONResponse({"error": "Wrong or missing token."}, 401)
            return await endpoint(request)

        return guarded

    async def _hello(self, request: Request) -> Response:
        """Before a door shows its token, we show that we hold it too."""
        proof = self.address.proof(request.query_params.get("nonce", ""))
        return JSONResponse({"proof": proof, "draining": self.draining, "build": asdict(self.build)})

    async def _status(self, request: Request) -> Response:
        # The engine looks into model folders; on a slow disk that must not hold up the progress of every job.
        state = await asyncio.to_thread(self.queue.status)
        return JSONResponse({**self.about, "draining": self.draining, **state})

    async def _drain(self, request: Request) -> Response:
        """Finish what is queued, take nothing more, then leave."""
        self.draining = True
        return JSONResponse({"draining": True})

    async def _stop(self, request: Request) -> Response:
        self.draining = True
        self.leaving.set()
        return JSONResponse({"stopping": True})

    async def _run(self, request: Request) -> Response:
        if self.draining:
            return JSONResponse({"error": "This engine is being replaced."}, 503)
        try:
            job = wire.decode(await request.body())
        except wire.BadFrame as problem:
            return JSONResponse({"error": str(problem)}, 400)
        if not isinstance(job, Job):
            return JSONResponse({"error": "Only a Job can be run."}, 400)
        if self.draining:  # since the body began to arrive
            return JSONResponse({"error": "This engine is being replaced."}, 503)
        client = request.headers.get("x-klein-client", "")
        return StreamingResponse(self._frames(job, client), media_type="application/octet-stream")

    async def _frames(self, job: Job, client: str) -> AsyncIterator[bytes]:
        """Until the picture or an error; hanging up closes this generator and so cancels the job."""
        try:
            async with aclosing(self._backend.run(job, client=client)) as events:
                async for event in events:
                    yield wire.encode(event)
        except EngineError as problem:
            yield wire.encode(problem)

    async def _keep(self, request: Request) -> Response:
        try:
            asked = json.loads(await request.body())
            job = await self.kept.take(asked["order"], client=asked["client"], made=asked["made"])
        except (ValueError, KeyError, TypeError) as problem:
            return JSONResponse({"error": f"Not an order: {problem}"}, 400)
        except OSError as problem:
            return JSONResponse({"error": f"The order cannot be written down: {problem}"}, 507)
        return JSONResponse({"job": job})

    async def _kept(self, request: Request) -> Response:
        try:
            return JSONResponse(await self.kept.state(request.path_params["job"]))
        except UnknownJob:
            return JSONResponse({"error": "There is no such job."}, 404)
