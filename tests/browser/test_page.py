"""The studio in a browser, by its real server: what a person sees and does there."""

import io
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import numpy as np
import pytest
from mcp import Client
from PIL import Image, PngImagePlugin

from klein_mcp.studio import views
from tests.browser.conftest import WAIT, Studio, Watched, running_studio
from tests.real_server import RealServer

pytestmark = [pytest.mark.browser, pytest.mark.anyio]

EVIL = '<img src=x onerror="window.hurt=1"> a red apple'
"""A prompt, file name or field that would act if it ever became HTML."""

Open = Callable[..., Awaitable[Any]]


@pytest.fixture(scope="module")
def studio(server: RealServer) -> Iterator[Studio]:
    with running_studio(server) as studio:
        yield studio


@pytest.fixture(scope="module")
async def signed_in(browser: Any, studio: Studio) -> Any:
    """Cookies of a browser that came by the link."""
    context = await browser.new_context()
    page = await context.new_page()
    await page.goto(studio.link)
    await page.wait_for_url(f"{studio.origin}/studio")
    state = await context.storage_state()
    await context.close()
    return state


@pytest.fixture
async def open_page(browser: Any, studio: Studio, signed_in: Any) -> AsyncIterator[Open]:
    """open_page(width=…, …): a tab of a browser that is signed in. Checked when the test ends."""
    opened: list[Watched] = []

    async def open_page(width: int = 1440, height: int = 900, allowed: tuple[str, ...] = (), **options: Any) -> Any:
        size = {"width": width, "height": height}
        context = await browser.new_context(storage_state=signed_in, viewport=size, **options)
        watched = Watched(await context.new_page(), studio.origin, allowed=allowed)
        opened.append(watched)
        await watched.page.goto(f"{studio.origin}/studio")
        await watched.page.wait_for_selector("#prompt")
        return watched.page

    yield open_page
    for watched in opened:
        await watched.page.context.close()
    for watched in opened:
        watched.check()


# -- what a person does ---------------------------------------------------------------------------------------------


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


# -- coming in ------------------------------------------------------------------------------------------------------


async def test_link_works_once_and_leaves_no_secret_behind(browser: Any, server: RealServer) -> None:
    with running_studio(server) as fresh:
        context = await browser.new_context()
        page = await context.new_page()
        await page.goto(fresh.link)
        await page.wait_for_url(f"{fresh.origin}/studio")
        (cookie,) = await context.cookies()
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
        await context.close()
        await other_browser.close()


# -- generating -----------------------------------------------------------------------------------------------------


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


# -- changing -------------------------------------------------------------------------------------------------------


async def test_drawn_mask_changes_only_what_is_inside_it(open_page: Open, studio: Studio) -> None:
    page = await open_page()
    original = await generate(page, "a red apple on a blue background", seed=3)
    await page.get_by_role("button", name="Mask", exact=True).click()
    await drag(page, "canvas.mask", (0.15, 0.2), (0.5, 0.2), (0.5, 0.35))
    await page.get_by_text("Edit inside the mask").wait_for()
    changed = await edit(page, "make the background green")
    with studio.library() as store:
        mask = pixels(studio, views.image_details(store, changed)["mask"] or "")[:, :, 0] > 127
    before, after = pixels(studio, original), pixels(studio, changed)
    assert before.shape == after.shape
    assert mask.shape == before.shape[:2]
    # The stroke: 35 % across and 15 % down at a width of an eighth, so about 7 % of the image.
    assert 0.03 < mask.mean() < 0.15
    assert mask[int(0.2 * mask.shape[0]), int(0.3 * mask.shape[1])]
    assert not mask[int(0.7 * mask.shape[0]) :].any()
    assert np.array_equal(before[~mask], after[~mask])
    assert not np.array_equal(before[mask], after[mask])


async def test_drawn_box_becomes_a_region(open_page: Open, studio: Studio) -> None:
    page = await open_page()
    original = await generate(page, "a red apple on a blue background", seed=3)
    await page.get_by_role("button", name="Mask", exact=True).click()
    await page.get_by_role("radio", name="Box").check()
    await drag(page, "canvas.mask", (0.5, 0.5), (1.0, 1.0))
    changed = await edit(page, "make the background yellow")
    with studio.library() as store:
        x, y, width, height = views.image_details(store, changed)["region"] or []
    side = pixels(studio, original).shape[0]
    assert abs(x - side / 2) <= 2
    assert abs(y - side / 2) <= 2
    assert x + width <= side
    assert y + height <= side


