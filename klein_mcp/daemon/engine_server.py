"""`klein-mcp engine`: serves this machine's engine to daemons on other machines."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from typing import Protocol

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from engine.contract import EngineError, Event, Job, NodeStatus, Result, Rgb8, image_hash
from klein_mcp.daemon import wire
from klein_mcp.daemon.bearer import Handler, authorized
from klein_mcp.daemon.endpoint import BuildInfo, proof
from klein_mcp.images.cache import ImageCache
from klein_mcp.jobs.queue import Queue
from klein_mcp.jobs.turns import Ticket

HEARTBEAT = 1.0
"""Seconds after which the latest event is sent again, so that a daemon can count on waking up."""

HELD = 512_000_000
"""Bytes of references that are kept, so that a daemon need not send them again: 170 images of 1024²."""

INCLUDED = "x-klein-included"
"""Header: positions of the references that the frame holds, such as 0,2. The others are named by their hashes."""

BUILD = "x-klein-build"
"""Header: fingerprint of the daemon's build. Another build would paint other bytes."""

OTHER_BUILD = 412
"""Status code: the daemon is of another build."""

MISSING = 409
"""Status code: some of the references that were not sent are not held here either."""


class Peers(Protocol):
    """Engines behind the same address."""

    async def count(self) -> int:
        """Return how many there are, this one included."""
        ...

    async def describe(self) -> "list[NodeStatus]":
        """Describe each of them."""
        ...


class EngineServer:
    """One engine's HTTP interface: hello, status and run."""

    def __init__(self, queue: Queue, token: str, build: BuildInfo, peers: Peers | None = None) -> None:
        self._queue = queue
        self._token = token
        self._build = build
        self._peers = peers
        self._held = ImageCache[Rgb8](HELD, lambda image: image.nbytes)

    def app(self) -> Starlette:
        """Build the ASGI application."""
        return Starlette(
            routes=[
                Route("/hello", self._hello),
                Route("/status", self._authorized(self._status)),
                Route("/run", self._authorized(self._run), methods=["POST"]),
            ]
        )

    def describe(self, name: str) -> NodeStatus:
        """Describe this engine under `name`. Waits for no job."""
        queue = self._queue.status()
        node = NodeStatus(name, running=int(queue.running), waiting=queue.waiting)
        engine = self._queue.engine_status()
        return node.with_engine(engine) if engine else node

    def _authorized(self, handler: Handler) -> Handler:
        return authorized(self._token, handler)

    async def _hello(self, request: Request) -> Response:
        """Prove that we hold the token before a daemon shows it."""
        answer = proof(self._token, request.query_params.get("nonce", ""))
        engines = {"engines": await self._peers.count()} if self._peers else {}
        return JSONResponse({"proof": answer, "build": asdict(self._build), **engines})

    async def _status(self, request: Request) -> Response:
        engine = await asyncio.to_thread(self._queue.engine_status)
        nodes = {"nodes": [asdict(node) for node in await self._peers.describe()]} if self._peers else {}
        return JSONResponse({"queue": asdict(self._queue.status()), "engine": engine and engine.to_json(), **nodes})

    async def _run(self, request: Request) -> Response:
        body = await request.body()
        if request.headers.get(BUILD) != self._build.fingerprint:
            return JSONResponse({"error": f"This engine is another build, {self._build.name}."}, OTHER_BUILD)
        try:
            job = wire.decode(body)
            if not isinstance(job, Job):
                raise wire.BadFrame("Only a Job can be run.")
            job, missing = self._complete(job, request.headers.get(INCLUDED))
        except (wire.BadFrame, ValueError, IndexError) as exc:
            return JSONResponse({"error": str(exc)}, 400)
        if missing:
            return JSONResponse({"missing": missing}, MISSING)
        stream = self._frames(job, request.headers.get("x-klein-daemon", ""))
        return StreamingResponse(stream, media_type="application/octet-stream")

    def _hold(self, image: Rgb8) -> str:
        """Keep an image, and return its hash."""
        name = image_hash(image)  # never the sender's word for it
        self._held.add(name, image)
        return name

    def _complete(self, job: Job, included: str | None) -> tuple[Job, list[str]]:
        """Add the references that are held here.

        Return the hashes of those that are not.
        """
        sent = [(image, self._hold(image)) for image in job.references]
        if included is None:
            return replace(job, hashes=tuple(name for _, name in sent)), []
        places = dict(zip([int(word) for word in included.split(",") if word], sent, strict=True))
        found = [places.get(i, (self._held.get(name), name)) for i, name in enumerate(job.hashes)]
        missing = [name for image, name in found if image is None]
        images = tuple(image for image, _ in found if image is not None)
        return replace(job, references=images, hashes=tuple(name for _, name in found)), missing

    async def _frames(self, job: Job, daemon: str) -> AsyncIterator[bytes]:
        """Yield events until the result or an error.

        A daemon that disconnects closes this, which cancels the job.
        """
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[Event | EngineError] = asyncio.Queue()
        ticket: Ticket | None = None

        def tell(event: Event | EngineError) -> None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(inbox.put_nowait, event)

        try:
            ticket = self._queue.put(job, daemon, tell, watched=True)
            latest: Event | EngineError | None = None
            while not isinstance(latest, Result | EngineError):
                try:
                    latest = await asyncio.wait_for(inbox.get(), HEARTBEAT)
                except TimeoutError:
                    if latest is None:
                        continue
                if isinstance(latest, Result):
                    self._hold(latest.image)  # the next edit is of this one
                    self._queue.prefetch(latest.image)
                yield wire.encode(latest)
        except EngineError as exc:
            yield wire.encode(exc)
        finally:
            if ticket:
                self._queue.cancel(ticket)
