"""Actions of a person in the studio: type, press, drag, wait."""

import io
import json
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from PIL import Image

from tests.browser.conftest import WAIT, Studio


async def visit(browser: Any, studio: Studio) -> Any:
    """Open a page in a context of its own, by the studio's link."""
    page = await (await browser.new_context()).new_page()
    page.set_default_timeout(WAIT)
    await page.goto(studio.link)
    await page.wait_for_url(f"{studio.origin}/studio")
    return page


async def generate(page: Any, prompt: str, seed: int | None = None) -> str:
    """Type a prompt, press Generate and return the new image's handle."""
    await page.get_by_role("textbox").first.fill(prompt)
    await page.get_by_label("Seed", exact=True).fill("" if seed is None else str(seed))
    return await new_image(page, page.get_by_role("button", name="Generate").click)


async def edit(page: Any, words: str) -> str:
    await page.get_by_label("What should change").fill(words)
    return await new_image(page, page.locator(".edit button").click)


async def shown(page: Any) -> str:
    """Return the handle of the image on the stage, "" for none."""
    fact = page.locator("#details dd").first
    return (await fact.inner_text()).split()[0] if await fact.count() else ""


async def new_image(page: Any, act: Callable[[], Awaitable[Any]]) -> str:
    """Do something and wait until another image is on the stage, in full."""
    before = await shown(page)
    await act()
    await page.wait_for_function(
        "before => { const fact = document.querySelector('#details dd'); return fact"
        " && fact.firstChild.textContent !== before && !document.querySelector('.working')"
        " && document.querySelector('.frame .picture')?.naturalWidth > 0; }",
        arg=before,
        timeout=WAIT,
    )
    return await shown(page)


async def open_image(page: Any, handle: str) -> None:
    """Find an image in the library and open it."""
    await page.get_by_role("button", name="Library", exact=True).click()
    await page.get_by_label("Search").fill(handle)
    await page.wait_for_function("() => document.querySelectorAll('#library .grid li').length === 1")
    await page.locator("#library .grid button").click()
    await page.wait_for_function(
        "handle => document.querySelector('#details dd')?.textContent.startsWith(handle)", arg=handle
    )


async def drag(page: Any, selector: str, *points: tuple[float, float]) -> None:
    """Press at the first point, move through the others and let go. Points are shares of the element's box."""
    box = await page.locator(selector).bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    await page.mouse.move(*places[0])
    await page.mouse.down()
    for place in places[1:]:
        await page.mouse.move(*place, steps=8)
    await page.mouse.up()


def pixels(studio: Studio, handle: str) -> np.ndarray:
    with studio.library() as store:
        return np.asarray(Image.open(io.BytesIO(store.read(store.get(handle)))).convert("RGB"))


def line(result: Any) -> dict[str, Any]:
    return json.loads(result.content[0].text)
