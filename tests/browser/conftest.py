"""A real browser, and the studio it looks at: the real program on the embedded model."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from mcp import Client
from mcp.client.extension import advertise
from mcp.server.apps import APP_MIME_TYPE, EXTENSION_ID

from klein_mcp.images.library import Store
from tests.browser import node_packages
from tests.browser.host import Host, Mount
from tests.browser.static_server import serve_files
from tests.real_server import RealServer

# The driver is a node process of its own; nothing is downloaded, the browser is the distribution's.
playwright = pytest.importorskip("playwright.async_api", reason="needs playwright")

HERE = Path(__file__).parent
APP_URI = "ui://klein/studio.html"
APPS = advertise(EXTENSION_ID, {"mimeTypes": [APP_MIME_TYPE]})
HOST_PAGE = '<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,"><script src="/host.js"></script>'

HARMLESS = ("can escape its sandboxing", "ResizeObserver loop")
"""Console messages about the sandbox that the test host makes, not about the page."""

WAIT = 90_000
"""Milliseconds: an engine that starts on a busy machine is slow, not wrong."""

Open = Callable[..., Awaitable[Any]]
"""The type of `open_page`."""


@dataclass
class Watched:
    """A page, and everything about it that must not happen.

    allowed: words of console errors that a test provokes. also: a second origin of the page's own.
    """

    page: Any
    origin: str
    errors: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    allowed: tuple[str, ...] = ()
    also: str = ""

    def __post_init__(self) -> None:
        self.page.set_default_timeout(WAIT)
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._request)

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning") and not any(words in message.text for words in HARMLESS):
            self.errors.append(message.text)

    def _request(self, request: Any) -> None:
        url = urlsplit(request.url)
        if url.scheme not in ("data", "about") and f"{url.scheme}://{url.netloc}" not in (self.origin, self.also):
            self.foreign.append(request.url)

    def check(self) -> None:
        assert not self.foreign, self.foreign
        unexpected = [error for error in self.errors if not any(words in error for words in self.allowed)]
        assert not unexpected, unexpected


@dataclass
class Studio:
    """`klein-mcp studio`, running. folder: where it was started, and so where it may save."""

    server: RealServer
    folder: Path
    process: "subprocess.Popen[str]"
    link: str

    @property
    def origin(self) -> str:
        url = urlsplit(self.link)
        return f"{url.scheme}://{url.netloc}"

    @contextmanager
    def library(self) -> Iterator[Store]:
        store = Store(self.server.home / "library")
        try:
            yield store
        finally:
            store.close()


@contextmanager
def running_studio(server: RealServer) -> Iterator[Studio]:
    """Start `klein-mcp studio --no-browser` in a folder below the home, where saving is allowed."""
    with tempfile.TemporaryDirectory(dir=Path.home(), prefix="klein-studio-test-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-m", "klein_mcp", "studio", "--no-browser"],
            env=server.environment(PYTHONPATH=str(Path(__file__).parents[2])),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout
        try:
            link = process.stdout.readline().strip()
            assert link.startswith("http://127.0.0.1:"), f"the studio ended with {process.poll()}: {link}"
            yield Studio(server, Path(folder), process, link)
        finally:
            process.terminate()
            process.wait(30)
            process.stdout.close()


@contextmanager
def slow_engine(server: RealServer) -> Iterator[None]:
    """Let the engine's process run for a tenth of the time only: nano takes 0.2 s for an image."""
    pid = json.loads((server.home / "daemon.json").read_text())["pid"]
    over = threading.Event()

    def work() -> None:
        while not over.wait(0.02):
            os.kill(pid, signal.SIGSTOP)
            over.wait(0.2)
            os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """One event loop for all tests here: the browser belongs to it."""
    return "asyncio"


@pytest.fixture(scope="session")
def chromium() -> str:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs chromium: apt-get install chromium")
    return path


@pytest.fixture(scope="session")
async def browser(chromium: str, anyio_backend: str) -> AsyncIterator[Any]:
    async with playwright.async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        await browser.close()


@pytest.fixture(scope="session")
def studio(server: RealServer) -> Iterator[Studio]:
    with running_studio(server) as studio:
        yield studio


