"""Files and words of others enter the page."""

import io
import json

import pytest
from PIL import Image, PngImagePlugin

from tests.browser.conftest import Open, Studio
from tests.browser.person import generate

pytestmark = [pytest.mark.browser, pytest.mark.anyio]

EVIL = '<img src=x onerror="window.hurt=1"> a red apple'
"""A prompt, file name or field that would act if it ever became HTML."""


async def test_prompts_file_names_and_metadata_never_become_html(open_page: Open, studio: Studio) -> None:
    page = await open_page()
    await generate(page, EVIL, seed=1)
    assert await page.locator("blockquote").inner_text() == EVIL
    await page.get_by_label("What should change").fill(EVIL)
    info = PngImagePlugin.PngInfo()
    info.add_text("klein-mcp", json.dumps({"prompt": EVIL, "model": EVIL, "seed": EVIL, "image": EVIL}))
    info.add_itxt("XML:com.adobe.xmp", f"<x:xmpmeta xmlns:x='adobe:ns:meta/'>{EVIL}</x:xmpmeta>")
    file = io.BytesIO()
    Image.new("RGB", (128, 128), (10, 200, 90)).save(file, "PNG", pnginfo=info)
    upload = {"name": f"{EVIL}.png", "mimeType": "image/png", "buffer": file.getvalue()}
    await page.locator("#files").set_input_files([upload])
    await page.wait_for_function("() => document.querySelectorAll('.references img').length === 1")
    await page.get_by_role("button", name="Library", exact=True).click()
    await page.locator("#library .grid button").first.click()
    await page.wait_for_timeout(300)
    assert await page.evaluate("window.hurt") is None
    assert await page.locator("img[src=x]").count() == 0


async def test_images_come_by_drop_and_paste(open_page: Open) -> None:
    page = await open_page()
    put = (
        "async ([type, selector, words]) => { const canvas = new OffscreenCanvas(96, 96);"
        " canvas.getContext('2d').fillRect(0, 0, 40 + 40 * (type === 'drop'), 40);"
        " const file = new File([await canvas.convertToBlob()], 'one.png', { type: 'image/png' });"
        " const data = new DataTransfer(); data.items.add(file);"
        " if (words) data.setData('text/plain', words);"
        " if (words?.includes(' ')) data.setData('text/html', words);"
        " const event = type === 'paste' ? new ClipboardEvent('paste', { clipboardData: data, bubbles: true })"
        " : new DragEvent(type, { dataTransfer: data, bubbles: true, cancelable: true });"
        " document.querySelector(selector).dispatchEvent(event); }"
    )
    await page.evaluate(put, ["drop", ".stage"])
    await page.wait_for_function("() => document.querySelectorAll('.references img').length === 1")
    await page.evaluate(put, ["paste", "#prompt", "cells of a spreadsheet"])
    await page.evaluate(put, ["paste", "#prompt", "name-of-a-copied-file.png"])
    await page.wait_for_function("() => document.querySelectorAll('.references img').length === 2")
    await page.get_by_label("Remove reference 2").click()
    await page.wait_for_function("() => document.querySelectorAll('.references img').length === 1")
    await page.get_by_role("button", name="Library", exact=True).click()
    await page.evaluate(put, ["paste", "body", "words that nothing here takes"])
    assert await page.locator("#create").is_visible(), "where the reference is"
    await page.wait_for_function("() => document.querySelectorAll('.references img').length === 2")
    await page.get_by_label("Remove reference 1").click()
    await page.wait_for_function("() => document.querySelectorAll('.references img').length === 1")


async def test_image_of_the_page_is_dragged_into_the_prompt(open_page: Open, studio: Studio) -> None:
    page = await open_page()
    handle = await generate(page, "a red apple on a blue background", seed=3)
    await page.drag_and_drop(f"#recent [data-key={handle}] img", "#prompt")
    await page.locator(".references img").wait_for()
    changed = await generate(page, "make the background green")
    with studio.library() as store:
        assert store.get(changed).parents == (handle,), "the image itself, not a copy of its thumbnail"


async def test_words_of_any_script_read_in_their_direction_and_whole(open_page: Open) -> None:
    page = await open_page()
    words = "תפוח אדום על רקע כחול!"
    await generate(page, words, seed=1)
    for selector in ("#prompt", "blockquote"):
        assert await page.locator(selector).evaluate("node => getComputedStyle(node).direction") == "rtl"
    family = "\U0001f469\u200d\U0001f469\u200d\U0001f467"
    await page.get_by_role("textbox").first.fill(family * 200)
    await page.get_by_role("button", name="Copy prompt").focus()
    await generate(page, family * 100, seed=1)
    for text in await page.locator("#notes p").all_inner_texts():
        assert "\ufffd" not in text
        text.encode()  # half an emoji is no text


async def test_prompt_that_is_too_long_is_refused_and_kept(open_page: Open) -> None:
    page = await open_page()
    words = "a red apple " * 400
    await page.get_by_role("textbox").first.fill(words)
    await page.get_by_role("button", name="Generate").click()
    await page.get_by_role("alert").get_by_text("4000").wait_for()
    assert await page.get_by_role("textbox").first.input_value() == words
