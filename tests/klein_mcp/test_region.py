"""An edit of a part leaves every byte outside it as it was, and says how much it changed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mcp import Client

from engine.contract import ChangeMask, KeepSource
from klein_mcp.images.region import SEAM, WORK_AREA, edit_region
from tests.fakes import FakeExecutor
from tests.images import file, noise, pixels, scene
from tests.tool_calls import call, refused

WHITE = 255


def mask_of(width: int, height: int, box: tuple[int, int, int, int]) -> Any:
    left, top, right, bottom = box
    mask = np.zeros((height, width, 3), np.uint8)
    mask[top:bottom, left:right] = WHITE
    return mask


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    spot=st.tuples(*[st.floats(0, 1)] * 4),
    blobs=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_outside_every_byte_is_images_own(
    width: int, height: int, spot: tuple[float, float, float, float], blobs: int, seed: int
):
    image = noise(width, height, seed)
    x, y = int(spot[0] * (width - 1)), int(spot[1] * (height - 1))
    region = (x, y, 1 + int(spot[2] * (width - x - 1)), 1 + int(spot[3] * (height - y - 1)))
    mask = None
    if blobs:
        mask = np.zeros_like(image)
        random = np.random.default_rng(seed)
        for _ in range(blobs):
            left, top = random.integers(0, width), random.integers(0, height)
            mask[top : top + random.integers(1, 80), left : left + random.integers(1, 80)] = WHITE
        mask[y, x] = WHITE  # so that they meet
    part = edit_region(image, region, mask)
    seen = part.crop(image)
    result = part.composite(noise(seen.shape[1], seen.shape[0], seed + 1), image)
    may = np.zeros((height, width), bool)
    may[y : y + region[3], x : x + region[2]] = True
    if mask is not None:
        may &= mask[..., 0] > 127
    assert result.shape == image.shape
    assert (result[~may] == image[~may]).all()


def test_seam_lies_inside_and_is_no_wider_than_it_may_be():
    black, white = np.zeros((200, 200, 3), np.uint8), np.full((200, 200, 3), WHITE, np.uint8)
    part = edit_region(black, (50, 50, 100, 100), None)
    seen = part.crop(black)
    result = part.composite(white[: seen.shape[0], : seen.shape[1]], black)
    line = result[100, :, 0].astype(int)
    assert (line[:50] == 0).all()
    assert (line[150:] == 0).all()
    assert (line[50 + SEAM - 1 : 150 - SEAM + 1] == WHITE).all()
    rising = line[50 : 50 + SEAM]
    assert (np.diff(rising) > 0).all()
    assert rising[0] > 0


def full_share(mask: Any) -> float:
    """Return the share of the mask's pixels that are fully the new image."""
    black = np.zeros_like(mask)
    part = edit_region(black, None, mask)
    seen = part.crop(black)
    result = part.composite(np.full_like(seen, WHITE), black)
    return float((result.min(2) == WHITE).sum() / (mask[..., 0] == WHITE).sum())


@pytest.mark.parametrize("diameter", [8, 12, 16, 24, 40])
def test_small_round_mask_changes_fully_in_its_middle(diameter: int):
    down, across = np.mgrid[:128, :128]
    spot = np.hypot(down - 64, across - 64) <= diameter / 2
    mask = np.repeat((255 * spot).astype(np.uint8)[..., None], 3, 2)
    # A third of the radius fades, so (2/3)² = 0.44 of the spot is full; with 16 fixed pixels it was under 0.03.
    assert full_share(mask) > 0.4


def test_brush_stroke_changes_fully_along_its_middle():
    assert full_share(mask_of(128, 128, (20, 56, 108, 72))) > 0.55  # two thirds of its height; was 0.11
    assert full_share(mask_of(128, 128, (20, 60, 108, 66))) > 0.6


def test_fade_of_large_image_is_measured_coarsely_and_alike():
    mask = mask_of(1500, 1500, (200, 200, 1300, 230))
    small = mask_of(900, 900, (200, 200, 700, 230))
    assert abs(full_share(mask) - full_share(small)) < 0.1
    wide = mask_of(1500, 1500, (200, 200, 1300, 1300))
    black = np.zeros_like(wide)
    line = edit_region(black, None, wide).composite(np.full_like(black, WHITE), black)[700, 200 : 200 + SEAM + 1, 0]
    assert (np.diff(line[:SEAM].astype(int)) > 0).all()
    assert line[SEAM] == WHITE


