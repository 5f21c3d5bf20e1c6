"""Fingers draw masks and enlarge images on a phone."""

from collections.abc import Sequence
from typing import Any

import pytest

from tests.browser.conftest import Open
from tests.browser.person import new_image

pytestmark = [pytest.mark.browser, pytest.mark.anyio]

Point = tuple[float, float]


async def touch(page: Any, selector: str, *moments: Sequence[Point]) -> None:
    """Put fingers down, move them and lift them. Points are shares of the element's box."""
    box = await page.locator(selector).bounding_box()
    session = await page.context.new_cdp_session(page)
    kinds = ["touchStart", *["touchMove"] * (len(moments) - 1), "touchEnd"]
    for kind, points in zip(kinds, [*moments, ()], strict=True):
        places = [
            {"x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"], "id": finger}
            for finger, (x, y) in enumerate(points)
        ]
        await session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": places})


async def phone_with_image(open_page: Open) -> Any:
    page = await open_page(width=360, height=740, has_touch=True, is_mobile=True)
    await page.get_by_role("textbox").first.fill("a red apple on a blue background")
    await new_image(page, page.get_by_role("button", name="Generate").tap)
    return page


async def test_finger_draws_a_mask_and_the_page_stays(open_page: Open) -> None:
    page = await phone_with_image(open_page)
    await page.get_by_role("button", name="Mask", exact=True).tap()
    scrolled = await page.evaluate("scrollY")
    await touch(page, "canvas.mask", *([(0.2 + 0.05 * step, 0.2 + 0.05 * step)] for step in range(10)))
    await page.get_by_text("Edit inside the mask").wait_for()
    assert await page.evaluate("scrollY") == scrolled


async def test_two_fingers_enlarge_the_image_and_draw_nothing(open_page: Open) -> None:
    page = await phone_with_image(open_page)
    await page.get_by_role("button", name="Mask", exact=True).tap()
    before = await page.locator(".zoom output").inner_text()
    await touch(page, "canvas.mask", *([(0.4 - 0.03 * step, 0.5), (0.6 + 0.03 * step, 0.5)] for step in range(8)))
    await page.wait_for_function("before => document.querySelector('.zoom output').innerText !== before", arg=before)
    assert await page.locator("#edit-words").inner_text() == "Edit"
    await page.get_by_role("button", name="Done").tap()
    assert await page.locator("canvas.mask").count() == 0


async def test_two_fingers_enlarge_the_image_and_not_the_page(open_page: Open) -> None:
    page = await phone_with_image(open_page)
    before = await page.locator(".zoom output").inner_text()
    await touch(page, ".stage", *([(0.4 - 0.03 * step, 0.5), (0.6 + 0.03 * step, 0.5)] for step in range(8)))
    await page.wait_for_function("before => document.querySelector('.zoom output').innerText !== before", arg=before)
    assert await page.evaluate("visualViewport.scale") == 1
    await page.get_by_role("button", name="Fit").tap()
    await page.wait_for_function("before => document.querySelector('.zoom output').innerText === before", arg=before)
