"""Errors are explained, cover no control and lose nothing."""

import io
from typing import Any

import pytest
from PIL import Image

from tests.browser.conftest import WAIT, Open, Studio, running_studio
from tests.browser.person import generate, new_image, visit
from tests.embedded import MAX_REFERENCES
from tests.real_server import RealServer

pytestmark = [pytest.mark.browser, pytest.mark.anyio]

COVERED = """() => [...document.querySelectorAll('.tools button, .edit *, #composer button, #composer textarea')]
    .filter((node) => { const box = node.getBoundingClientRect();
        return box.width && [...document.querySelectorAll('#notes p')].some((note) => {
            const over = note.getBoundingClientRect();
            return over.left < box.right && over.right > box.left
                && over.top < box.bottom && over.bottom > box.top; }); })
    .map((node) => node.outerHTML.slice(0, 80))"""


@pytest.mark.parametrize("width", [360, 800, 1440])
async def test_messages_cover_no_action_and_do_not_pile_up(open_page: Open, width: int) -> None:
    page = await open_page(width=width, height=800)
    await page.get_by_role("textbox").first.fill("a red apple on a blue background")
    await new_image(page, page.get_by_role("button", name="Generate").click)
    await page.evaluate("scrollTo(0, 0); document.querySelector('.around').scrollIntoView({ block: 'start' })")
    # Each prompt has other unknown words, so each result another warning.
    for words in ("sextant", "theodolite", "bassoon", "samovar"):
        await page.evaluate(
            "words => { document.getElementById('prompt').value = `a red apple beside a ${words}`; }", words
        )
        await new_image(page, lambda: page.evaluate("document.querySelector('#composer form').requestSubmit()"))
        await page.locator("#notes p").filter(has_text=words).wait_for()
        assert 1 <= await page.locator("#notes p").count() <= 3
        assert not await page.evaluate(COVERED)


async def test_endless_word_does_not_fill_the_screen(open_page: Open) -> None:
    page = await open_page()
    await generate(page, "a red apple " + "x" * 3900, seed=3)
    note = page.locator("#notes p").first
    await note.wait_for()
    assert (await note.bounding_box())["height"] < 120
    assert "…" in await note.inner_text()


async def test_server_that_is_gone_is_explained_and_marked(browser: Any, server: RealServer) -> None:
    with running_studio(server) as fresh:
        page = await visit(browser, fresh)
        chip = page.locator("#model-chip")
        await chip.get_by_text("nano").wait_for()
        await page.get_by_role("textbox").first.fill("a red apple")
        fresh.process.terminate()
        fresh.process.wait(WAIT / 1000)
        await chip.get_by_text("Not connected").wait_for()
        await page.get_by_role("button", name="Generate").click()
        words = await page.get_by_role("alert").filter(has_text="does not answer").inner_text()
        assert "klein-mcp studio" in words
        assert "Failed to fetch" not in await page.locator("body").inner_text()
        assert await page.get_by_role("textbox").first.input_value() == "a red apple"
        await page.context.close()


async def test_error_shows_in_every_view_until_the_next_call(open_page: Open) -> None:
    page = await open_page(allowed=("503",))
    error = page.get_by_role("alert")

    async def refuse(route: Any) -> None:
        await route.fulfill(status=503, json={"error": "Out of order."})

    async def keep_waiting(route: Any) -> None:
        """Answer nothing."""

    await page.route("**/studio/read?uri=klein%3A%2F%2Fengine", refuse)
    await page.get_by_role("button", name="Engine", exact=True).click()
    await error.get_by_text("Out of order.").wait_for()
    await page.get_by_role("button", name="Library", exact=True).click()
    assert await error.is_visible()
    await page.get_by_role("button", name="Create", exact=True).click()
    assert await error.is_visible()
    await page.route("**/studio/call", keep_waiting)
    await page.get_by_role("textbox").first.fill("a red apple")
    await page.get_by_role("button", name="Generate").click()
    await error.wait_for(state="hidden")


