"""Jobs of an MCP App: they outlast their call, are followed by the card, and end by Cancel."""

import anyio
import pytest

from klein_mcp.images.library import Store
from tests.browser.conftest import WAIT, slow_engine
from tests.browser.host import Host, Mount
from tests.real_server import RealServer
from tests.tool_calls import call

pytestmark = [pytest.mark.browser, pytest.mark.anyio]

SHORT = {"KLEIN_WAIT_BUDGET": "0.5"}
"""A call is over before the image of a slow engine is there, and gives its job."""


async def start_engine(host: Host) -> None:
    await host.client.call_tool("generate_image", {"prompt": "a red apple on a white background"})


async def test_card_goes_on_where_the_call_gave_a_job(mount: Mount, server: RealServer) -> None:
    async with mount(environment=SHORT) as host:
        await start_engine(host)
        with slow_engine(server):
            given = await host.agent_calls("generate_image", prompt="a red apple on a blue background", count=4)
            assert given["job"]
            await host.frame.locator(".working .preview[src]").wait_for()
            assert await host.frame.get_by_role("button", name="Cancel").count() == 0
        await host.frame.locator(".sheet button").nth(3).wait_for()
        waits = [each for each in host.calls if each["name"] == "wait_for_job"]
        assert {each["arguments"]["job"] for each in waits} == {given["job"]}
        assert {each["_meta"]["klein-mcp/view"] for each in waits} == {"agent"}


async def test_card_that_cannot_wait_says_that_the_image_is_being_made(mount: Mount, server: RealServer) -> None:
    async with mount(environment=SHORT, resources=False, tools=False) as host:
        await start_engine(host)
        with slow_engine(server):
            await host.agent_calls("generate_image", prompt="a red apple on a blue background", count=4)
            await host.frame.get_by_text("The image is still being made.").wait_for()


async def test_card_of_a_wait_shows_previews(mount: Mount, server: RealServer) -> None:
    async with mount(tool="wait_for_job", environment=SHORT) as host:
        await start_engine(host)
        with slow_engine(server):
            given = await call(host.client, "generate_image", prompt="a red apple on a blue background", count=4)
            job = given["job"]
            await host.page.evaluate("(params) => bridge.sendToolInput(params)", {"arguments": {"job": job}})
            await host.frame.locator(".working .preview[src]").wait_for()


async def test_cancel_stops_a_job_that_the_view_waits_for(mount: Mount, server: RealServer) -> None:
    prompt = "a purple dog on a grey background"
    async with mount(environment=SHORT) as host:
        await host.agent_calls("generate_image", prompt=prompt, seed=3)
        await host.image()
        host.calls.clear()
        with slow_engine(server):
            await host.frame.get_by_role("button", name="Variations").click()
            with anyio.fail_after(WAIT / 1000):
                while not any(each["name"] == "wait_for_job" for each in host.calls):
                    await anyio.sleep(0.05)
            await host.frame.get_by_role("button", name="Cancel").click()
            await host.frame.get_by_text("Cancelled.").wait_for()
        with anyio.fail_after(WAIT / 1000):
            while await host.jobs():
                await anyio.sleep(0.2)
    store = Store(server.home / "library")
    records, _ = store.search(prompt, limit=50)
    store.close()
    assert len(records) < 5


async def test_view_cancels_its_own_call(mount: Mount, server: RealServer) -> None:
    async with mount() as host:
        await host.agent_calls("generate_image", prompt="a red apple on a blue background", seed=3)
        await host.frame.get_by_role("button", name="Variations").click()
        await host.frame.get_by_role("button", name="Cancel").click()
        await host.frame.get_by_text("Cancelled.").wait_for()
        with anyio.fail_after(120):
            while await host.jobs():
                await anyio.sleep(0.2)