@pytest.fixture(scope="session")
async def signed_in(browser: Any, studio: Studio) -> Any:
    """Cookies of a browser that came by the link."""
    context = await browser.new_context()
    page = await context.new_page()
    await page.goto(studio.link)
    await page.wait_for_url(f"{studio.origin}/studio")
    state = await context.storage_state()
    await context.close()
    return state


@pytest.fixture
async def open_page(browser: Any, studio: Studio, signed_in: Any) -> AsyncIterator[Open]:
    """open_page(width=…, …): a tab of a browser that is signed in. Checked when the test ends."""
    opened: list[Watched] = []

    async def open_page(width: int = 1440, height: int = 900, allowed: tuple[str, ...] = (), **options: Any) -> Any:
        size = {"width": width, "height": height}
        context = await browser.new_context(storage_state=signed_in, viewport=size, **options)
        watched = Watched(await context.new_page(), studio.origin, allowed=allowed)
        opened.append(watched)
        await watched.page.goto(f"{studio.origin}/studio")
        await watched.page.wait_for_selector("#prompt")
        return watched.page

    yield open_page
    for watched in opened:
        await watched.page.context.close()
    for watched in opened:
        watched.check()


@pytest.fixture(scope="session")
def npm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the npm packages. KLEIN_TEST_NODE names one that is kept between runs."""
    return node_packages.install(tmp_path_factory.mktemp("npm"))


@pytest.fixture(scope="session")
def axe(npm: Path) -> str:
    return (npm / "node_modules" / "axe-core" / "axe.min.js").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def origins(npm: Path) -> Iterator[tuple[str, str]]:
    """The host's page and its sandbox, on two origins."""
    script = node_packages.bundle_host(npm)
    sandbox = (HERE / "sandbox.html").read_text(encoding="utf-8")
    with (
        serve_files({"/host.html": HOST_PAGE, "/host.js": script}, "127.0.0.1") as host,
        serve_files({"/sandbox.html": sandbox}, "localhost") as inner,
    ):
        yield host, inner


@pytest.fixture
async def mount(browser: Any, origins: tuple[str, str], server: RealServer) -> AsyncIterator[Mount]:
    """mount(tool=…, policy=…, …): a host with the page mounted for a call of that tool. Checked afterwards."""
    watched: list[Watched] = []

    @asynccontextmanager
    async def mount(
        tool: str = "generate_image",
        policy: str = "claude",
        opaque: bool = False,
        resources: bool = True,
        tools: bool = True,
        width: int = 720,
        environment: dict[str, str] | None = None,
        allowed: tuple[str, ...] = (),
        **context: Any,
    ) -> AsyncIterator[Host]:
        host_origin, sandbox = origins
        async with Client(server.stdio(**(environment or {})), extensions=[APPS]) as client:
            window = await browser.new_context(viewport={"width": width + 32, "height": 1000})
            page = await window.new_page()
            seen = Watched(page, host_origin, allowed=allowed, also=sandbox)
            watched.append(seen)
            host = Host(page, client)
            await page.expose_function("serverRequest", host.request)
            await page.expose_function("serverCancel", host.cancel)
            await page.goto(f"{host_origin}/host.html")
            (html,) = (await client.read_resource(APP_URI)).contents
            (listed,) = [each for each in (await client.list_tools()).tools if each.name == tool]
            info = {"tool": listed.model_dump(mode="json", by_alias=True, exclude_none=True)}
            inline = {"displayMode": "inline", "availableDisplayModes": ["inline", "fullscreen"]}
            able = {"serverResources": {}} if resources else {}
            able |= {"serverTools": {}} if tools else {}
            options = {
                "sandbox": sandbox,
                "html": html.text,  # type: ignore[union-attr] - a page is text
                "policy": policy,
                "opaque": opaque,
                "width": width,
                "capabilities": {**able, "downloadFile": {}},
                "context": {"theme": "light", "toolInfo": info, **inline, **context},
            }
            await page.evaluate("(options) => mount(options)", options)
            yield host
            await window.close()

    yield mount
    for each in watched:
        each.check()
