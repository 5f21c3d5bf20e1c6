"""The studio as an MCP App: in the reference host, by a real client of the real server."""

import base64
import io
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from mcp import Client
from mcp.client.extension import advertise
from mcp.server.apps import APP_MIME_TYPE, EXTENSION_ID
from PIL import Image

from klein_mcp.images.library import Store
from tests.browser import node_packages
from tests.browser.conftest import WAIT, Watched, slow_engine
from tests.browser.static_server import serve_files
from tests.real_server import RealServer

pytestmark = [pytest.mark.browser, pytest.mark.anyio]

HERE = Path(__file__).parent
URI = "ui://klein/studio.html"
APPS = advertise(EXTENSION_ID, {"mimeTypes": [APP_MIME_TYPE]})
HOST_PAGE = '<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,"><script src="/host.js"></script>'

FRAMES = [("spec", False), ("claude", False), ("claude", True)]
"""Policies of the frame, and whether its origin is opaque."""


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


class Host:
    """A chat client that shows MCP Apps: the real bridge in a real browser, over a real client session."""

    def __init__(self, page: Any, client: Client) -> None:
        self.page = page
        self.client = client
        self.reads: list[str] = []
        self.calls: list[dict[str, Any]] = []
        self._running: dict[int, anyio.CancelScope] = {}

    @property
    def frame(self) -> Any:
        return self.page.frame_locator("iframe")

    async def request(self, number: int, method: str, params: dict[str, Any]) -> dict[str, Any]:
        """Answer what the view asks of the server."""
        with anyio.CancelScope() as self._running[number]:
            try:
                if method == "resources/read":
                    self.reads.append(params["uri"])
                    result = await self.client.read_resource(params["uri"])
                else:
                    self.calls.append(params)
                    result = await self.client.call_tool(params["name"], params["arguments"], meta=params.get("_meta"))
            except Exception as exc:
                return {"error": str(exc)}
            return {"result": result.model_dump(mode="json", by_alias=True, exclude_none=True)}
        return {"error": "cancelled"}

    def cancel(self, number: int) -> None:
        self._running[number].cancel()

    async def agent_calls(self, tool: str, **arguments: Any) -> dict[str, Any]:
        """Call a tool as the agent does, and tell the view before and after."""
        await self.page.evaluate("(params) => bridge.sendToolInput(params)", {"arguments": arguments})
        result = await self.client.call_tool(tool, arguments)
        content = result.model_dump(mode="json", by_alias=True, exclude_none=True)
        await self.page.evaluate("(result) => bridge.sendToolResult(result)", content)
        return json.loads(result.content[0].text)  # type: ignore[union-attr]

    async def image(self) -> np.ndarray:
        """Wait for the image on the stage and return its pixels as the frame has them."""
        picture = self.frame.locator(".frame:not(.working) .picture").first
        await picture.wait_for()
        data = await picture.evaluate(
            "async (node) => { while (!node.naturalWidth) await new Promise((done) => setTimeout(done, 50));"
            " const canvas = document.createElement('canvas');"
            " [canvas.width, canvas.height] = [node.naturalWidth, node.naturalHeight];"
            " canvas.getContext('2d').drawImage(node, 0, 0); return canvas.toDataURL('image/png'); }"
        )
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data.split(",")[1]))).convert("RGB"))