async def test_mask_is_drawn_by_keyboard_alone(open_page: Open) -> None:
    page = await open_page()
    await generate(page, "a red apple on a blue background", seed=3)
    await page.get_by_role("button", name="Mask", exact=True).focus()
    await page.keyboard.press("Enter")
    assert await page.evaluate("document.activeElement.className") == "mask"
    for key in ("ArrowLeft", " ", "ArrowLeft", " ", "]", "ArrowUp", " ", "e", "ArrowDown", " "):
        await page.keyboard.press(key)
    await page.get_by_text("Edit inside the mask").wait_for()
    for _ in range(4):
        await page.keyboard.press("z")
    await page.locator("#edit-words").get_by_text("Edit", exact=True).wait_for()


async def test_slider_compares_with_an_ancestor(open_page: Open) -> None:
    page = await open_page()
    await generate(page, "a red apple on a blue background", seed=3)
    await edit(page, "make the background yellow")
    await page.get_by_role("button", name="Compare").click()
    slider = page.get_by_label("Before and after")
    await page.wait_for_function("() => document.querySelector('.before')?.naturalWidth > 0")
    await slider.focus()
    colours = {}
    for key in ("Home", "End"):
        await page.keyboard.press(key)
        shot = Image.open(io.BytesIO(await page.locator(".frame").screenshot())).convert("RGB")
        colours[key] = np.asarray(shot)[-30:-10, 10:30].mean(axis=(0, 1))
    # Fully to the left everything is after, yellow; fully to the right everything is before, blue.
    assert colours["Home"][2] < 120 < colours["Home"][0]
    assert colours["End"][2] > 120 > colours["End"][0]


async def test_changed_pixels_are_counted_and_shown(open_page: Open) -> None:
    page = await open_page()
    await generate(page, "a red apple on a blue background", seed=3)
    await page.get_by_role("button", name="Mask", exact=True).click()
    await page.get_by_role("radio", name="Box").check()
    await drag(page, "canvas.mask", (0.4, 0.4), (1.0, 1.0))
    await edit(page, "make the background yellow")
    await page.locator("#details .changed").get_by_text(re.compile("% of the marked part changed")).wait_for()
    await page.get_by_role("button", name="Changes").click()
    await page.wait_for_function("() => document.querySelector('img.changes')?.naturalWidth > 0")


async def test_cut_out_leaves_the_subject_on_nothing(open_page: Open, studio: Studio) -> None:
    page = await open_page()
    for prompt in ("a rocket on a yellow background", "a cat in the snow"):
        await generate(page, prompt, seed=5)
        assert await page.locator(".frame.checker").count() == 0
        cut = await new_image(page, page.get_by_role("button", name="Cut out").click)
        with studio.library() as store:
            image = Image.open(io.BytesIO(store.read(store.get(cut))))
        assert image.mode == "RGBA"
        alpha = np.asarray(image)[..., 3]
        assert max(alpha[0].max(), alpha[-1].max(), alpha[:, 0].max(), alpha[:, -1].max()) == 0
        assert 0.03 < (alpha > 127).mean() < 0.5
        # The page shows it on its checkered ground, and offers no second cut.
        assert await page.locator(".frame.checker .picture").count() == 1
        assert await page.get_by_role("button", name="Cut out").count() == 0
        # First comes the result's preview, on grey; then the image itself.
        await page.wait_for_function(
            """() => { const image = document.querySelector('.frame .picture');
            if (image.naturalWidth !== 128) return false;
            const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight).getContext('2d');
            canvas.drawImage(image, 0, 0);
            return canvas.getImageData(0, 0, 1, 1).data[3] === 0; }"""
        )


async def test_branches_of_an_image_stand_in_its_tree(open_page: Open, studio: Studio) -> None:
    page = await open_page()
    root = await generate(page, "a red apple on a blue background", seed=9)
    first = await edit(page, "make the background yellow")
    await page.locator(".tree li").nth(0).get_by_role("button").click()
    await page.wait_for_function(
        "handle => document.querySelector('#details dd')?.textContent.startsWith(handle)", arg=root
    )
    second = await edit(page, "make the background green")
    await page.wait_for_function("() => document.querySelectorAll('.tree li').length === 3")
    with studio.library() as store:
        assert store.get(first).parents == (root,)
        assert store.get(second).parents == (root,)
    assert await page.locator(".tree [aria-current]").count() == 1


