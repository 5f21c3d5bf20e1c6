"""Identifies the caller of a tool, and reaches it while it waits."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path


async def _no_progress(done: float, total: float, message: str) -> None:
    """Ignore progress, for a caller that wants none."""


async def _no_roots() -> tuple[Path, ...] | None:
    """Return no folders, for a client that offers none."""
    return None


def _no_job(job: str) -> None:
    """Ignore which job was started, for a caller that only waits."""


async def _no_announcement(uri: str) -> None:
    """Ignore a new image, for a caller that does not subscribe."""


@dataclass(frozen=True, slots=True)
class CallContext:
    """One tool call's caller.

    client: whose turn it is in the queue and whose `last` is meant: one stdio server, one HTTP session, or one token.
    name: what the client calls itself, "" where it does not say.
    progress: takes (done, total, message).
    roots: the folders the client works in, None where it does not say.
    on_job: takes the id of the job that the call starts.
    on_new_image: takes a new image's address, for whoever subscribed.
    shared: several clients may send as this one, so `last` is not known.
    link: makes the address under which an image can be downloaded; None where the client shares our disk.
    """

    client: str
    name: str = ""
    progress: Callable[[float, float, str], Awaitable[None]] = _no_progress
    roots: Callable[[], Awaitable[tuple[Path, ...] | None]] = _no_roots
    on_job: Callable[[str], None] = _no_job
    on_new_image: Callable[[str], Awaitable[None]] = _no_announcement
    shared: bool = False
    link: Callable[[str], str] | None = None

    @property
    def remote(self) -> bool:
        """Whether the client is on another machine."""
        return self.link is not None
