"""The daemon's HTTP face, for the doors of one user: hello, status, run, drain, stop."""

import asyncio
import contextlib
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from engine.contract import EngineError, Event, Job, Painting
from klein_mcp.daemon import wire
from klein_mcp.daemon.address import Address, Build
from klein_mcp.daemon.queue import Queue

HEARTBEAT = 4.0
"""Seconds after which the latest event is told again: clients give up on a call that is silent for long."""

Endpoint = Callable[[Request], Awaitable[Response]]


class Daemon:
    """State that outlives a request: the queue, who we are, and whether we are leaving."""

    def __init__(self, queue: Queue, address: Address, build: Build, *, about: dict[str, Any]) -> None:
        self.queue = queue
        self.address = address
        self.build = build
        self.about = about
        self.draining = False
        self.leaving = asyncio.Event()

    def drain(self) -> None:
        """Finish what is queued, take nothing more, then leave."""
        self.draining = True

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/hello", self._hello),
                Route("/status", self._let_in(self._status)),
                Route("/run", self._let_in(self._run), methods=["POST"]),
                Route("/drain", self._let_in(self._drain), methods=["POST"]),
                Route("/stop", self._let_in(self._stop), methods=["POST"]),
            ]
        )

    def _let_in(self, endpoint: Endpoint) -> Endpoint:
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
        return JSONResponse({**self.about, "draining": self.draining, **self.queue.status()})

    async def _drain(self, request: Request) -> Response:
        self.drain()
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
        client = request.headers.get("x-klein-client", "")
        return StreamingResponse(self._events(job, client), media_type="application/octet-stream")

    async def _events(self, job: Job, client: str) -> AsyncIterator[bytes]:
        """Frames until the picture or an error; hanging up closes this generator and so cancels the job."""
        loop, told = asyncio.get_running_loop(), asyncio.Queue[Event | EngineError]()

        def tell(event: Event | EngineError) -> None:
            loop.call_soon_threadsafe(told.put_nowait, event)

        try:
            ticket = self.queue.put(job, client, tell)
        except EngineError as problem:
            yield wire.encode(problem)
            return
        try:
            latest = None
            while not isinstance(latest, Painting | EngineError):
                with contextlib.suppress(TimeoutError):
                    latest = await asyncio.wait_for(told.get(), HEARTBEAT)
                if latest is not None:
                    yield wire.encode(latest)
        finally:
            self.queue.cancel(ticket)
