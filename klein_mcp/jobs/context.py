"""Who calls a tool, and how to reach them while they wait."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path


async def _silence(done: float, total: float, message: str) -> None:
    """For a caller that wants no progress."""


async def _no_roots() -> tuple[Path, ...] | None:
    """For a client that offers none."""
    return None


async def _nobody(uri: str) -> None:
    """For a caller to whom no picture is announced."""


@dataclass(frozen=True, slots=True)
class CallContext:
    """One tool call's caller.

    client: whose turn it is in the queue and whose `last` is meant: one stdio door, one HTTP session, or one token.
    name: what the client calls itself, "" where it does not say.
    tell: progress, as (done, total, message).
    roots: the folders the client works in, None where it does not say.
    painted: announces a new picture's address to whoever listens.
    link: makes the address under which a picture can be downloaded; None where the client shares our disk.
    """

    client: str
    name: str = ""
    tell: Callable[[float, float, str], Awaitable[None]] = _silence
    roots: Callable[[], Awaitable[tuple[Path, ...] | None]] = _no_roots
    painted: Callable[[str], Awaitable[None]] = _nobody
    link: Callable[[str], str] | None = None