Mount = Callable[..., Any]


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
            (html,) = (await client.read_resource(URI)).contents
            (listed,) = [each for each in (await client.list_tools()).tools if each.name == tool]
            info = {"tool": listed.model_dump(mode="json", by_alias=True, exclude_none=True)}
            inline = {"displayMode": "inline", "availableDisplayModes": ["inline", "fullscreen"]}
            able = {"serverResources": {}} if resources else {}
            able |= {"serverTools": {}} if tools else {}
            options = {
                "sandbox": sandbox,
                "html": html.text,  # type: ignore[union-attr]
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


def stored(server: RealServer, handle: str) -> np.ndarray:
    store = Store(server.home / "library")
    try:
        return np.asarray(Image.open(io.BytesIO(store.read(store.get(handle)))).convert("RGB"))
    finally:
        store.close()


# -- what the server offers -----------------------------------------------------------------------------------------


async def test_only_clients_with_apps_are_shown_the_page_and_its_tool(server: RealServer) -> None:
    async with Client(server.stdio()) as plain, Client(server.stdio(), extensions=[APPS]) as apps:
        before, after = await plain.list_tools(), await apps.list_tools()
        assert "pick" not in {tool.name for tool in before.tools}
        assert all(not (tool.meta or {}).get("ui") for tool in before.tools)
        assert URI not in {str(each.uri) for each in (await plain.list_resources()).resources}
        assert not (await plain.call_tool("pick", {"image": "last"})).content[0].text.startswith("{")  # type: ignore[union-attr]
        shown = {tool.name: tool.meta or {} for tool in after.tools}
        for name in ("generate_image", "edit_image", "compose_references", "list_images"):
            assert shown[name]["ui"]["resourceUri"] == shown[name]["ui/resourceUri"] == URI
        assert shown["pick"]["ui"]["visibility"] == ["app"]
        listed = {str(each.uri): each for each in (await apps.list_resources()).resources}
        assert listed[URI].mime_type == APP_MIME_TYPE
        (content,) = (await apps.read_resource(URI)).contents
        assert content.mime_type == APP_MIME_TYPE
        assert content.meta is not None
        assert content.meta["ui"]["prefersBorder"] is False
        stripped = [tool.model_copy(update={"meta": None}) for tool in after.tools if tool.name != "pick"]
        assert stripped == [tool.model_copy(update={"meta": None}) for tool in before.tools]


# -- in the frame ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "opaque"), FRAMES)
async def test_image_and_its_size_arrive_under_every_policy(
    mount: Mount, server: RealServer, policy: str, opaque: bool
) -> None:
    async with mount(policy=policy, opaque=opaque) as host:
        made = await host.agent_calls("generate_image", prompt="a red apple on a blue background", seed=3)
        await host.frame.get_by_text("a red apple on a blue background").wait_for()
        await host.frame.locator(".frame .picture[src^='data:image/png']").wait_for()
        assert np.array_equal(await host.image(), stored(server, made["image"]))
        sizes = await host.page.evaluate("sizes")
        assert sizes[0]["ms"] < 500
        assert sizes[-1]["height"] > 300


NOTE_PREVIEWS = (
    "() => { window.seen = []; new MutationObserver(() => {"
    " const src = document.querySelector('.working .preview')?.getAttribute('src');"
    " if (src && seen.at(-1) !== src) seen.push(src); })"
    ".observe(document.body, { subtree: true, childList: true, attributes: true }); }"
)


async def test_previews_grow_clear_while_the_agent_waits(mount: Mount) -> None:
    async with mount() as host:
        await host.frame.locator("body").evaluate(NOTE_PREVIEWS)
        await host.agent_calls("generate_image", prompt="a yellow star on a red background", count=2, seed=4)
        await host.image()
        assert len(await host.frame.locator("body").evaluate("() => seen")) >= 2


async def test_calls_of_the_view_show_previews_too(mount: Mount) -> None:
    async with mount() as host:
        await host.agent_calls("generate_image", prompt="a yellow star on a red background", seed=4)
        await anyio.sleep(1.5)  # the last question for news of the agent's call waits up to a second
        await host.frame.locator("body").evaluate(NOTE_PREVIEWS)
        await host.frame.get_by_role("button", name="Variations").click()
        await host.frame.locator(".sheet button").nth(3).wait_for()
        assert len(await host.frame.locator("body").evaluate("() => seen")) >= 2


async def test_result_alone_is_enough_to_show_the_image(mount: Mount) -> None:
    async with mount(resources=False, tools=False) as host:
        await host.agent_calls("generate_image", prompt="a red apple on a blue background", seed=3)
        image = await host.image()
        assert image[-10:, :10].mean(axis=(0, 1))[2] > 120  # its ground is blue
        assert not host.reads
        assert not host.calls
        assert await host.frame.locator("#change").count() == 0


async def test_sheet_is_shown_whole_where_resources_are_refused(mount: Mount) -> None:
    async with mount(resources=False) as host:
        await host.agent_calls("generate_image", prompt="a red apple on a blue background", seed=3, count=2)
        image = await host.image()
        assert image.shape[1] > image.shape[0]


@pytest.mark.parametrize("count", [1, 2])
async def test_mask_has_the_size_of_one_image_where_resources_are_refused(mount: Mount, count: int) -> None:
    async with mount(resources=False) as host:
        made = await host.agent_calls("generate_image", prompt="a red apple", width=128, height=96, count=count)
        width, height = made.get("images", [made])[0]["size"]
        await host.image()
        await host.frame.get_by_role("button", name="Mask", exact=True).click()
        canvas = host.frame.locator("canvas.mask")
        assert [await canvas.get_attribute(each) for each in ("width", "height")] == [str(width), str(height)]
        image = await host.image()
        assert abs(image.shape[1] / image.shape[0] - width / height) < 0.05, "one image, not the sheet"
        await host.frame.get_by_role("radio", name="Box").check()
        box = await canvas.bounding_box()
        await host.page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.5 * box["height"])
        await host.page.mouse.down()
        await host.page.mouse.move(box["x"] + box["width"] - 2, box["y"] + box["height"] - 2, steps=4)
        await host.page.mouse.up()
        await host.frame.get_by_label("What should change").fill("make the background green")
        await host.frame.get_by_role("button", name="Edit inside the mask").click()
        with anyio.fail_after(WAIT / 1000):
            while not (edited := [call for call in host.calls if call["name"] == "edit_image"]):
                await anyio.sleep(0.05)
        x, y, across, down = edited[0]["arguments"]["region"]
        assert abs(x - width / 2) <= 2
        assert abs(y - height / 2) <= 2
        assert across > width / 3
        assert down > height / 3
        await host.frame.locator(".working").wait_for(state="detached")


