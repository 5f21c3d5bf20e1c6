"""The keyboard's focus stays where it was, though the page is painted anew."""

from typing import Any

import pytest

from tests.browser.conftest import Open
from tests.browser.person import generate, new_image

pytestmark = [pytest.mark.browser, pytest.mark.anyio]

FOCUS = "() => { const node = document.activeElement; return node.dataset.key || node.id || node.innerText; }"


async def focus(page: Any) -> str:
    return await page.evaluate(FOCUS)


async def test_selecting_by_keyboard_keeps_the_focus_on_the_card(open_page: Open) -> None:
    page = await open_page()
    for seed in (1, 2):
        await generate(page, "a red apple on a blue background", seed=seed)
    await page.get_by_role("button", name="Library", exact=True).focus()
    await page.keyboard.press("Enter")
    cards = page.locator("#library .grid button")
    await cards.nth(1).wait_for()
    await page.get_by_role("button", name="Select").focus()
    await page.keyboard.press("Enter")
    assert await focus(page) == "Done"
    handles = [await cards.nth(place).get_attribute("data-key") for place in (0, 1)]
    await cards.nth(1).focus()
    for key, selected in ((" ", "true"), ("Enter", "false"), ("Enter", "true")):
        await page.keyboard.press(key)
        assert await focus(page) == handles[1]
        assert await cards.nth(1).get_attribute("aria-pressed") == selected
    await page.keyboard.press("Shift+Tab")
    assert await focus(page) == handles[0]
    await page.get_by_role("button", name="Done").focus()
    await page.keyboard.press("Enter")
    assert await focus(page) == "Select"
    await cards.nth(1).focus()
    await page.keyboard.press("Enter")
    await page.wait_for_function("() => document.activeElement.className.startsWith('stage')")


async def test_library_that_changes_keeps_the_focus(open_page: Open) -> None:
    page, other = await open_page(), await open_page()
    handle = await generate(page, "a red apple on a blue background", seed=1)
    await page.get_by_role("button", name="Library", exact=True).click()
    card = page.locator(f"#library .grid button[data-key={handle}]")
    await card.focus()
    made = await generate(other, "a yellow star on a red background", seed=2)
    await page.locator(f"#library .grid button[data-key={made}]").wait_for()
    assert await focus(page) == handle


async def test_edit_field_has_the_focus_again_after_the_edit(open_page: Open) -> None:
    page = await open_page()
    await generate(page, "a red apple on a blue background", seed=1)
    await page.locator("#change").focus()
    await page.keyboard.type("make the background yellow")
    await new_image(page, lambda: page.keyboard.press("Enter"))
    await page.wait_for_function("() => document.activeElement.id === 'change'")
    await page.keyboard.type("make the background green")
    await page.get_by_role("button", name="Mask", exact=True).focus()
    await page.keyboard.press("Enter")
    assert await page.locator("#change").input_value() == "make the background green"


async def test_dialog_and_message_give_the_focus_back(open_page: Open) -> None:
    page = await open_page()
    await generate(page, "a red apple on a blue background", seed=1)
    remove = page.locator("#details").get_by_role("button", name="Delete")
    await remove.focus()
    await page.keyboard.press("Enter")
    await page.get_by_role("dialog").wait_for()
    await page.keyboard.press("Escape")
    await page.get_by_role("dialog").wait_for(state="detached")
    assert await focus(page) == "Delete"
    await page.get_by_role("button", name="Copy", exact=True).press("Enter")
    await page.locator("#notes").get_by_role("button", name="Dismiss").press("Enter")
    await page.wait_for_function("() => document.activeElement.className.startsWith('stage')")
    await remove.press("Enter")
    await page.get_by_role("dialog").get_by_role("button", name="Delete").press("Enter")
    await page.wait_for_function("() => document.querySelector('#details').hidden")
    assert await page.evaluate("document.activeElement.className") == "stage empty"
