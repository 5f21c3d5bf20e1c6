"""The studio as an MCP App: in the reference host, by a real client of the real server."""

import base64
import io
import json
from pathlib import Path

import anyio
import numpy as np
import pytest
from mcp import Client
from mcp.server.apps import APP_MIME_TYPE
from PIL import Image

from klein_mcp.images.library import Store
from tests.browser.conftest import APP_URI, APPS, WAIT
from tests.browser.host import Mount
from tests.real_server import RealServer
from tests.tool_calls import call

pytestmark = [pytest.mark.browser, pytest.mark.anyio]

FRAMES = [("spec", False), ("claude", False), ("claude", True)]
"""Policies of the frame, and whether its origin is opaque."""


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
        assert APP_URI not in {str(each.uri) for each in (await plain.list_resources()).resources}
        assert not (await plain.call_tool("pick", {"image": "last"})).content[0].text.startswith("{")  # type: ignore[union-attr] - text
        shown = {tool.name: tool.meta or {} for tool in after.tools}
        for name in ("generate_image", "edit_image", "compose_references", "list_images"):
            assert shown[name]["ui"]["resourceUri"] == shown[name]["ui/resourceUri"] == APP_URI
        assert shown["pick"]["ui"]["visibility"] == ["app"]
        listed = {str(each.uri): each for each in (await apps.list_resources()).resources}
        assert listed[APP_URI].mime_type == APP_MIME_TYPE
        (content,) = (await apps.read_resource(APP_URI)).contents
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
        assert await host.frame.get_by_role("button", name="Download").count() == 0, "it reads the image first"


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
        last = await call(host.client, "view_image", image="last")
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
        line = await call(host.client, "view_image", image="last")
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
        lines = [set(json.loads(result.content[0].text)) for result in results]  # type: ignore[union-attr] - text
        assert kinds[0] == kinds[1]
        assert lines[0] == lines[1]
        assert all(result.structured_content is None for result in results)
