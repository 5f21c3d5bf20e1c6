"""No view of the studio is wider than its window."""

from typing import Any

import pytest

from tests.browser.conftest import Open
from tests.browser.person import edit, generate

pytestmark = [pytest.mark.browser, pytest.mark.anyio]

WIDTHS = (320, 360, 760, 761, 800, 1000, 1080, 1280, 1600)
"""Pixels: phones, tablets and desktops, and both sides of the layouts' limits."""

OUTSIDE = """() => {
    const wide = [document.documentElement, ...document.querySelectorAll(
        'header, main, main > section, #create > *, #composer form, .head, .edit form, dialog')]
        .filter((node) => node.clientWidth && node.scrollWidth > node.clientWidth);
    const cut = [...document.querySelectorAll('button, select, textarea, input:not([type=radio]), label')]
        .filter((node) => !node.closest('.offscreen, .lineage, [hidden], .stage'))
        .filter((node) => { const box = node.getBoundingClientRect();
            return box.width > 1 && (box.left < 0 || box.right > document.documentElement.clientWidth + 0.5); });
    return [...wide, ...cut].map((node) => node.outerHTML.slice(0, 100) + ` ${node.scrollWidth}/${node.clientWidth}`);
}"""
"""Elements that scroll sideways, and controls that are not wholly in the window. The lineage may scroll."""


async def fits(page: Any, view: str) -> None:
    found: dict[int, list[str]] = {}
    for width in WIDTHS:
        await page.set_viewport_size({"width": width, "height": 800})
        await page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        if outside := await page.evaluate(OUTSIDE):
            found[width] = outside
    assert not found, (view, found)


async def test_no_view_scrolls_sideways_at_any_width(open_page: Open) -> None:
    page = await open_page()
    await page.locator(".welcome button").first.wait_for()
    await fits(page, "create, empty")
    await page.get_by_label("Shape", exact=True).select_option("exact")
    await generate(page, "a red apple on a blue background", seed=3)
    await fits(page, "create, one image")
    await edit(page, "make the background yellow")
    for tool in ("Compare", "Mask"):
        await page.get_by_role("button", name=tool, exact=True).click()
        await fits(page, tool)
    await page.get_by_role("button", name="Done", exact=True).click()
    await page.get_by_role("button", name="Save to folder").click()
    await fits(page, "dialog")
    await page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    await page.get_by_role("button", name="Library", exact=True).click()
    await page.locator("#library li").first.wait_for()
    await fits(page, "library")
    await page.get_by_role("button", name="Select").click()
    await page.locator("#library .grid button").first.click()
    await page.get_by_text("1 selected").wait_for()
    await fits(page, "library, selecting")
    await page.get_by_role("button", name="Engine", exact=True).click()
    await page.locator("#engine td").first.wait_for()
    await fits(page, "engine")


async def test_options_are_open_once_a_narrow_page_gets_wide(open_page: Open) -> None:
    page = await open_page(width=700)
    shape = page.get_by_label("Shape", exact=True)
    assert await shape.is_hidden()
    await page.set_viewport_size({"width": 1000, "height": 800})
    await shape.wait_for()
    assert await page.locator("summary").is_hidden()


async def test_every_part_of_the_details_can_be_seen_at_any_width(open_page: Open) -> None:
    page = await open_page()
    await generate(page, "a red apple on a blue background", seed=3)
    await edit(page, "make the background yellow")
    for width in WIDTHS:
        await page.set_viewport_size({"width": width, "height": 800})
        squeezed = await page.evaluate(
            "() => [...document.querySelectorAll('#details > *')]"
            ".filter((node) => node.clientHeight < 18).map((node) => node.outerHTML.slice(0, 80))"
        )
        assert not squeezed, (width, squeezed)
    tiles = await page.evaluate(
        "() => [...document.querySelectorAll('#recent li')].map((node) => node.clientHeight - node.clientWidth)"
    )
    assert set(tiles) == {0}, "as far apart below each other as beside each other"


async def test_zoom_lies_beside_the_image_at_any_width(open_page: Open) -> None:
    page = await open_page()
    await generate(page, "a red apple on a blue background", seed=3)
    for width in WIDTHS:
        await page.set_viewport_size({"width": width, "height": 800})
        await page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        image, zoom = [await page.locator(each).bounding_box() for each in (".frame", ".zoom")]
        assert zoom["y"] >= image["y"] + image["height"], width
