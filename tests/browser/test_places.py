"""Back and Forward lead through images and views, and every image has an address."""

import re
from typing import Any

import anyio
import pytest

from tests.browser.conftest import Open
from tests.browser.person import edit, generate, new_image, shown

pytestmark = [pytest.mark.browser, pytest.mark.anyio]


async def shows(page: Any, handle: str) -> None:
    await page.wait_for_function(
        "handle => (document.querySelector('#details dd')?.textContent ?? '').startsWith(handle)"
        " && !document.getElementById('create').hidden",
        arg=handle,
    )


async def test_back_and_forward_lead_through_images_and_views(open_page: Open) -> None:
    page = await open_page()
    first = await generate(page, "a red apple on a blue background", seed=1)
    second = await generate(page, "a red apple on a blue background", seed=2)
    await page.get_by_role("button", name="Library", exact=True).click()
    assert page.url.endswith("/studio#library")
    await page.go_back()
    await shows(page, second)
    await page.go_back()
    await shows(page, first)
    assert page.url.endswith(f"/studio#{first}")
    await page.go_back()
    await page.locator(".welcome").wait_for()
    await page.go_forward()
    await page.go_forward()
    await shows(page, second)
    await page.go_forward()
    await page.locator("#library").wait_for()
    await page.reload()
    await page.locator("#library li").first.wait_for()
    await page.go_back()
    await shows(page, second)


async def test_nothing_leads_back_to_a_deleted_image(open_page: Open) -> None:
    page = await open_page()
    first = await generate(page, "a red apple on a blue background", seed=1)
    await page.get_by_role("radio", name="2", exact=True).check()
    await generate(page, "a red apple on a blue background", seed=2)
    assert await page.locator(".sheet button").count() == 2
    await page.get_by_role("button", name="Delete").click()
    await page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    await page.locator(".welcome").wait_for()
    assert await page.locator(".sheet").is_hidden()
    await page.go_back()
    await shows(page, first)
    assert await page.locator(".error").is_hidden()


async def test_image_that_opens_slowly_takes_nobody_back(open_page: Open) -> None:
    page = await open_page()
    await generate(page, "a red apple on a blue background", seed=1)
    second = await generate(page, "a red apple on a blue background", seed=2)
    released = anyio.Event()

    async def slowly(route: Any) -> None:
        await released.wait()
        await route.continue_()

    await page.route(re.compile("details"), slowly)
    await page.locator("#recent li button").nth(1).click()
    await page.get_by_role("button", name="Engine", exact=True).click()
    released.set()
    await page.wait_for_function(
        "second => !document.querySelector('#details dd').textContent.startsWith(second)", arg=second
    )
    assert await page.locator("#engine").is_visible()
    assert page.url.endswith("/studio#engine")


async def test_tree_scrolls_to_its_image_and_the_page_stays(open_page: Open) -> None:
    page = await open_page(width=360, height=740)
    await page.get_by_role("textbox").first.fill("a red apple on a blue background")
    await new_image(page, page.get_by_role("button", name="Generate").click)
    for words in ("make the background yellow", "make the background green", "make the background white"):
        await edit(page, words)
    await page.get_by_role("button", name="Library", exact=True).click()
    await page.evaluate("scrollTo(0, 0)")
    await page.get_by_role("button", name="Create", exact=True).click()
    assert await page.evaluate("scrollY") == 0
    tree, leaf = [await page.locator(each).bounding_box() for each in (".lineage", ".tree li:has([aria-current])")]
    assert tree["x"] <= leaf["x"]
    assert leaf["x"] + leaf["width"] <= tree["x"] + tree["width"]


async def test_address_of_an_image_opens_it_in_a_new_tab(open_page: Open) -> None:
    page = await open_page()
    handle = await generate(page, "a red apple on a blue background", seed=1)
    other = await page.context.new_page()
    await other.goto(page.url)
    await other.wait_for_function(
        "handle => document.querySelector('#details dd')?.textContent.startsWith(handle)", arg=handle
    )
    assert await shown(other) == handle
    await other.goto(page.url.split("#")[0] + "#zzzzzz")
    await other.get_by_role("alert").get_by_text("zzzzzz").wait_for()
