"""Shared fixtures: settings in a temporary folder, a fake executor, a client connected in memory."""

import os
import signal
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

# Before torch is imported, here and in every process the tests start: several engines with as many threads as cores,
# each spinning while it waits, took twice as long as with one thread each (2 cores: 8m25 against 5 minutes).
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Tests that a script starts with & are born ignoring it, and so would be every process that they interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)

import anyio
import pytest
from mcp import Client

from klein_mcp.jobs.manager import JobManager
from klein_mcp.jobs.queue import Queue
from klein_mcp.jobs.service import Service
from klein_mcp.mcp_server.server import create_server
from klein_mcp.settings import Settings
from tests.fakes import FakeExecutor
from tests.real_server import RealServer, real_server

LONG = (
    "test_terminal",
    "test_examples",
    "test_web_server",
    "test_prompts",
    "test_nano_weights",
    "test_readme",
    "test_cache",
)
"""Files of few and long tests. A worker that began one last would run it alone for a minute."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", hub=tmp_path / "hub", read_roots=(tmp_path,))


@pytest.fixture
def painter() -> Iterator[FakeExecutor]:
    executor = FakeExecutor()
    yield executor
    executor.hurry()


@pytest.fixture
def jobs(settings: Settings, painter: FakeExecutor) -> Iterator[JobManager]:
    """The job API around the fake executor, in this process."""
    queue = Queue(lambda: painter, size=32, keep_alive=600)
    manager = JobManager(settings.home / "jobs", settings.library, queue)
    yield manager
    painter.hurry()
    queue.close(10)
    # In a thread of its own: Playwright leaves a running event loop in the one of the tests.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(anyio.run, manager.aclose).result()


@pytest.fixture
def service(settings: Settings, jobs: JobManager) -> Iterator[Service]:
    service = Service(settings, jobs)
    yield service
    service.close()


@pytest.fixture
def connect(service: Service) -> Any:
    """Return connect(mode="legacy", …): a client of a new front end on the same service."""

    @asynccontextmanager
    async def connect(**options: Any) -> AsyncIterator[Client]:
        async with Client(create_server(service), **options) as client:
            yield client

    return connect


@pytest.fixture
async def client(connect: Any) -> AsyncIterator[Client]:
    async with connect() as client:
        yield client


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    """The real program on the embedded model, one engine for all tests that ask for it."""
    with real_server(tmp_path_factory.mktemp("server")) as started:
        yield started
