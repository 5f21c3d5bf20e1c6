"""Every view fits its window and works for eyes, fingers and keyboard."""

import json
from typing import Any

import pytest

from tests.browser.conftest import Open
from tests.browser.person import new_image

pytestmark = [pytest.mark.browser, pytest.mark.anyio]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1440])
async def test_every_view_is_accessible_and_fits(open_page: Open, axe: str, width: int, scheme: str) -> None:
    page = await open_page(width=width, height=800, color_scheme=scheme, bypass_csp=True)
    await page.get_by_role("textbox").first.fill("a red apple on a blue background")
    await new_image(page, page.get_by_role("button", name="Generate").click)
    await check_looks(page, axe)
    await page.get_by_role("button", name="Mask", exact=True).click()
    await check_looks(page, axe)
    for view in ("Library", "Engine"):
        await page.get_by_role("button", name=view, exact=True).click()
        await page.wait_for_selector(f"#{view.lower()} :is(li, td)")
        await check_looks(page, axe)


async def check_looks(page: Any, axe: str) -> None:
    """Nothing serious by axe, nothing wider than the window, and on a phone nothing too small to touch."""
    await page.wait_for_timeout(250)  # colours fade in
    await page.evaluate(axe)
    found = await page.evaluate("async () => (await axe.run()).violations")
    serious = [each for each in found if each["impact"] in ("serious", "critical")]
    assert not serious, json.dumps(serious, indent=1)[:3000]
    width = page.viewport_size["width"]
    assert await page.evaluate("document.documentElement.scrollWidth") <= width
    if width < 480:
        small = await page.evaluate(
            "() => [...document.querySelectorAll('main button, nav button, select, textarea')].filter((node) =>"
            " { const box = node.getBoundingClientRect(); return box.width && (box.height < 24 || box.width < 24); })"
            ".map((node) => node.outerHTML.slice(0, 80))"
        )
        assert not small, small


async def test_keyboard_alone_reaches_prompt_image_and_library(open_page: Open) -> None:
    page = await open_page()
    await page.get_by_role("textbox").first.focus()
    await page.keyboard.type("a red star on a white background")
    await new_image(page, lambda: page.keyboard.press("Control+Enter"))
    reached = set()
    for _ in range(60):
        await page.keyboard.press("Tab")
        reached.add(await page.evaluate("document.activeElement.innerText || document.activeElement.id"))
    assert {"Library", "Variations", "Mask", "change", "Download"} <= reached


async def test_reduced_motion_is_respected(open_page: Open) -> None:
    page = await open_page(reduced_motion="reduce")
    running = await page.evaluate(
        "() => [...document.querySelectorAll('*')].filter((node) =>"
        " getComputedStyle(node).transitionDuration.split(', ').some((time) => parseFloat(time) > 0)).length"
    )
    assert running == 0
