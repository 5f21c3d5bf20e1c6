"""A person edits images: masks, regions, comparisons, branches, combinations."""

import io
import re

import numpy as np
import pytest
from mcp import Client
from PIL import Image

from klein_mcp.studio import views
from tests.browser.conftest import Open, Studio
from tests.browser.person import drag, edit, generate, new_image, open_image, pixels
from tests.embedded import SIDE
from tests.real_server import RealServer
from tests.tool_calls import call

pytestmark = [pytest.mark.browser, pytest.mark.anyio]


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


async def test_mask_counts_until_it_is_cleared_and_reaches_every_corner(open_page: Open, studio: Studio) -> None:
    page = await open_page()
    original = await generate(page, "a red apple on a blue background", seed=3)
    await page.get_by_role("button", name="Mask", exact=True).click()
    await drag(page, "canvas.mask", (0.8, 0.97), (0.99, 0.97))
    await page.get_by_role("button", name="Done").click()
    assert await page.locator(".frame .mask").count() == 1
    await page.locator("#edit-words").get_by_text("Edit inside the mask").wait_for()
    changed = await edit(page, "make the background yellow")
    before, after = pixels(studio, original), pixels(studio, changed)
    assert np.array_equal(before[: before.shape[0] // 2], after[: before.shape[0] // 2])
    assert not np.array_equal(before[-2, -4], after[-2, -4])
    await page.locator("#edit-words").get_by_text("Edit", exact=True).wait_for()
    await page.get_by_role("button", name="Mask", exact=True).click()
    await drag(page, "canvas.mask", (0.2, 0.2), (0.4, 0.2))
    await page.get_by_role("button", name="Clear").click()
    await page.get_by_role("button", name="Done").click()
    assert await page.locator(".frame .mask").count() == 0


async def test_begun_edit_is_there_again_after_a_look_at_another_image(open_page: Open) -> None:
    page = await open_page()
    first = await generate(page, "a red apple on a blue background", seed=3)
    second = await generate(page, "a red apple on a blue background", seed=4)
    words, change = page.locator("#edit-words"), page.locator("#change")
    await page.get_by_role("button", name="Mask", exact=True).click()
    await drag(page, "canvas.mask", (0.2, 0.2), (0.4, 0.2))
    await change.fill("make the background green")
    await page.locator(f"#recent [data-key={first}]").click()
    await page.locator("#details dd").first.get_by_text(first).wait_for()
    assert (await words.inner_text(), await change.input_value()) == ("Edit", "")
    await page.locator(f"#recent [data-key={second}]").click()
    await words.get_by_text("Edit inside the mask").wait_for()
    assert await change.input_value() == "make the background green"
    assert await page.locator(".frame .mask").count() == 1
    await new_image(page, page.locator(".edit button").click)
    assert (await words.inner_text(), await change.input_value()) == ("Edit", "")


async def test_drawn_box_becomes_a_region(open_page: Open, studio: Studio) -> None:
    page = await open_page()
    original = await generate(page, "a red apple on a blue background", seed=3)
    await page.get_by_role("button", name="Mask", exact=True).click()
    await page.get_by_role("radio", name="Box").check()
    await drag(page, "canvas.mask", (0.5, 0.5), (1.05, 1.05))
    changed = await edit(page, "make the background yellow")
    with studio.library() as store:
        x, y, width, height = views.image_details(store, changed)["region"] or []
    side = pixels(studio, original).shape[0]
    assert abs(x - side / 2) <= 2
    assert abs(y - side / 2) <= 2
    assert x + width == side
    assert y + height == side


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


async def test_before_of_another_shape_is_not_stretched(open_page: Open) -> None:
    page = await open_page()
    await page.get_by_label("Shape", exact=True).select_option("21:9")
    await generate(page, "a rocket on an orange background", seed=2)
    await page.get_by_label("Shape", exact=True).select_option("1:1")
    await page.get_by_role("button", name="Use in prompt").click()
    await page.locator(".references img").wait_for()
    await generate(page, "the rocket from image 1 on a blue background")
    await page.get_by_role("button", name="Compare").click()
    await page.wait_for_function("() => document.querySelector('.before')?.naturalWidth > 0")
    await page.get_by_label("Before and after").press("End")
    shot = np.asarray(Image.open(io.BytesIO(await page.locator(".frame").screenshot())).convert("RGB"))
    middle, top = shot[shot.shape[0] // 2, 30], shot[60, shot.shape[1] // 2]
    assert middle[0] > 200 > middle[2]
    # Above a flat image is the frame's own quiet ground, neither before nor after.
    assert int(top.max()) - int(top.min()) < 20


async def test_before_that_is_transparent_hides_what_came_after(open_page: Open) -> None:
    page = await open_page()
    await generate(page, "a rocket on a yellow background", seed=5)
    await new_image(page, page.get_by_role("button", name="Cut out").click)
    await edit(page, "make the background blue")
    await page.get_by_role("button", name="Compare").click()
    await page.wait_for_function("() => document.querySelector('.before')?.naturalWidth > 0")
    await page.get_by_label("Before and after").press("End")
    shot = np.asarray(Image.open(io.BytesIO(await page.locator(".frame").screenshot())).convert("RGB"))
    corner = shot[60:100, 20:60].reshape(-1, 3).astype(int)
    assert (corner.max(axis=1) - corner.min(axis=1)).max() < 20, "the checkered ground, not the blue one"
    assert corner.max() - corner.min() > 20
    chosen = await page.locator(".tools select").select_option(index=1)
    for _ in range(2):
        await page.get_by_role("button", name="Compare").click()
    assert await page.locator(".tools select").input_value() == chosen[0]
    assert await page.get_by_alt_text(f"Before: {chosen[0]}").count() == 1


async def test_one_reference_and_words_are_an_edit(open_page: Open, studio: Studio) -> None:
    page = await open_page()
    original = await generate(page, "a red apple on a blue background", seed=3)
    await page.get_by_role("button", name="Use in prompt").click()
    await page.locator(".references img").wait_for()
    assert await page.evaluate("document.activeElement.id") == "prompt"
    changed = await generate(page, "make the background yellow")
    with studio.library() as store:
        record = store.get(changed)
    assert (record.tool, record.parents) == ("edit_image", (original,))


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
            """side => { const image = document.querySelector('.frame .picture');
            if (image.naturalWidth !== side) return false;
            const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight).getContext('2d');
            canvas.drawImage(image, 0, 0);
            return canvas.getImageData(0, 0, 1, 1).data[3] === 0; }""",
            arg=SIDE,
        )


async def test_new_seed_repeats_the_whole_request(open_page: Open, studio: Studio, server: RealServer) -> None:
    async with Client(server.stdio()) as agent:
        made = await call(agent, "generate_image", prompt="a red apple on a blue background", seed=3)
        asked = {"prompt": "make the background green", "preserve": "off", "width": 96, "height": 64}
        edited = (await call(agent, "edit_image", image=made["image"], seed=5, **asked))["image"]
    page = await open_page()
    await open_image(page, edited)
    again = await new_image(page, page.get_by_role("button", name="New seed").click)
    with studio.library() as store:
        first, second = (store.get(handle).recipe["request"] for handle in (edited, again))
    assert second["seed"] != first["seed"]
    assert {**second, "seed": ""} == {**first, "seed": "", "model": "nano"}


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


async def test_deleted_image_leaves_its_relatives_connected(open_page: Open) -> None:
    page = await open_page()
    root = await generate(page, "a red apple on a blue background", seed=11)
    middle = await edit(page, "make the background yellow")
    await edit(page, "make the background green")
    for deleted, before, cards in ((middle, root, 2), (root, None, 0)):
        await page.get_by_role("button", name="Library", exact=True).click()
        await page.get_by_role("button", name="Select").click()
        await page.locator(f"#library .grid [data-key={deleted}]").click()
        await page.locator("#library").get_by_role("button", name="Delete").click()
        await page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        await page.locator(f"#library .grid [data-key={deleted}]").wait_for(state="detached")
        await page.get_by_role("button", name="Done").click()
        await page.get_by_role("button", name="Create", exact=True).click()
        await page.wait_for_function(f"() => document.querySelectorAll('.tree li').length === {cards}")
        compare = page.get_by_role("button", name="Compare")
        assert await page.locator(".lineage path").count() == max(0, cards - 1)
        if before:
            await compare.click()
            await page.get_by_alt_text(f"Before: {before}").wait_for()
            await compare.click()
        else:
            assert await compare.count() == 0


async def test_mask_in_which_nothing_is_drawn_is_not_kept(open_page: Open) -> None:
    page = await open_page()
    await generate(page, "a red apple on a blue background", seed=3)
    await page.get_by_role("button", name="Mask", exact=True).click()
    await page.get_by_role("button", name="Keep for the agent").click()
    await page.get_by_text("Draw first").wait_for()
    await drag(page, "canvas.mask", (0.4, 0.4), (0.5, 0.4))
    await page.get_by_role("button", name="Keep for the agent").click()
    await page.get_by_text("Mask kept").wait_for()


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
