"""A person keeps images: downloads, deletes, scrolls, and watches others' arrive."""

import io
import re
from typing import Any

import numpy as np
import pytest
from mcp import Client
from PIL import Image

from tests.browser.conftest import Open, Studio
from tests.browser.person import generate, line, open_image, pixels
from tests.real_server import RealServer

pytestmark = [pytest.mark.browser, pytest.mark.anyio]


async def test_image_is_downloaded_and_saved_in_full(open_page: Open, studio: Studio) -> None:
    page = await open_page()
    handle = await generate(page, "a red apple on a blue background", seed=3)
    async with page.expect_download() as started:
        await page.get_by_role("button", name="Download").click()
    download = await started.value
    assert download.suggested_filename == f"{handle}.png"
    with studio.library() as store:
        assert (await download.path()).read_bytes() == store.read(store.get(handle))
    await page.get_by_role("button", name="Save to folder").click()
    await page.get_by_label("File name").fill("kept/apple.png")
    await page.get_by_role("button", name="Save", exact=True).click()
    await page.get_by_text("Saved as").wait_for()
    saved = np.asarray(Image.open(studio.folder / "kept" / "apple.png").convert("RGB"))
    assert np.array_equal(saved, pixels(studio, handle))


async def test_deleting_asks_first(open_page: Open, studio: Studio) -> None:
    page = await open_page()
    handle = await generate(page, "a red apple on a blue background", seed=3)
    await page.get_by_role("button", name="Delete").click()
    await page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    with studio.library() as store:
        assert store.get(handle).deleted is None
    await page.get_by_role("button", name="Delete").click()
    await page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    await page.wait_for_function("() => document.querySelector('#details').hidden")
    with studio.library() as store:
        record = store.find(handle)
    assert record is not None
    assert record.deleted is not None


async def test_second_tab_shows_the_image_without_reload(open_page: Open) -> None:
    page, other = await open_page(), await open_page()
    count = await other.locator("#recent li").count()
    await generate(page, "a green cat on a white background", seed=41)
    await other.wait_for_function(
        "() => document.querySelector('#recent img')?.alt === 'a green cat on a white background'"
    )
    assert await other.locator("#recent li").count() >= min(9, count + 1)
    assert not await other.locator("#details dd").count()


async def test_agent_beside_is_watched_and_its_images_appear(open_page: Open, server: RealServer) -> None:
    page = await open_page()
    await page.evaluate(
        "() => { window.cards = []; new MutationObserver(() => { const job = document.querySelector('.jobs li');"
        " if (job) cards.push({ words: job.innerText, preview: Boolean(job.querySelector('img')) }); })"
        ".observe(document.querySelector('.jobs'), { subtree: true, childList: true }); }"
    )
    async with Client(server.stdio()) as client:
        made = line(await client.call_tool("generate_image", {"prompt": "a white dog on a purple background"}))
    await page.wait_for_function(
        "() => document.querySelector('#recent img')?.alt === 'a white dog on a purple background'"
    )
    cards = await page.evaluate("cards")
    assert any("an agent" in card["words"] and "a white dog" in card["words"] for card in cards)
    assert any(card["preview"] for card in cards)
    await page.locator("#recent li button").first.click()
    await page.wait_for_function(
        "handle => document.querySelector('#details dd')?.textContent.startsWith(handle)", arg=made["image"]
    )


async def test_agent_hears_once_which_draft_was_picked(open_page: Open, server: RealServer) -> None:
    page = await open_page()
    async with Client(server.stdio()) as client:
        made = line(
            await client.call_tool("generate_image", {"prompt": "a blue cat on a white background", "count": 3})
        )
        drafts = [each["image"] for each in made["images"]]
        await open_image(page, drafts[0])
        await page.locator(".sheet button").nth(1).click()
        await page.wait_for_function(
            "handle => document.querySelector('#details dd')?.textContent.startsWith(handle)", arg=drafts[1]
        )
        await page.get_by_role("button", name="Pick", exact=True).click()
        await page.locator("#details .picked").wait_for()
        seen = line(await client.call_tool("view_image", {"image": "last"}))
        assert seen["image"] == drafts[1]
        assert seen["picked"] == {"image": drafts[1]}
        assert "picked" not in line(await client.call_tool("view_image", {"image": "last"}))


async def test_single_image_of_the_library_is_picked(open_page: Open, server: RealServer) -> None:
    page = await open_page()
    async with Client(server.stdio()) as client:
        made = line(await client.call_tool("generate_image", {"prompt": "a rocket on a pink background"}))
        await client.call_tool("generate_image", {"prompt": "a dog on a pink background"})
        await open_image(page, made["image"])
        await page.get_by_role("button", name="Pick", exact=True).click()
        await page.locator("#details .picked").wait_for()
        seen = line(await client.call_tool("view_image", {"image": "last"}))
        assert seen["picked"] == {"image": made["image"]}
        assert seen["image"] == made["image"]


@pytest.fixture(scope="module")
def filled(studio: Studio) -> None:
    """Put more images into the library than a page of it has."""
    with studio.library() as store:
        for number in range(55):
            file = io.BytesIO()
            Image.new("RGB", (64, 64), (number, 90, 200)).save(file, "PNG")
            handle = store.new_handle()
            store.put(
                file.getvalue(),
                handle=handle,
                pixels=handle,
                size=(64, 64),
                client="filler",
                tool="generate_image",
                recipe={"seed": str(1000 * number)},
                prompt=f"filler number {number:02}",
            )


@pytest.mark.usefixtures("filled")
async def test_page_that_fails_is_asked_for_once_then_by_button(open_page: Open) -> None:
    page = await open_page(allowed=("503",))
    asked: list[str] = []

    async def refuse(route: Any) -> None:
        asked.append(route.request.url)
        await route.fulfill(status=503, json={"error": "Out of order."})

    further = re.compile(r"library%3F.*cursor%3D[^&]")
    await page.route(further, refuse)
    await page.get_by_role("button", name="Library", exact=True).click()
    await page.wait_for_function("() => document.querySelectorAll('#library .grid li').length >= 40")
    async with page.expect_response(further):
        await page.evaluate("document.querySelector('#library').scrollTo(0, 1e6)")
    # Fifty frames: the button in sight would have asked again in the next one.
    frames = "async () => { for (let n = 0; n < 50; n++) await new Promise(requestAnimationFrame); }"
    await page.evaluate(frames)
    assert len(asked) == 1
    await page.unroute(further)
    await page.get_by_role("button", name="Load more").click()
    await page.wait_for_function("() => document.querySelectorAll('#library .grid li').length >= 55")


@pytest.mark.usefixtures("filled")
async def test_library_scrolls_on_and_finds_words(open_page: Open) -> None:
    page = await open_page()
    await page.get_by_role("button", name="Library", exact=True).click()
    await page.wait_for_function("() => document.querySelectorAll('#library .grid li').length >= 40")
    await page.evaluate("document.querySelector('#library').scrollTo(0, 1e6)")
    await page.wait_for_function("() => document.querySelectorAll('#library .grid li').length >= 55")
    # News of an image takes nobody back to the first page.
    depth = await page.evaluate("document.querySelector('#library').scrollTop")
    handle = await generate(await open_page(), "a green apple on a purple background", seed=3)
    await page.locator(f"#library [data-key={handle}]").wait_for()
    assert await page.locator("#library .grid li").count() >= 56
    assert await page.evaluate("document.querySelector('#library').scrollTop") >= depth
    await page.get_by_label("Search").fill("filler 07")
    await page.wait_for_function("() => document.querySelectorAll('#library .grid li').length === 1")