def test_region_at_edge_of_image_has_no_seam_there():
    black, white = np.zeros((100, 100, 3), np.uint8), np.full((100, 100, 3), WHITE, np.uint8)
    part = edit_region(black, (0, 0, 60, 100), None)
    result = part.composite(white[: part.crop(black).shape[0], : part.crop(black).shape[1]], black)
    assert (result[:, 0] == WHITE).all()


def test_mask_thinner_than_two_seams_still_reaches_full_strength():
    black, white = np.zeros((100, 100, 3), np.uint8), np.full((100, 100, 3), WHITE, np.uint8)
    part = edit_region(black, (40, 40, 7, 7), None)
    seen = part.crop(black)
    assert part.composite(white[: seen.shape[0], : seen.shape[1]], black).max() == WHITE


def test_thin_line_beside_broad_spot_may_change_as_much():
    black, white = np.zeros((200, 200, 3), np.uint8), np.full((200, 200, 3), WHITE, np.uint8)
    spot, line, tail = mask_of(200, 200, (20, 20, 100, 100)), (20, 150, 180, 153), (100, 58, 180, 61)
    part = edit_region(black, None, spot | mask_of(200, 200, line) | mask_of(200, 200, tail))
    result = part.composite(white[: part.crop(black).shape[0], : part.crop(black).shape[1]], black)
    assert result[60, 60].min() == WHITE
    assert result[151, 100].min() == WHITE
    assert result[59, 150].min() == WHITE  # of a tail that hangs on the spot, beyond the seam
    rising = result[60, 20:60, 0].astype(int)
    assert (np.diff(rising) >= 0).all()
    assert rising[0] < 30


def test_of_large_region_model_sees_whole_image_of_small_one_its_surroundings():
    image = scene(800, 600)
    assert edit_region(image, (100, 100, 500, 400), None).crop(image).shape == (600, 800, 3)
    small = edit_region(image, (400, 300, 100, 60), None)
    assert small.box == (336, 236, 564, 424)
    assert (small.crop(image) == image[236:424, 336:564]).all()
    tiny = edit_region(image, (0, 0, 4, 4), None)
    assert tiny.box == (0, 0, 68, 68)


def test_largest_image_of_ours_is_worked_on_pixel_for_pixel():
    image = scene(2048, 2048)
    assert (edit_region(image, None, None).crop(image) == image).all()


def test_of_huge_image_model_sees_no_more_than_it_can_work_on():
    image = scene(3000, 3000)
    seen = edit_region(image, (0, 0, 2900, 2900), None).crop(image)
    assert seen.shape[0] * seen.shape[1] <= WORK_AREA


def test_edit_of_a_huge_image_says_that_it_was_enlarged():
    image = scene(4000, 3000)
    part = edit_region(image, None, None)
    seen = part.crop(image)
    height, width = seen.shape[:2]
    expected = f"4000×3000 is more than a model takes: edited at {width}×{height}, then enlarged to 4000×3000"
    assert part.enlargement_warnings(seen) == (expected,)
    assert edit_region(seen, None, None).enlargement_warnings(seen) == ()


pytestmark = pytest.mark.anyio


@pytest.fixture
def photo(tmp_path: Path) -> str:
    path = tmp_path / "photo.png"
    path.write_bytes(file(scene(320, 200)))
    return str(path)


@pytest.fixture
def mask(tmp_path: Path) -> str:
    path = tmp_path / "mask.png"
    path.write_bytes(file(mask_of(320, 200, (40, 40, 120, 120))))
    return str(path)


def result_of(facts: dict[str, Any]) -> Any:
    return pixels(Path(facts["path"]).read_bytes())


async def test_region_changes_only_itself_and_line_reports_how_much(client: Client, photo: str):
    facts = await call(client, "edit_image", image=photo, prompt="a dot", region=[100, 50, 80, 60])
    result, image = result_of(facts), scene(320, 200)
    different = np.any(result != image, axis=2)
    assert not different[:, :100].any()
    assert not different[:, 180:].any()
    assert not different[:50].any()
    assert not different[110:].any()
    x, y, width, height = facts["changed"]["box"]
    assert (x >= 100, y >= 50, x + width <= 180, y + height <= 110) == (True,) * 4
    # Of the region alone; a feather of 16 pixels leaves its rim nearly as it was.
    assert 0.3 < facts["changed"]["share"] <= 1
    assert facts["changed"]["kept"]


