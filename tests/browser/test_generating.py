"""A person comes in by the link and generates images."""

import json
import re
from typing import Any

import numpy as np
import pytest

from tests.browser.conftest import WAIT, Open, Studio, running_studio
from tests.browser.person import generate, new_image, pixels, visit
from tests.klein_mcp.front_ends import serving_process
from tests.real_server import RealServer

pytestmark = [pytest.mark.browser, pytest.mark.anyio]


async def test_link_works_once_and_leaves_no_secret_behind(browser: Any, server: RealServer) -> None:
    with running_studio(server) as fresh:
        page = await visit(browser, fresh)
        (cookie,) = await page.context.cookies()
        assert cookie["httpOnly"]
        assert cookie["sameSite"] == "Strict"
        for secret in (cookie["value"], fresh.link.rsplit("/", 1)[1]):
            assert secret not in await page.content()
            assert secret not in page.url
        assert await page.evaluate("document.cookie") == ""
        assert (await page.goto(fresh.link)).status == 403
        other_browser = await browser.new_context()
        other = await other_browser.new_page()
        assert (await other.goto(f"{fresh.origin}/studio")).status == 401
        await page.context.close()
        await other_browser.close()


async def test_previews_arrive_before_the_image(open_page: Open) -> None:
    page = await open_page()
    await page.evaluate(
        "() => { window.seen = []; new MutationObserver(() => {"
        " const src = document.querySelector('.working .preview')?.getAttribute('src');"
        " if (src && seen.at(-1) !== src) seen.push(src); })"
        ".observe(document.body, { subtree: true, childList: true, attributes: true }); }"
    )
    await generate(page, "a red apple on a blue background", seed=11)
    previews = await page.evaluate("seen")
    assert len(previews) >= 2
    assert all(src.startswith("data:image/") for src in previews)


async def test_first_text_box_is_the_prompt_and_examples_fill_it(open_page: Open) -> None:
    page = await open_page()
    await page.locator(".welcome button").first.click()
    prompt = page.get_by_role("textbox").first
    assert await prompt.input_value()
    assert await prompt.get_attribute("id") == "prompt"
    assert await page.locator("form button.go").inner_text() == "Generate"


async def test_same_seed_gives_the_same_image(open_page: Open, studio: Studio) -> None:
    page = await open_page()
    first = await generate(page, "a yellow star on a red background", seed=5)
    again = await generate(page, "a yellow star on a red background", seed=5)
    assert first != again
    assert np.array_equal(pixels(studio, first), pixels(studio, again))


async def test_cancel_stops_the_job(open_page: Open, server: RealServer) -> None:
    page = await open_page()
    await page.get_by_role("textbox").first.fill("a green house on a grey background")
    await page.get_by_role("radio", name="4", exact=True).check()
    await page.get_by_role("button", name="Generate").click()
    await page.locator(".stage").get_by_role("button", name="Cancel").click()
    await page.get_by_text("Cancelled.").wait_for()
    await page.wait_for_function("() => !document.querySelector('.working')")
    await page.wait_for_function("() => document.querySelector('.jobs').hidden")


async def test_error_is_explained_and_can_be_dismissed(open_page: Open) -> None:
    page = await open_page()
    await page.get_by_role("textbox").first.fill("a red apple")
    await page.get_by_label("Shape", exact=True).select_option("exact")
    await page.get_by_label("Width").fill("32")
    await page.get_by_role("button", name="Generate").click()
    error = page.get_by_role("alert")
    await error.get_by_text("width").wait_for()
    await error.get_by_role("button", name="Dismiss").click()
    await error.wait_for(state="hidden")


async def test_variations_make_a_sheet_and_again_makes_one(open_page: Open, studio: Studio) -> None:
    page = await open_page()
    await generate(page, "a purple star on a white background", seed=31)
    await new_image(page, page.get_by_role("button", name="Variations").click)
    await page.wait_for_function("() => document.querySelectorAll('.sheet button').length === 4")
    handle = await new_image(page, page.get_by_role("button", name="New seed").click)
    with studio.library() as store:
        assert store.get(handle).prompt == "a purple star on a white background"


async def test_ended_session_is_explained(browser: Any, server: RealServer, signed_in: Any) -> None:
    with running_studio(server) as fresh:
        page = await visit(browser, fresh)
        await page.context.clear_cookies()
        await page.get_by_role("textbox").first.fill("a red apple")
        await page.get_by_role("button", name="Generate").click()
        await page.get_by_role("alert").get_by_text(re.compile("session has ended")).wait_for()
        await page.context.close()


async def test_second_link_leaves_the_first_tab_working(browser: Any, server: RealServer) -> None:
    with serving_process(server):
        links = [server.run("-m", "klein_mcp", "studio", "--no-browser").stdout.strip() for _ in range(2)]
        context = await browser.new_context()
        tabs = [await context.new_page() for _ in links]
        for tab, link in zip(tabs, links, strict=True):
            tab.set_default_timeout(WAIT)
            await tab.goto(link)
            await tab.wait_for_url("**/studio")
            await tab.wait_for_selector("#prompt")
        assert await generate(tabs[0], "a red apple on a blue background")
        await context.close()


async def test_examples_follow_the_chosen_model(open_page: Open) -> None:
    page = await open_page()
    await page.locator(".welcome button").first.wait_for()
    examples = await page.locator(".welcome button").all_inner_texts()
    await page.route("**/studio/read?uri=klein%3A%2F%2Fengine", also_installed)
    await page.reload()
    model = page.get_by_label("Model", exact=True)
    await model.locator("option[value=klein-4b]").wait_for(state="attached")
    assert await page.locator(".welcome button").all_inner_texts() == examples
    await model.select_option("klein-4b")
    others = await page.locator(".welcome button").all_inner_texts()
    assert len(others) == len(examples)
    assert not set(others) & set(examples)
    assert await page.get_by_role("textbox").first.get_attribute("placeholder") == others[0]


async def also_installed(route: Any) -> None:
    """Let the server's answer pass, but for klein-4b, which is called installed."""
    answer = await route.fetch()
    contents = (await answer.json())["contents"]
    engine = json.loads(contents[0]["text"])
    for model in engine["models"]:
        model["installed"] |= model["name"] == "klein-4b"
    contents[0]["text"] = json.dumps(engine)
    await route.fulfill(json={"contents": contents})


async def test_screen_reader_hears_that_the_image_is_ready(open_page: Open) -> None:
    page = await open_page()
    announced = page.locator("#announced")
    await page.get_by_role("textbox").first.fill("a green apple on a white background")
    await page.get_by_role("button", name="Generate").click()
    await announced.get_by_text("Ready: a green apple on a white background").wait_for(state="attached")
    assert await announced.get_attribute("role") == "status"


async def test_prompt_is_copied(open_page: Open) -> None:
    page = await open_page(permissions=["clipboard-read", "clipboard-write"])
    await generate(page, "a green apple on a white background", seed=4)
    await page.get_by_role("button", name="Copy prompt").click()
    await page.get_by_text("Copied a green apple").wait_for()
    assert await page.evaluate("navigator.clipboard.readText()") == "a green apple on a white background"
