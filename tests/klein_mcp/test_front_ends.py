"""The same tools and the same images through every front end, on the real program and the embedded model."""

import json
from collections.abc import Iterator
from typing import Any

import anyio
import pytest
from mcp import Client

from tests.klein_mcp.front_ends import FRONT_ENDS, serving, through
from tests.real_server import PATIENCE, RealServer

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def url(server: RealServer) -> Iterator[str]:
    with serving(server) as url:
        yield url


async def call(client: Client, tool: str, **arguments: Any) -> dict[str, Any]:
    """Return the JSON line, and fail if the image is missing."""
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result.content
    assert [block.type for block in result.content] == ["text", "image", "resource_link"]
    assert result.structured_content is None
    return json.loads(result.content[0].text)  # type: ignore[union-attr]


async def pixels(client: Client, payload: dict[str, Any]) -> bytes:
    """The full image, as any client can get it."""
    (content,) = (await client.read_resource(f"klein://images/{payload['image']}")).contents
    return content.blob.encode()  # type: ignore[union-attr]


def without_names(payload: dict[str, Any]) -> dict[str, Any]:
    """Drop what may depend on the front end: handles, locations, timings."""
    return {
        key: value
        for key, value in payload.items()
        if key not in ("image", "uri", "path", "ms", "parents", "cache", "warnings")
    }


async def paint_all(client: Client) -> list[dict[str, Any]]:
    apple = await call(client, "generate_image", prompt="an apple on a yellow background", seed=7)
    edited = await call(client, "edit_image", image="last", prompt="make the background green", seed=8)
    assert (await call(client, "view_image", image=edited["image"]))["parents"] == [apple["image"]]
    both = [apple["image"], edited["image"]]
    prompt = "the apple from image 1 to the left of the apple from image 2 on a blue background"
    composed = await call(client, "compose_references", images=both, prompt=prompt, seed=9)
    assert (await call(client, "view_image", image=composed["image"]))["parents"] == both
    return [apple, edited, composed]


@pytest.fixture(scope="module", autouse=True)
async def expected(server: RealServer, url: str) -> list[dict[str, Any]]:
    """The expected results. Also warms the engine, so that no test meets the wait budget."""
    async with through("stdio", server, url) as client:
        return [without_names(payload) for payload in await paint_all(client)]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize("front_end", FRONT_ENDS)
async def test_tools_give_the_same_images_through_every_front_end(front_end, server, url, expected):
    async with through(front_end, server, url) as client:
        assert [without_names(payload) for payload in await paint_all(client)] == expected


@pytest.mark.parametrize("front_end", FRONT_ENDS)
async def test_progress_rises_and_names_every_stage(front_end, server, url):
    payload: list[tuple[float, str]] = []

    async def hear(progress: float, total: float | None, message: str | None) -> None:
        payload.append((progress, message or ""))

    async with through(front_end, server, url) as client:
        await client.call_tool("generate_image", {"prompt": "a cat", "seed": 1}, progress_callback=hear)
    shares = [share for share, _ in payload]
    assert shares == sorted(set(shares))
    message = " ".join(message for _, message in payload)
    for part in ("queue", "reading the prompt", "step 1 of 4", "step 4 of 4", "developing", "saving"):
        assert part in message


@pytest.mark.parametrize("front_end", FRONT_ENDS)
async def test_cancelled_call_frees_the_engine(front_end, server, url):
    """Cancels four images of four steps at the first step."""
    async with through(front_end, server, url) as client, through("stdio", server, url) as other:
        begun = anyio.Event()

        async def hear(progress: float, total: float | None, message: str | None) -> None:
            if "step 1" in (message or ""):
                begun.set()

        async with anyio.create_task_group() as tasks:
            large = {"prompt": "a cat", "seed": 1, "width": 512, "height": 512, "count": 4}

            async def paint() -> None:
                await client.call_tool("generate_image", large, progress_callback=hear)

            tasks.start_soon(paint)
            with anyio.fail_after(120):
                await begun.wait()
            tasks.cancel_scope.cancel()
        with anyio.fail_after(PATIENCE):
            while True:
                status = json.loads((await other.call_tool("engine_status", {})).content[0].text)  # type: ignore[union-attr]
                if not status["queue"]["running"]:
                    break
                await anyio.sleep(0.1)
        assert status["queue"]["waiting"] == 0
        await call(client, "generate_image", prompt="a dog on yellow", seed=2)


async def test_last_belongs_to_each_client(server, url):
    async with through("stdio", server, url) as one, through("http legacy", server, url) as other:
        mine = await call(one, "generate_image", prompt="a cat on red", seed=1)
        theirs = await call(other, "generate_image", prompt="a dog on blue", seed=2)
        for client, own in ((one, mine), (other, theirs)):
            edited = await call(client, "edit_image", image="last", prompt="make it green")
            assert (await call(client, "view_image", image=edited["image"]))["parents"] == [own["image"]]


@pytest.mark.parametrize("front_end", FRONT_ENDS)
async def test_image_can_be_read_back_as_a_resource(front_end, server, url):
    async with through(front_end, server, url) as client:
        payload = await call(client, "generate_image", prompt="a fish in the ocean", seed=4)
        assert (await pixels(client, payload)).startswith(b"iVBORw0KGgo")  # PNG, in base64