async def test_small_region_is_painted_close_up_and_all_else_as_it_is(
    client: Client, painter: FakeExecutor, tmp_path: Path
):
    path = tmp_path / "wide.png"
    path.write_bytes(file(scene(800, 600)))
    for region in ([400, 300, 100, 60], [50, 50, 700, 500], None):
        await call(client, "edit_image", image=str(path), prompt="x", **({"region": region} if region else {}))
    assert [job.size for job in painter.jobs] == [KeepSource(close_up=True), KeepSource(), KeepSource()]
    assert [job.references[0].shape[:2] for job in painter.jobs] == [(188, 228), (600, 800), (600, 800)]


async def test_small_image_is_painted_whole_for_any_region(client: Client, painter: FakeExecutor, tmp_path: Path):
    """nano knows whole scenes: in a quarter of one, enlarged, it would see parts of things."""
    path = tmp_path / "small.png"
    path.write_bytes(file(scene(256, 256)))
    facts = await call(client, "edit_image", image=str(path), prompt="x", region=[0, 0, 64, 64])
    assert painter.jobs[0].size == KeepSource()
    assert painter.jobs[0].references[0].shape == (256, 256, 3)
    x, y, width, height = facts["changed"]["box"]
    assert max(x + width, y + height) <= 64


async def test_mask_changes_only_what_is_white(client: Client, photo: str, mask: str):
    facts = await call(client, "edit_image", image=photo, prompt="a dot", mask=mask)
    different = np.any(result_of(facts) != scene(320, 200), axis=2)
    assert different[60:100, 60:100].mean() > 0.9
    different[40:120, 40:120] = False
    assert not different.any()


async def test_region_and_mask_together_mean_where_they_meet(client: Client, photo: str, mask: str):
    facts = await call(client, "edit_image", image=photo, prompt="a dot", mask=mask, region=[80, 0, 240, 200])
    different = np.any(result_of(facts) != scene(320, 200), axis=2)
    assert different[60:100, 90:110].any()
    different[40:120, 80:120] = False
    assert not different.any()


async def test_mask_is_no_parent(client: Client, photo: str, mask: str):
    facts = await call(client, "edit_image", image=photo, prompt="a dot", mask=mask)
    opened = await call(client, "view_image", image=photo)
    assert (await call(client, "view_image", image=facts["image"]))["parents"] == [opened["image"]]


async def test_mask_with_holes_and_white_is_refused_with_both_readings(client: Client, photo: str, tmp_path: Path):
    see_through = np.dstack([mask_of(320, 200, (40, 40, 80, 80)), mask_of(320, 200, (40, 40, 80, 80))[..., 0]])
    path = tmp_path / "see-through.png"
    path.write_bytes(file(see_through))
    message = await refused(client, "edit_image", image=photo, prompt="a dot", mask=str(path))
    assert "two ways" in message
    assert "transparent" in message
    assert "white" in message


async def test_mask_that_was_opened_as_an_image_is_read_as_its_file(client: Client, photo: str, tmp_path: Path):
    path = tmp_path / "see-through.png"
    path.write_bytes(file(np.dstack([mask_of(320, 200, (0, 0, 9, 9)), mask_of(320, 200, (0, 0, 9, 9))[..., 0]])))
    seen = await call(client, "view_image", image=str(path))
    assert "two ways" in await refused(client, "edit_image", image=photo, prompt="x", mask=seen["image"])
    holes = np.full((200, 320, 4), (0, 0, 0, 255), np.uint8)
    holes[50:150, 50:150, 3] = 0
    path.write_bytes(file(holes))
    seen = await call(client, "view_image", image=str(path))
    assert seen["background"].startswith("transparent")
    facts = await call(client, "edit_image", image=photo, prompt="a dot", mask=seen["image"])
    different = np.any(result_of(facts) != scene(320, 200), axis=2)
    assert different[60:140, 60:140].any()
    different[50:150, 50:150] = False
    assert not different.any()


