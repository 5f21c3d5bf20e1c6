"""Engines on other machines, honest ones and liars, for tests."""

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from engine.contract import (
    Job,
    KeepSource,
    Result,
    Step,
    image_hash,
)
from klein_mcp.daemon import wire
from klein_mcp.daemon.endpoint import BuildInfo, proof
from klein_mcp.daemon.engine_server import EngineServer
from klein_mcp.daemon.executors.remote import RemoteExecutor
from klein_mcp.jobs.queue import Queue
from klein_mcp.web_server import WebServer
from tests.fakes import FakeExecutor
from tests.waiting import wait_until

TOKEN = "a token of these tests"
BUILD = BuildInfo("1.0", "same", 0)
EDIT = Job("edit", (np.full((64, 48, 3), 7, np.uint8),), size=KeepSource(), seed=3, affinity="auto k7f3q2")


@contextmanager
def listening(app: Starlette, bound: socket.socket | None = None, **options: Any) -> Iterator[str]:
    """Serve `app` on a bound socket, else on any free port, and yield its address."""
    listener = bound or socket.create_server(("127.0.0.1", 0))
    server = WebServer(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1, **options)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.end()
        thread.join(20)


class Machine:
    """One engine with its server."""

    def __init__(self, build: BuildInfo = BUILD, token: str = TOKEN, size: int = 32) -> None:
        self.executor = FakeExecutor()
        self.queue = Queue(lambda: self.executor, size=size, keep_alive=600)
        self.server = EngineServer(self.queue, token, build)
        self.app = self.server.app()
        self.url = ""

    @property
    def jobs(self) -> list[Job]:
        return self.executor.jobs


@contextmanager
def machines(*each: Machine) -> Iterator[RemoteExecutor]:
    with ExitStack() as stack:
        for machine in each:
            machine.url = stack.enter_context(listening(machine.app))
            stack.callback(machine.queue.close, 10)
            stack.callback(machine.executor.hurry)
        yield RemoteExecutor([machine.url for machine in each], TOKEN, BUILD)


def run(executor: RemoteExecutor, job: Job) -> Result:
    *_, result = executor.run(job)
    assert isinstance(result, Result)
    return result


def known(job: Job) -> Job:
    return replace(job, hashes=tuple(map(image_hash, job.references)))


RESULT = Result(np.zeros((64, 48, 3), np.uint8), 3, "fake", "f", 4, 1.0)
LIES: dict[str, Callable[[], Iterator[bytes]]] = {
    "garbage": lambda: iter([b"\xff" * 100]),
    "endless": lambda: endless(),
    "huge frame": lambda: iter([struct.pack("!II", 10, 400_000_000)]),
    "other size": lambda: iter([wire.encode(replace(RESULT, image=np.zeros((8, 8, 3), np.uint8)))]),
    "other seed": lambda: iter([wire.encode(replace(RESULT, seed=4))]),
    "a job": lambda: iter([wire.encode(Job("mine"))]),
    "nothing": lambda: iter([]),
}


def nested() -> Iterator[bytes]:
    while True:
        yield b"[" * 65536


def endless() -> Iterator[bytes]:
    frame = wire.encode(Step(1, 4)) * 1000
    while True:
        yield frame


def liar(lie: Callable[[], Iterator[bytes]], token: str, build: BuildInfo, about: Any = None) -> Starlette:
    """An engine that holds the token, answers each job with `lie` and says `about` itself."""

    async def hello(request: Request) -> Response:
        answer = {"proof": proof(token, request.query_params["nonce"]), "build": asdict(build)}
        return JSONResponse(answer)

    async def run(request: Request) -> Response:
        await request.body()
        return StreamingResponse(lie())

    async def status(request: Request) -> Response:
        return JSONResponse({"queue": {"waiting": 0}, **(about or {})})

    return Starlette(routes=[Route("/hello", hello), Route("/run", run, methods=["POST"]), Route("/status", status)])
