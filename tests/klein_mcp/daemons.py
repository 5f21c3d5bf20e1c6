"""Front ends of a data folder, and the processes that hold its engine."""

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

from klein_mcp.daemon.client import DaemonClient
from klein_mcp.jobs.events import Failed, JobEvent, Progressed
from klein_mcp.jobs.request import generate
from klein_mcp.settings import Settings
from tests.klein_mcp.fake_daemon import COMMAND
from tests.waiting import until


@asynccontextmanager
async def connection(home: Path, **settings: Any) -> AsyncIterator[DaemonClient]:
    """Open a front end of a data folder whose engine is a fake."""
    front_end = DaemonClient(Settings(home=home, **settings), COMMAND)
    try:
        yield front_end
    finally:
        await front_end.aclose()


async def run(front_end: DaemonClient, prompt: str = "a", *, client: str = "me", **more: Any) -> list[JobEvent]:
    """All events of one job. Raises what it failed with."""
    events: list[JobEvent] = []
    async with aclosing(front_end.run(generate(prompt, **more), client=client)) as stream:
        async for event in stream:
            if isinstance(event, Failed):
                raise event.error
            events.append(event)
    return events


def inner(event: JobEvent) -> Any:
    """Return the engine's event inside a job's, or the job's own."""
    return event.event if isinstance(event, Progressed) else event


async def gone(home: Path) -> None:
    """Wait until no process holds an engine for this data folder."""
    await until(lambda: not daemons(home))


def daemons(home: Path) -> list[int]:
    """Processes that hold an engine for this data folder, zombies not counted."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            environ = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if any(word.endswith(b"_daemon") for word in words) and f"KLEIN_HOME={home}".encode() in environ:
            found.append(int(folder.name))
    return found
