"""A person queues several calls, stops one, looks at another image, and loads the page anew meanwhile."""

from typing import Any

import pytest

from tests.browser.conftest import Open, Studio, slow_engine
from tests.browser.person import generate, shown
from tests.real_server import RealServer

pytestmark = [pytest.mark.browser, pytest.mark.anyio]


async def begin(page: Any, prompt: str, count: int = 4) -> None:
    await page.get_by_role("textbox").first.fill(prompt)
    await page.get_by_role("radio", name=str(count), exact=True).check()
    await page.get_by_role("button", name="Generate").click()


def images_of(studio: Studio, prompt: str) -> list[str]:
    with studio.library() as store:
        records, _ = store.search(prompt, limit=50)
    return [record.handle for record in records]


async def test_cancel_stops_the_call_that_is_shown_and_no_other(
    open_page: Open, studio: Studio, server: RealServer
) -> None:
    page = await open_page()
    await generate(page, "a red apple on a blue background", seed=3)
    with slow_engine(server):
        await begin(page, "a red apple on a grey background")
        await page.locator(".stage .preview[src]").wait_for()
        await begin(page, "a red star on a grey background", 2)
        await page.locator(".stage").get_by_role("button", name="Cancel").click()
        await page.get_by_text("Cancelled.").wait_for()
    await page.wait_for_function(
        "() => document.querySelector('blockquote')?.textContent === 'a red star on a grey background'"
    )
    assert await page.locator(".sheet button").count() == 2
    assert len(images_of(studio, "a red star on a grey background")) == 2
    assert len(images_of(studio, "a red apple on a grey background")) < 4


async def test_own_job_cancelled_in_the_list_is_no_error(open_page: Open, server: RealServer) -> None:
    page = await open_page()
    await generate(page, "a red apple on a blue background", seed=3)
    with slow_engine(server):
        await begin(page, "a purple apple on a grey background")
        # Pressed longer than a step takes, as a person presses.
        await page.locator(".jobs li").get_by_role("button", name="Cancel").click(delay=400)
    await page.get_by_text("Cancelled.").wait_for()
    await page.wait_for_function("() => document.querySelector('.jobs').hidden")
    assert await page.locator(".error").is_hidden()


async def test_other_images_can_be_looked_at_while_a_call_runs(open_page: Open, server: RealServer) -> None:
    page = await open_page()
    first = await generate(page, "a red apple on a blue background", seed=3)
    with slow_engine(server):
        await begin(page, "a red cat on a grey background")
        await page.locator(".stage .preview").wait_for()
        await page.locator(f"#recent [data-key={first}]").click()
        await page.locator(".frame:not(.working) .picture").wait_for()
        assert not await page.locator(".tools").evaluate("node => node.inert")
        await page.get_by_role("button", name="Watch").click()
        await page.locator(".stage .working").wait_for()
    await page.wait_for_function("() => document.querySelector('blockquote')?.textContent.startsWith('a red cat')")


async def test_call_that_waits_shows_no_preview_of_another(open_page: Open, server: RealServer) -> None:
    page, other = await open_page(), await open_page()
    await generate(page, "a red apple on a blue background", seed=3)
    with slow_engine(server):
        await begin(page, "a red cat on a grey background")
        await page.locator(".jobs img[src]").first.wait_for()
        await begin(other, "a purple cat on a grey background", 1)
        # Looked at in one go: its own turn may come at any moment.
        preview = await other.wait_for_function(
            "() => /ahead|Next/.test(document.querySelector('.progress')?.innerText)"
            " && document.querySelector('.jobs img[src]')"
            " && (document.querySelector('.stage .preview').src || 'nothing')"
        )
        assert await preview.json_value() == "nothing"


async def test_result_does_not_replace_the_image_looked_at(open_page: Open, server: RealServer) -> None:
    page = await open_page()
    first = await generate(page, "a red apple on a blue background", seed=3)
    with slow_engine(server):
        await begin(page, "a purple dog on a grey background")
        await page.locator(".jobs li").first.wait_for()
        await page.locator(f"#recent [data-key={first}]").click()
    await page.locator("#notes p").filter(has_text="Ready: a purple dog").wait_for()
    assert await shown(page) == first


async def test_result_leaves_a_person_in_the_library(open_page: Open, server: RealServer) -> None:
    page = await open_page()
    await generate(page, "a red apple on a blue background", seed=3)
    with slow_engine(server):
        await begin(page, "a white dog on a grey background", 1)
        await page.locator(".jobs li").first.wait_for()
        await page.get_by_role("button", name="Library", exact=True).click()
    ready = page.locator("#notes p").filter(has_text="Ready: a white dog")
    await ready.wait_for()
    assert await page.locator("#library").is_visible()
    await ready.get_by_role("button", name="Open").click()
    await page.locator("blockquote").get_by_text("a white dog").wait_for()


async def test_reload_in_the_middle_loses_no_image(open_page: Open, server: RealServer) -> None:
    page = await open_page()
    await generate(page, "a red apple on a blue background", seed=3)
    with slow_engine(server):
        await begin(page, "a green star on a grey background", 3)
        await page.locator(".jobs li").first.wait_for()
        await page.reload()
        await page.locator(".working").wait_for()
    await page.wait_for_function("() => document.querySelectorAll('.sheet button').length === 3")
    assert await page.locator("blockquote").inner_text() == "a green star on a grey background"


async def test_closed_tab_leaves_its_images_in_the_library(open_page: Open, studio: Studio, server: RealServer) -> None:
    page, other = await open_page(), await open_page()
    await generate(page, "a red apple on a blue background", seed=3)
    with slow_engine(server):
        await begin(page, "a blue star on a grey background", 3)
        await page.locator(".jobs li").first.wait_for()
        await page.close()
    await other.wait_for_function(
        "() => [...document.querySelectorAll('#recent img')]"
        ".filter((image) => image.alt === 'a blue star on a grey background').length === 3"
    )
    assert len(images_of(studio, "a blue star on a grey background")) == 3


async def test_more_calls_than_connections_leave_the_page_alive(open_page: Open, server: RealServer) -> None:
    page = await open_page()
    await generate(page, "a red apple on a blue background", seed=3)
    with slow_engine(server):
        for number in range(8):
            await begin(page, f"a white cat number {number}", 1)
        await page.get_by_role("button", name="Library", exact=True).click()
        await page.wait_for_function("() => document.querySelector('#library .grid img')?.naturalWidth > 0")
    await page.get_by_role("button", name="Create", exact=True).click()
    await page.wait_for_function("() => document.querySelector('blockquote')?.textContent.endsWith('number 7')")


async def test_lost_connection_loses_no_image_and_leaves_no_error(open_page: Open, server: RealServer) -> None:
    page = await open_page(allowed=("ERR_INTERNET_DISCONNECTED",))
    await generate(page, "a red apple on a blue background", seed=3)
    with slow_engine(server):
        await begin(page, "a yellow star on a grey background", 2)
        await page.locator(".jobs li").first.wait_for()
        await page.context.set_offline(True)
        await page.get_by_role("button", name="Library", exact=True).click()
        await page.locator("#model-chip").get_by_text("Not connected").wait_for()
        await page.get_by_role("button", name="Create", exact=True).click()
        await page.get_by_role("alert").filter(has_text="does not answer").wait_for()
    await page.context.set_offline(False)
    await page.wait_for_function("() => document.querySelectorAll('.sheet button').length === 2")
    await page.locator(".error").wait_for(state="hidden")
    assert await page.locator("#model-chip").inner_text() == "nano"
