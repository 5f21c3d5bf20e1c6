"""Change mask: what an edit changed is found, what it left alone is not, on textured images and on nano's own."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.contract import EngineConfig, InvalidJob, Job, KeepSource, Result, Rgb8
from engine.diffusion.change_mask import Change, find_change
from engine.engine import Engine

SIDE = 256
LEVEL = 2 / 255
"""One of 255 levels, in the units of [-1, 1]."""


def texture(seed: int) -> Tensor:
    """An image with detail of every size, as a photo has it: [1, 3, h, w]."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.zeros(1, 3, SIDE, SIDE)
    for octave in range(3, 9):
        noise = torch.randn(1, 3, 2**octave, 2**octave, generator=generator) * 1.6 ** (3 - octave)
        image += F.interpolate(noise, size=(SIDE, SIDE), mode="bilinear")
    return (image / image.std() * 0.4).clamp(-1, 1)


def disc(x: float, y: float, radius: float) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    return (rows - y * SIDE) ** 2 + (columns - x * SIDE) ** 2 < (radius * SIDE) ** 2


def coloured(image: Tensor, where: Tensor, colour: tuple[float, float, float]) -> Tensor:
    return torch.where(where, torch.tensor(colour)[None, :, None, None], image)


def noise(levels: float) -> Tensor:
    return levels * LEVEL * torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(9))


def shares(change: Change, truth: Tensor) -> tuple[float, float]:
    """Shares of the changed pixels that were found, and of the unchanged ones that are kept."""
    mask = change.opacity > 0
    return (mask & truth).sum().item() / truth.sum().item(), (~mask & ~truth).sum().item() / (~truth).sum().item()


RED = (0.7, -0.6, -0.5)
DRIFTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing else": lambda image: image,
    "noise of 5 levels": lambda image: image + noise(5),
    "blur and noise": lambda image: F.avg_pool2d(image, 3, 1, 1) + noise(5),
    "gain and offset": lambda image: image * 1.04 + 0.03,
    "a shift": lambda image: torch.roll(image, (2, 0), (-1, -2)),
    "a shift and noise": lambda image: torch.roll(image, (-1, 3), (-1, -2)) + noise(3),
}


@pytest.mark.parametrize("drift", DRIFTS.values(), ids=DRIFTS.keys())
@pytest.mark.parametrize("seed", [0, 1])
def test_local_change_is_found_whatever_drifts_around_it(seed: int, drift: Callable[[Tensor], Tensor]) -> None:
    original, where = texture(seed), disc(0.6, 0.4, 0.1)
    found, kept = shares(find_change(drift(coloured(original, where, RED)), original), where)
    # Observed: all found; 0.990 to 0.992 kept, the rest is the margin around the disc.
    assert found == 1
    assert kept > 0.985


@pytest.mark.parametrize("shift", [(2, 0), (-1, 3), (0, -4)])
def test_shift_of_whole_image_is_found_and_undone(shift: tuple[int, int]) -> None:
    original = texture(2)
    change = find_change(torch.roll(original, shift, (-1, -2)), original)
    assert change.shift == shift
    inside = slice(8, -8)
    assert (change.painted - original)[..., inside, inside].abs().max() < LEVEL / 2  # observed: 0.17 of a level
    assert change.opacity.mean() < 0.1  # the border, where pixels came in from the other side


def test_object_that_moved_is_no_shift() -> None:
    flat = torch.zeros(1, 3, SIDE, SIDE)
    before, after = (coloured(flat, disc(x, 0.5, 0.2), RED) for x in (0.5, 0.51))
    change = find_change(after, before)
    assert change.shift == (0, 0)
    assert change.opacity.max() == 1


def test_gain_and_offset_are_undone_outside_the_change() -> None:
    original = texture(3)
    edited = coloured(original, disc(0.5, 0.5, 0.1), RED) * 1.03 + 5 * LEVEL
    change = find_change(edited, original)
    kept = change.opacity == 0
    assert change.drift == pytest.approx(5, abs=2)
    assert (change.painted - original)[:, :, kept].abs().mean() < LEVEL / 2  # 5 levels before


def test_unchanged_image_has_an_empty_mask() -> None:
    original = texture(4)
    change = find_change(original + noise(4), original)
    assert not change.opacity.any()
    assert not change.whole


@pytest.mark.parametrize(
    "global_edit", [lambda image: -image, lambda image: image.roll(64, -1), lambda image: image + 0.1]
)
def test_global_edit_keeps_the_image_as_it_came(global_edit: Callable[[Tensor], Tensor]) -> None:
    original = texture(5)
    edited = global_edit(original).clamp(-1, 1)
    change = find_change(edited, original)
    assert change.whole
    assert torch.equal(change.painted, edited)
    assert change.opacity.min() == 1


def test_background_of_nearly_the_old_colour_is_a_global_edit() -> None:
    """The change is below the threshold, and much larger than any drift beside a local edit."""
    thing = disc(0.5, 0.5, 0.2)
    original = coloured(texture(6) * 0.1, thing, RED)
    edited = coloured(coloured(original + 28 * LEVEL, disc(0.2, 0.9, 0.08), (0.1, 0.1, -0.9)), thing, RED)
    change = find_change(edited, original)
    assert change.drift > 20
    assert change.whole
    assert torch.equal(change.painted, edited.clamp(-1, 1))


def test_new_background_behind_a_large_object_is_a_global_edit() -> None:
    # The object covers 45 % of the image: less than the usual share changes.
    thing = disc(0.5, 0.5, 0.38)
    before = coloured(coloured(texture(6), ~thing, (0.1, 0.5, 0.9)), thing & disc(0.4, 0.4, 0.1), RED)
    change = find_change(coloured(before, ~thing, (0.9, 0.5, 0.1)), before)
    assert change.whole