async def test_view_edits_with_a_drawn_mask(mount: Mount, server: RealServer) -> None:
    async with mount() as host:
        made = await host.agent_calls("generate_image", prompt="a red apple on a blue background", seed=3)
        await host.frame.get_by_role("button", name="Mask", exact=True).click()
        box = await host.frame.locator("canvas.mask").bounding_box()
        await host.page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + 0.2 * box["height"])
        await host.page.mouse.down()
        await host.page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.2 * box["height"], steps=6)
        await host.page.mouse.up()
        await host.frame.get_by_label("What should change").fill("make the background green")
        await host.frame.get_by_role("button", name="Edit inside the mask").click()
        await host.frame.locator("blockquote").get_by_text("make the background green").wait_for(timeout=WAIT)
        edited = [call for call in host.calls if call["name"] == "edit_image"]
        assert edited[0]["arguments"]["image"] == made["image"]
        mask = edited[0]["arguments"]["mask"]
        assert mask.startswith("data:image/png;base64,")
        inside = np.asarray(Image.open(io.BytesIO(base64.b64decode(mask.split(",")[1]))).convert("L")) > 127
        before = stored(server, made["image"])
        last = json.loads((await host.client.call_tool("view_image", {"image": "last"})).content[0].text)  # type: ignore[union-attr]
        after = stored(server, last["image"])
        assert np.array_equal(before[~inside], after[~inside])
        assert not np.array_equal(before[inside], after[inside])


CONFIRM = (
    "(node, more) => node.dispatchEvent(new KeyboardEvent('keydown',"
    " { key: 'Enter', bubbles: true, cancelable: true, isComposing: true, ...more }))"
)
"""Enter as an input method sends it, which takes its words for confirmed."""