@pytest.mark.parametrize(
    ("box", "size", "message"),
    [
        ((0, 0, 0, 0), (320, 200), "The mask is black everywhere"),
        ((0, 0, 10, 10), (100, 100), "The mask is 100×100 but the image is 320×200"),
        ((0, 0, 10, 10), (320, 200), "Region and mask do not overlap"),
    ],
)
async def test_mask_that_cannot_be_honoured_is_error(
    client: Client, painter: FakeExecutor, photo: str, tmp_path: Path, box: Any, size: tuple[int, int], message: str
):
    path = tmp_path / "mask.png"
    path.write_bytes(file(mask_of(*size, box)))
    region = {"region": [200, 100, 50, 50]} if "Region" in message else {}
    assert message in await refused(client, "edit_image", image=photo, prompt="x", mask=str(path), **region)
    assert painter.jobs == []


async def test_mask_that_looks_like_image_is_reported(client: Client, photo: str, mask: str, tmp_path: Path):
    facts = await call(client, "edit_image", image=photo, prompt="x", mask=mask)
    assert not any("mask" in warning for warning in facts.get("warnings", []))
    colours = tmp_path / "colours.png"
    colours.write_bytes(file(scene(320, 200)))
    facts = await call(client, "edit_image", image=photo, prompt="x", mask=str(colours))
    assert any("of the mask is neither black nor white" in warning for warning in facts.get("warnings", []))


@pytest.mark.parametrize(
    ("region", "place"),
    [
        ([150, 10, 90, 90], "in the top right corner"),
        ([90, 90, 80, 80], "in the middle"),
        ([60, 190, 120, 60], "at the bottom"),
        ([0, 0, 256, 256], ""),
        (None, ""),
    ],
)
async def test_region_of_a_small_image_has_a_place(
    client: Client, painter: FakeExecutor, tmp_path: Path, region: "list[int] | None", place: str
):
    """The model sees the whole of a small image, and may paint where the region keeps the original."""
    (tmp_path / "small.png").write_bytes(file(scene(256, 256)))
    await call(client, "edit_image", image=str(tmp_path / "small.png"), prompt="add a red heart", region=region)
    assert painter.jobs[-1].place == place
    assert painter.jobs[-1].prompt == "add a red heart", "only the engine knows whether its model lists its words"


async def test_crop_of_a_large_image_has_no_place(client: Client, painter: FakeExecutor, tmp_path: Path):
    (tmp_path / "wide.png").write_bytes(file(scene(800, 600)))
    await call(
        client, "edit_image", image=str(tmp_path / "wide.png"), prompt="add a red heart", region=[700, 10, 90, 90]
    )
    assert painter.jobs[-1].place == ""


async def test_region_and_size_exclude_each_other(client: Client, photo: str):
    message = await refused(client, "edit_image", image=photo, prompt="x", region=[0, 0, 9, 9], width=64, height=64)
    assert "Leave out width and height" in message


def test_faint_change_of_a_crop_is_placed_in_the_image():
    """The crop begins at the region's margin, and may have been scaled down for the model."""
    part = edit_region(noise(1024, 1024), [700, 700, 100, 100], None)
    left, top, right, bottom = part.box
    rows, columns = (bottom - top) // 2, (right - left) // 2
    found = ChangeMask(np.zeros((rows, columns), np.uint8), faint=0.01, faint_box=(40, 42, 10, 20))
    place = part.faint_change(found)
    assert place is not None
    assert place[1] == (left + 80, top + 84, 20, 40)
    assert place[0] == pytest.approx(0.01 * (right - left) * (bottom - top) / 1024**2)
    # In the margin nothing is kept, with preserve "off" neither.
    assert part.faint_change(replace(found, faint_box=(0, 0, 9, 9))) is None
    assert part.faint_change(replace(found, faint_box=None)) is None
    whole = edit_region(noise(64, 64), None, None)
    assert whole.faint_change(ChangeMask(np.zeros((64, 64), np.uint8), faint=0.1, faint_box=(1, 2, 3, 4))) == (
        0.1,
        (1, 2, 3, 4),
    )


async def test_rest_of_image_over_four_megapixels_stays_as_it_was(client: Client, tmp_path: Path):
    image = noise(2600, 1700)
    path = tmp_path / "large.png"
    path.write_bytes(file(image, compress_level=1))
    facts = await call(client, "edit_image", image=str(path), prompt="x", region=[100, 100, 2300, 1400])
    result = result_of(facts)
    assert result.shape == image.shape
    different = np.any(result != image, axis=2)
    assert different[400:1200, 400:2000].mean() > 0.9
    different[100:1500, 100:2400] = False
    assert not different.any()