async def test_two_images_of_the_library_are_combined(open_page: Open, studio: Studio) -> None:
    page = await open_page()
    one = await generate(page, "a red apple on a yellow background", seed=21)
    other = await generate(page, "a rocket on a orange background", seed=22)
    await page.get_by_role("button", name="Library", exact=True).click()
    await page.get_by_role("button", name="Select").click()
    tiles = page.locator("#library .grid button")
    await tiles.nth(1).click()
    await tiles.nth(0).click()
    await page.get_by_text("2 selected").wait_for()
    await page.get_by_role("button", name="Combine").click()
    await page.wait_for_function("() => document.querySelectorAll('.references img').length === 2")
    handle = await generate(page, "the apple from image 1 to the left of the rocket from image 2 on a blue background")
    with studio.library() as store:
        record = store.get(handle)
    assert record.tool == "compose_references"
    assert set(record.parents) == {one, other}


async def test_variations_make_a_sheet_and_again_makes_one(open_page: Open, studio: Studio) -> None:
    page = await open_page()
    await generate(page, "a purple star on a white background", seed=31)
    await new_image(page, page.get_by_role("button", name="Variations").click)
    await page.wait_for_function("() => document.querySelectorAll('.sheet button').length === 4")
    handle = await new_image(page, page.get_by_role("button", name="New seed").click)
    with studio.library() as store:
        assert store.get(handle).prompt == "a purple star on a white background"


# -- keeping --------------------------------------------------------------------------------------------------------


async def test_image_is_downloaded_and_saved_in_full(open_page: Open, studio: Studio) -> None:
    page = await open_page()
    handle = await generate(page, "a red apple on a blue background", seed=3)
    async with page.expect_download() as started:
        await page.get_by_role("button", name="Download").click()
    download = await started.value
    assert download.suggested_filename == f"{handle}.png"
    with studio.library() as store:
        assert (await download.path()).read_bytes() == store.read(store.get(handle))
    await page.get_by_role("button", name="Save to folder").click()
    await page.get_by_label("File name").fill("kept/apple.png")
    await page.get_by_role("button", name="Save", exact=True).click()
    await page.get_by_text("Saved as").wait_for()
    saved = np.asarray(Image.open(studio.folder / "kept" / "apple.png").convert("RGB"))
    assert np.array_equal(saved, pixels(studio, handle))


async def test_deleting_asks_first(open_page: Open, studio: Studio) -> None:
    page = await open_page()
    handle = await generate(page, "a red apple on a blue background", seed=3)
    await page.get_by_role("button", name="Delete").click()
    await page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    with studio.library() as store:
        assert store.get(handle).deleted is None
    await page.get_by_role("button", name="Delete").click()
    await page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    await page.wait_for_function("() => document.querySelector('#details').hidden")
    with studio.library() as store:
        record = store.find(handle)
    assert record is not None
    assert record.deleted is not None


# -- beside others --------------------------------------------------------------------------------------------------


async def test_second_tab_shows_the_image_without_reload(open_page: Open) -> None:
    page, other = await open_page(), await open_page()
    count = await other.locator("#recent li").count()
    await generate(page, "a green cat on a white background", seed=41)
    await other.wait_for_function(
        "() => document.querySelector('#recent img')?.alt === 'a green cat on a white background'"
    )
    assert await other.locator("#recent li").count() >= min(9, count + 1)
    assert not await other.locator("#details dd").count()


async def test_agent_beside_is_watched_and_its_images_appear(open_page: Open, server: RealServer) -> None:
    page = await open_page()
    await page.evaluate(
        "() => { window.cards = []; new MutationObserver(() => { const job = document.querySelector('.jobs li');"
        " if (job) cards.push({ words: job.innerText, preview: Boolean(job.querySelector('img')) }); })"
        ".observe(document.querySelector('.jobs'), { subtree: true, childList: true }); }"
    )
    async with Client(server.stdio()) as client:
        made = line(await client.call_tool("generate_image", {"prompt": "a white dog on a purple background"}))
    await page.wait_for_function(
        "() => document.querySelector('#recent img')?.alt === 'a white dog on a purple background'"
    )
    cards = await page.evaluate("cards")
    assert any("an agent" in card["words"] and "a white dog" in card["words"] for card in cards)
    assert any(card["preview"] for card in cards)
    await page.locator("#recent li button").first.click()
    await page.wait_for_function(
        "handle => document.querySelector('#details dd')?.textContent.startsWith(handle)", arg=made["image"]
    )