async def test_forms_work_where_the_frame_allows_none(mount: Mount, tmp_path: Path) -> None:
    open_folder = {"KLEIN_WRITE_ROOTS": str(tmp_path)}
    async with mount(policy="claude", opaque=True, width=1000, environment=open_folder) as host:
        await host.agent_calls("generate_image", prompt="a red apple on a blue background", seed=3)
        await host.image()
        await host.frame.get_by_role("button", name="Full screen").click()
        prompt, change = host.frame.locator("#prompt"), host.frame.locator("#change")
        await prompt.fill("a yellow star on a red background")
        await prompt.evaluate(CONFIRM, {"ctrlKey": True})
        await host.frame.get_by_role("button", name="Generate").click()
        await host.frame.locator("blockquote").get_by_text("a yellow star").wait_for()
        await change.fill("make the background green")
        await change.evaluate(CONFIRM, {})
        assert await host.frame.locator(".working").count() == 0
        await change.press("Enter")
        await host.frame.locator("blockquote").get_by_text("make the background green").wait_for()
        path, save = host.frame.get_by_label("File name"), host.frame.get_by_role("button", name="Save", exact=True)
        for name, send in (("one", lambda: path.press("Enter")), ("two", save.click)):
            await host.frame.get_by_role("button", name="Save to folder").click()
            file = tmp_path / f"{name}.png"
            await path.fill(str(file))
            await send()
            with anyio.fail_after(WAIT / 1000):
                while not file.exists():
                    await anyio.sleep(0.05)
        called = [call["name"] for call in host.calls]
        assert called == ["generate_image", "edit_image", "save_image", "save_image"]


async def test_pick_in_the_view_is_what_the_agent_gets(mount: Mount) -> None:
    async with mount() as host:
        made = await host.agent_calls("generate_image", prompt="a blue cat on a white background", count=3)
        drafts = [each["image"] for each in made["images"]]
        await host.frame.locator(".sheet button").nth(2).click()
        await host.frame.get_by_role("button", name="Pick", exact=True).click()
        await host.frame.get_by_text("Picked:").first.wait_for()
        line = json.loads((await host.client.call_tool("view_image", {"image": "last"})).content[0].text)  # type: ignore[union-attr]
        assert line["image"] == drafts[2]
        assert line["picked"] == {"image": drafts[2]}


async def test_view_is_saved_by_the_host(mount: Mount, server: RealServer) -> None:
    async with mount() as host:
        made = await host.agent_calls("generate_image", prompt="a red apple on a blue background", seed=3)
        await host.frame.get_by_role("button", name="Download").click()
        await host.page.wait_for_function("() => downloads.length === 1")
        (download,) = await host.page.evaluate("downloads")
        data = base64.b64decode(download["contents"][0]["resource"]["blob"])
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), stored(server, made["image"]))


async def test_download_that_had_to_be_smaller_says_so(mount: Mount, server: RealServer) -> None:
    noise, file = np.random.default_rng(1).integers(0, 256, (512, 512, 3), np.uint8), io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    store = Store(server.home / "library")
    handle = store.new_handle()
    made = {"client": "filler", "tool": "generate_image", "recipe": {"seed": "1"}, "prompt": "noise"}
    store.put(file.getvalue(), handle=handle, pixels=handle, size=(512, 512), **made)
    store.close()
    async with mount(tool="view_image") as host:
        await host.agent_calls("view_image", image=handle)
        await host.frame.get_by_role("button", name="Download").click()
        await host.frame.get_by_text("A smaller rendition: the exact image has").wait_for()
        (download,) = await host.page.evaluate("downloads")
        resource = download["contents"][0]["resource"]
        assert resource["uri"].endswith(f"{handle}.jpg")
        assert base64.b64decode(resource["blob"])[:2] == b"\xff\xd8"


