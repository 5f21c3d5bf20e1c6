"""Calls of megabytes: others are served meanwhile, and the call gets an answer."""

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from tests.klein_mcp.front_ends import serving
from tests.klein_mcp.test_faults import typed
from tests.real_server import PATIENCE, RealServer

pytestmark = pytest.mark.anyio

SLOWEST = 5.0
"""Seconds that another request may take; observed: 0.3, and 1.4 on a machine with a load of 6."""

HEADERS = {"accept": "application/json, text/event-stream", "content-type": "application/json"}
HELLO = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "large", "version": "1"}}
EDIT = {"image": "last", "prompt": "make it green"}

CALLS: dict[str, tuple[str, Any]] = {
    "350,000 unknown arguments": ("generate_image", {str(number): 1 for number in range(350_000)}),
    "a name of 4 MB": ("x" * 4_000_000, {}),
    "a million numbers": ("edit_image", {**EDIT, "region": [1] * 1_000_000}),
    "a million numbers as text": ("edit_image", {**EDIT, "region": "1," * 1_900_000}),
    "a million prompts": ("edit_image", {**EDIT, "prompt": ["a"] * 700_000}),
    "a million objects": ("compose_references", {"prompt": "a", "images": [{}] * 900_000}),
    "a path of two million folders": ("edit_image", {**EDIT, "image": "/" + "a/" * 1_900_000}),
}


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def url(server: RealServer) -> Iterator[str]:
    with serving(server) as url:
        yield url


def message(method: str, params: dict[str, Any], number: int = 1) -> bytes:
    body = {"jsonrpc": "2.0", "id": number, "method": method, "params": params}
    return json.dumps(body, separators=(",", ":")).encode()


@pytest.mark.parametrize("what", CALLS)
async def test_health_check_is_answered_during_a_large_call(url: str, what: str):
    name, arguments = CALLS[what]
    async with httpx2.AsyncClient(timeout=PATIENCE, headers=HEADERS) as http:
        hello = await http.post(f"{url}/mcp", content=message("initialize", HELLO))
        session = {"mcp-session-id": hello.headers["mcp-session-id"]}
        body = message("tools/call", {"name": name, "arguments": arguments})
        large = asyncio.create_task(http.post(f"{url}/mcp", content=body, headers=session))
        slowest = 0.0
        while not large.done():
            started = time.monotonic()
            assert (await http.get(f"{url}/healthz")).status_code == 200
            slowest = max(slowest, time.monotonic() - started)
            await asyncio.sleep(0.005)
        answer = (await large).text
    assert '"isError":true' in answer
    assert len(answer) < 1500
    assert slowest < SLOWEST


def test_ping_behind_large_calls_is_answered_over_stdio(server: RealServer):
    with typed(server) as client:
        client.shake_hands()
        started = time.monotonic()
        for name, arguments in (CALLS["350,000 unknown arguments"], CALLS["a name of 4 MB"]):
            client.line(message("tools/call", {"name": name, "arguments": arguments}, number=5))
        client.send("ping", id=9)
        client.hear(lambda answer: answer.get("id") == 9)
        # The ping waits behind both. Observed: 2, and 4 on a machine with a load of 6.
        assert time.monotonic() - started < 4 * SLOWEST