async def test_error_is_in_sight_on_a_phone_that_scrolled(open_page: Open) -> None:
    page = await open_page(width=360, height=740)
    generate = page.get_by_role("button", name="Generate")
    await page.get_by_role("textbox").first.fill("a red apple on a blue background")
    await new_image(page, generate.click)
    await page.get_by_role("textbox").first.fill("a red apple " * 400)
    await generate.click()
    await page.get_by_role("alert").get_by_text("4000").wait_for()
    await page.evaluate("scrollTo(0, 1e6)")
    box = await page.get_by_role("alert").bounding_box()
    assert 0 <= box["y"] < 740


async def test_reload_keeps_image_prompt_and_references(open_page: Open) -> None:
    page = await open_page()
    handle = await generate(page, "a red apple on a blue background", seed=3)
    await page.get_by_role("button", name="Use in prompt").click()
    await page.locator(".references img").wait_for()
    await page.get_by_role("textbox").first.fill("the apple from image 1 on a green background")
    await page.get_by_role("radio", name="2", exact=True).check()
    await page.locator("#change").fill("make the background yellow")
    await page.get_by_label("Model", exact=True).select_option("nano")
    await page.reload()
    await page.wait_for_function(
        "handle => document.querySelector('#details dd')?.textContent.startsWith(handle)", arg=handle
    )
    await page.wait_for_function("() => document.getElementById('change').value === 'make the background yellow'")
    assert await page.get_by_role("textbox").first.input_value() == "the apple from image 1 on a green background"
    assert await page.locator(".references img").count() == 1
    assert await page.get_by_role("radio", name="2", exact=True).is_checked()
    await page.wait_for_function("() => document.getElementById('model').value === 'nano'")
    assert await page.get_by_label("Seed", exact=True).input_value() == "3"
    await page.get_by_role("button", name="Library", exact=True).click()
    await page.reload()
    await page.locator("#library li").first.wait_for()


async def test_every_dropped_file_that_fails_is_named(open_page: Open) -> None:
    page = await open_page(allowed=("400",))
    good = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 90, 20)).save(good, "PNG")
    files = [
        {"name": "broken.png", "mimeType": "image/png", "buffer": b"no image at all"},
        {"name": "good.png", "mimeType": "image/png", "buffer": good.getvalue()},
        {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"words"},
    ]
    await page.locator("#files").set_input_files(files)
    words = await page.get_by_role("alert").filter(has_text="broken.png").inner_text()
    assert "broken.png: " in words
    assert "notes.txt: " in words
    assert "good.png" not in words
    assert await page.locator(".references img").count() == 1


async def test_files_beyond_what_the_model_takes_are_not_uploaded(open_page: Open, studio: Studio) -> None:
    page = await open_page()
    uploads: list[str] = []
    page.on("request", lambda request: uploads.append(request.url) if request.url.endswith("/upload") else None)
    files = []
    for number in range(MAX_REFERENCES + 3):
        data = io.BytesIO()
        Image.new("RGB", (64, 64), (40 * number, 90, 200)).save(data, "PNG")
        files.append({"name": f"{number}.png", "mimeType": "image/png", "buffer": data.getvalue()})
    await page.locator("#files").set_input_files(files)
    await page.get_by_text(f"The model takes {MAX_REFERENCES} references.").wait_for()
    assert await page.locator(".references img").count() == len(uploads) == MAX_REFERENCES


async def test_every_example_is_painted_as_it_says(open_page: Open, studio: Studio) -> None:
    page = await open_page()
    examples = await page.locator(".welcome button").all_inner_texts()
    assert len(examples) >= 3
    for words in examples:
        handle = await generate(page, words)
        assert not await page.locator("#notes p").count(), await page.locator("#notes").inner_text()
        with studio.library() as store:
            assert store.get(handle).recipe.get("read_as") in (None, words)