async def test_cancelled_call_and_error_are_explained(mount: Mount) -> None:
    async with mount() as host:
        await host.page.evaluate("bridge.sendToolInput({ arguments: { prompt: 'a red apple' } })")
        await host.page.evaluate("bridge.sendToolCancelled({ reason: 'The user stopped it.' })")
        await host.frame.get_by_text("The call was cancelled.").wait_for()
        assert await host.frame.locator(".working").count() == 0
    async with mount() as host:
        failed = {"content": [{"type": "text", "text": "width is 32; it must lie in 64 … 2048."}], "isError": True}
        await host.page.evaluate("bridge.sendToolInput({ arguments: { prompt: 'a red apple' } })")
        await host.frame.locator(".working").wait_for()
        await host.page.evaluate("(result) => bridge.sendToolResult(result)", failed)
        await host.frame.get_by_text("it must lie in").wait_for()
        assert await host.frame.locator(".working").count() == 0


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
        waits = [call for call in host.calls if call["name"] == "wait_for_job"]
        assert {call["arguments"]["job"] for call in waits} == {given["job"]}
        assert {call["_meta"]["klein-mcp/view"] for call in waits} == {"agent"}


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
            asked = {"prompt": "a red apple on a blue background", "count": 4}
            job = json.loads((await host.client.call_tool("generate_image", asked)).content[0].text)["job"]  # type: ignore[union-attr]
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
                while not any(call["name"] == "wait_for_job" for call in host.calls):
                    await anyio.sleep(0.05)
            await host.frame.get_by_role("button", name="Cancel").click()
            await host.frame.get_by_text("Cancelled.").wait_for()
        with anyio.fail_after(WAIT / 1000):
            while json.loads((await host.client.read_resource("klein://now?after=0")).contents[0].text)["jobs"]:  # type: ignore[union-attr]
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
            while json.loads((await host.client.read_resource("klein://now?after=0")).contents[0].text)["jobs"]:  # type: ignore[union-attr]
                await anyio.sleep(0.2)


async def test_list_opens_the_library_with_fifty_images(mount: Mount, server: RealServer) -> None:
    store = Store(server.home / "library")
    for number in range(50):
        file = io.BytesIO()
        Image.new("RGB", (64, 64), (200, number, 90)).save(file, "PNG")
        handle = store.new_handle()
        made = {"client": "filler", "tool": "generate_image", "recipe": {"seed": str(1000 * number)}}
        store.put(file.getvalue(), handle=handle, pixels=handle, size=(64, 64), prompt=f"entry {number}", **made)
    store.close()
    async with mount(tool="list_images", width=360) as host:
        await host.agent_calls("list_images", limit=50)
        tiles = host.frame.locator("#library .grid li")
        await tiles.nth(39).wait_for(state="attached")
        await host.frame.locator("#library").evaluate("(node) => node.scrollTo(0, 1e6)")
        await tiles.nth(49).wait_for(state="attached")
        await tiles.first.click()
        await host.frame.get_by_text("entry 49").wait_for()


async def test_host_theme_and_full_screen_are_followed(mount: Mount) -> None:
    variables = {"--color-background-primary": "rgb(1, 2, 3)", "--color-text-primary": "rgb(250, 251, 252)"}
    async with mount(theme="dark", styles={"variables": variables}) as host:
        await host.agent_calls("generate_image", prompt="a red apple on a blue background", seed=3)
        await host.image()
        root = host.frame.locator("html")
        assert await root.evaluate("(node) => getComputedStyle(node).backgroundColor") == "rgb(1, 2, 3)"
        assert await root.evaluate("(node) => getComputedStyle(node).colorScheme") == "dark"
        await host.frame.get_by_role("button", name="Full screen").click()
        await host.frame.get_by_role("button", name="Generate").wait_for()
        await host.frame.locator("#recent li").first.wait_for()


async def test_narrow_card_fits_and_is_accessible(mount: Mount, axe: str) -> None:
    async with mount(width=328) as host:
        await host.agent_calls("generate_image", prompt="a red apple on a blue background", seed=3)
        await host.image()
        await host.frame.get_by_text("a red apple on a blue background").wait_for()
        body = host.frame.locator("body")
        assert await body.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
        await body.evaluate(f"() => {{ {axe} }}")
        found = await body.evaluate("async () => (await axe.run()).violations")
        serious = [each for each in found if each["impact"] in ("serious", "critical")]
        assert not serious, json.dumps(serious, indent=1)[:3000]


async def test_agent_pays_no_more_for_the_page(server: RealServer) -> None:
    arguments = {"prompt": "a red apple on a blue background", "seed": 3}
    async with Client(server.stdio()) as plain, Client(server.stdio(), extensions=[APPS]) as apps:
        results = [await client.call_tool("generate_image", arguments) for client in (plain, apps)]
        kinds = [[block.type for block in result.content] for result in results]
        lines = [set(json.loads(result.content[0].text)) for result in results]  # type: ignore[union-attr]
        assert kinds[0] == kinds[1]
        assert lines[0] == lines[1]
        assert all(result.structured_content is None for result in results)
