"""Wait for conditions, so that a slow machine is no failure."""

import time
from collections.abc import Callable
from typing import Any

import anyio


async def until(condition: Callable[[], Any], seconds: float = 120.0) -> None:
    """Wait until a condition holds, beside other tasks."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s"
        await anyio.sleep(0.01)


def wait_until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    """Wait until a condition holds, in a thread of one's own."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s"
        time.sleep(0.01)