def beyond(across: float, down: float) -> Tensor:
    """Pixels right of and below a share of the image."""
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    return (rows >= down * SIDE) & (columns >= across * SIDE)


@pytest.mark.parametrize("strip", [~beyond(0, 0.32), ~beyond(0.36, 0), beyond(0, 0.64)], ids=["sky", "wall", "ground"])
def test_strip_along_one_edge_is_a_local_change(strip: Tensor) -> None:
    original = texture(8)
    change = find_change(coloured(original, strip, RED) + noise(3), original)
    assert not change.whole
    found, kept = shares(change, strip)
    assert found == 1
    assert kept > 0.97  # observed: 0.98, the rest is the margin along the strip
    # Without a frame of the old image: the outermost pixels are judged by their inner neighbours.
    assert (change.opacity[strip] > 0).all()


def test_border_that_the_autoencoder_got_wrong_stays_the_original() -> None:
    """nano's errs by up to 35 levels in the outermost pixels."""
    original, border = texture(9), torch.ones(SIDE, SIDE, dtype=torch.bool)
    border[2:-2, 2:-2] = False
    edited = coloured(original, disc(0.5, 0.5, 0.2), RED) + 35 * LEVEL * border
    opacity = find_change(edited, original).opacity
    assert opacity.any()
    assert not opacity[border].any()


@pytest.mark.parametrize(
    "thing",
    [disc(0.5, 1, 0.5), beyond(0.1, 0.6) | disc(0.5, 0.5, 0.25), beyond(0.3, 0.35), disc(1, 1, 0.75)],
    ids=["at an edge", "across an edge", "filling a corner", "round in a corner"],
)
def test_background_behind_an_object_at_the_border_is_a_global_edit(thing: Tensor) -> None:
    before = coloured(texture(8), ~thing, (0.1, 0.5, 0.9))
    assert find_change(coloured(before, ~thing, (0.9, 0.5, 0.1)) + noise(3), before).whole


def test_faint_change_is_reported_with_its_place() -> None:
    flat = torch.zeros(1, 3, SIDE, SIDE)
    faint = disc(0.25, 0.75, 0.1)
    change = find_change(coloured(flat, faint, (0.12, 0.12, 0.12)), flat)
    assert not change.opacity.any()
    assert change.faint == pytest.approx(faint.float().mean().item(), rel=0.2)
    assert change.faint_box is not None
    x, y, width, height = change.faint_box
    assert 30 < x < 45
    assert 160 < y < 172
    assert 45 < width < 60
    assert 45 < height < 60


def test_seam_lies_inside_the_mask() -> None:
    original = texture(7)
    opacity = find_change(coloured(original, disc(0.5, 0.5, 0.2), RED), original).opacity
    assert opacity[disc(0.5, 0.5, 0.2)].min() == 1
    between = (opacity > 0) & (opacity < 1)
    assert between.any()
    assert not (between & disc(0.5, 0.5, 0.2)).any()


# On nano


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(EngineConfig(device="cpu"))


def paint(engine: Engine, job: Job) -> Result:
    *_, result = engine.run(job)
    assert isinstance(result, Result)
    return result


@pytest.fixture(scope="module")
def dog(engine: Engine) -> Rgb8:
    return paint(engine, Job("a dog at the right and a banana at the left on a yellow background", model="nano")).image


def test_removed_object_is_the_only_change(engine: Engine, dog: Rgb8) -> None:
    result = paint(engine, Job("remove the dog", (dog,), size=KeepSource(), model="nano", find_change=True))
    assert result.change is not None
    assert not result.change.whole
    assert result.change.opacity.shape == dog.shape[:2]
    width = dog.shape[1]
    right, left = result.change.opacity[:, width // 2 :], result.change.opacity[:, : width // 2]
    assert 0.2 < (right > 0).mean() < 0.9
    assert (left > 0).mean() < 0.05
    assert result.ms["change"] >= 0


def test_new_background_changes_the_whole_image(engine: Engine, dog: Rgb8) -> None:
    job = Job("make the background green", (dog,), size=KeepSource(), model="nano")
    found, plain = paint(engine, replace(job, find_change=True)), paint(engine, job)
    assert found.change is not None
    assert found.change.whole
    assert plain.change is None
    assert np.array_equal(found.image, plain.image)


def test_mask_has_the_exact_size_of_an_odd_image(engine: Engine, dog: Rgb8) -> None:
    odd = np.pad(dog, ((0, 5), (0, 31), (0, 0)), mode="edge")
    result = paint(engine, Job("remove the dog", (odd,), size=KeepSource(), model="nano", find_change=True))
    assert result.change is not None
    assert result.image.shape[:2] == result.change.opacity.shape == odd.shape[:2]


def test_change_is_only_found_in_one_frame(engine: Engine, dog: Rgb8) -> None:
    with pytest.raises(InvalidJob, match="needs KeepSource"):
        paint(engine, Job("remove the dog", (dog,), model="nano", find_change=True))


def test_known_reference_has_its_round_trip_ready(engine: Engine, dog: Rgb8, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job("remove the dog", (dog,), size=KeepSource(), model="nano", find_change=True)
    first = paint(engine, job)
    assert engine._klein is not None
    autoencoder, decoded = engine._klein.autoencoder, []
    decode = autoencoder.decode
    monkeypatch.setattr(autoencoder, "decode", lambda latent: decoded.append(1) or decode(latent))
    assert paint(engine, job).change == first.change
    assert len(decoded) == 1