async def test_agent_hears_once_which_draft_was_picked(open_page: Open, server: RealServer) -> None:
    page = await open_page()
    async with Client(server.stdio()) as client:
        made = line(
            await client.call_tool("generate_image", {"prompt": "a blue cat on a white background", "count": 3})
        )
        drafts = [each["image"] for each in made["images"]]
        await open_image(page, drafts[0])
        await page.locator(".sheet button").nth(1).click()
        await page.wait_for_function(
            "handle => document.querySelector('#details dd')?.textContent.startsWith(handle)", arg=drafts[1]
        )
        await page.get_by_role("button", name="Pick", exact=True).click()
        await page.locator("#details .picked").wait_for()
        seen = line(await client.call_tool("view_image", {"image": "last"}))
        assert seen["image"] == drafts[1]
        assert seen["picked"] == {"image": drafts[1]}
        assert "picked" not in line(await client.call_tool("view_image", {"image": "last"}))


# -- what others send ---------------------------------------------------------------------------------------------


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
        "async ([type, selector]) => { const canvas = new OffscreenCanvas(96, 96);"
        " canvas.getContext('2d').fillRect(0, 0, 40 + 40 * (type === 'drop'), 40);"
        " const file = new File([await canvas.convertToBlob()], 'one.png', { type: 'image/png' });"
        " const data = new DataTransfer(); data.items.add(file);"
        " const event = type === 'paste' ? new ClipboardEvent('paste', { clipboardData: data, bubbles: true })"
        " : new DragEvent(type, { dataTransfer: data, bubbles: true, cancelable: true });"
        " document.querySelector(selector).dispatchEvent(event); }"
    )
    await page.evaluate(put, ["drop", ".stage"])
    await page.wait_for_function("() => document.querySelectorAll('.references img').length === 1")
    await page.evaluate(put, ["paste", "#prompt"])
    await page.wait_for_function("() => document.querySelectorAll('.references img').length === 2")
    await page.get_by_label("Remove reference 1").click()
    await page.wait_for_function("() => document.querySelectorAll('.references img').length === 1")


# -- looks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1440])
async def test_every_view_is_accessible_and_fits(open_page: Open, axe: str, width: int, scheme: str) -> None:
    page = await open_page(width=width, height=800, color_scheme=scheme, bypass_csp=True)
    await page.locator("#recent li button").first.click()
    await page.wait_for_selector(".frame .picture")
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


async def test_library_scrolls_on_and_finds_words(open_page: Open, studio: Studio) -> None:
    with studio.library() as store:
        for number in range(55):
            file = io.BytesIO()
            Image.new("RGB", (64, 64), (number, 90, 200)).save(file, "PNG")
            handle = store.new_handle()
            store.put(
                file.getvalue(),
                handle=handle,
                pixels=handle,
                size=(64, 64),
                client="filler",
                tool="generate_image",
                recipe={"seed": str(1000 * number)},
                prompt=f"filler number {number:02}",
            )
    page = await open_page()
    await page.get_by_role("button", name="Library", exact=True).click()
    await page.wait_for_function("() => document.querySelectorAll('#library .grid li').length >= 40")
    # As a person scrolls, who goes on where news of an image put the list back to its first page.
    await page.wait_for_function(
        """() => { document.querySelector('#library').scrollTo(0, 1e6);
        return document.querySelectorAll('#library .grid li').length >= 55; }"""
    )
    await page.get_by_label("Search").fill("filler 07")
    await page.wait_for_function("() => document.querySelectorAll('#library .grid li').length === 1")


async def test_ended_session_is_explained(browser: Any, server: RealServer, signed_in: Any) -> None:
    with running_studio(server) as fresh:
        context = await browser.new_context()
        page = await context.new_page()
        page.set_default_timeout(WAIT)
        await page.goto(fresh.link)
        await page.wait_for_url(f"{fresh.origin}/studio")
        await context.clear_cookies()
        await page.get_by_role("textbox").first.fill("a red apple")
        await page.get_by_role("button", name="Generate").click()
        await page.get_by_role("alert").get_by_text(re.compile("session has ended")).wait_for()
        await context.close()
