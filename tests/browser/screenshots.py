"""Makes the README's pictures of the studio, by the embedded model.

python -m tests.browser.screenshots [FOLDER]     default: docs/pictures
"""

import asyncio
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from tests.browser.conftest import WAIT, playwright, running_studio
from tests.real_server import real_server

FILLERS = (
    "a yellow star on a purple background",
    "a cat on a white background",
    "a rocket on an orange background",
)
"""Images that are in the library before."""

COLOURS = 256
"""Of a screenshot's palette: it shows flat areas, and a quarter of the bytes is enough."""


async def generate(page: Any, prompt: str, seed: int) -> None:
    await page.get_by_role("textbox").first.fill(prompt)
    await page.get_by_label("Seed", exact=True).fill(str(seed))
    await change(page, page.get_by_role("button", name="Generate").click)


async def edit(page: Any, words: str) -> None:
    await page.get_by_label("What should change").fill(words)
    await change(page, page.locator(".edit button").click)


async def change(page: Any, act: Any) -> None:
    """Do something and wait for another image on the stage."""
    fact = page.locator("#details dd").first
    before = await fact.inner_text() if await fact.count() else ""
    await act()
    await page.wait_for_function(
        "before => { const fact = document.querySelector('#details dd'); return fact && fact.innerText !== before"
        " && !document.querySelector('.working') && document.querySelector('.frame .picture')?.naturalWidth; }",
        arg=before,
        timeout=WAIT,
    )
    await page.wait_for_timeout(600)


async def make(link: str, origin: str, folder: Path) -> None:
    async with playwright.async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        context = await browser.new_context(viewport={"width": 1440, "height": 900})
        page = await context.new_page()
        page.set_default_timeout(WAIT)
        await page.goto(link)
        await page.wait_for_selector("#prompt")
        for number, prompt in enumerate(FILLERS):
            await generate(page, prompt, number)
        await generate(page, "a red apple on a blue background", 3)
        await edit(page, "make the background yellow")
        await page.locator(".tree button").first.click()
        await page.wait_for_timeout(600)
        await edit(page, "make the background green")
        await page.get_by_role("textbox").first.fill("a red apple on a blue background")
        await page.get_by_role("button", name="Compare").click()
        await page.wait_for_timeout(600)
        await shoot(page, folder / "studio.png")
        await page.get_by_role("button", name="Mask", exact=True).click()
        box = await page.locator("canvas.mask").bounding_box()
        await page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 0.3 * box["height"])
        await page.mouse.down()
        await page.mouse.move(box["x"] + 0.7 * box["width"], box["y"] + 0.35 * box["height"], steps=8)
        await page.mouse.move(box["x"] + 0.7 * box["width"], box["y"] + 0.5 * box["height"], steps=8)
        await page.mouse.up()
        await page.emulate_media(color_scheme="dark")
        await page.wait_for_timeout(400)
        await shoot(page, folder / "studio-mask.png")
        await page.get_by_role("button", name="Clear").click()
        await page.get_by_role("button", name="Library", exact=True).click()
        await page.wait_for_timeout(600)
        await shoot(page, folder / "studio-library.png")
        await page.set_viewport_size({"width": 360, "height": 760})
        await page.emulate_media(color_scheme="light")
        await page.locator("#library .grid button").first.click()
        await page.wait_for_timeout(800)
        await shoot(page, folder / "studio-phone.png")
        await browser.close()


async def shoot(page: Any, path: Path) -> None:
    await page.screenshot(path=path)
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(COLOURS)
    small.save(path, optimize=True)


def main(argv: list[str]) -> int:
    """Start the program in a home of its own, and look at it."""
    folder = Path(argv[0] if argv else "docs/pictures")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as home, real_server(Path(home)) as place, running_studio(place) as studio:
        asyncio.run(make(studio.link, studio.origin, folder))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
