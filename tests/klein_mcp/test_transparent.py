"""Transparent images as several jobs of the engine, with a painter that knows the truth."""

import re
from dataclasses import replace

import numpy as np
import pytest

from engine.contract import Job, KeepSource, Result, Rgb8
from klein_mcp.images.region import edit_region
from klein_mcp.jobs import request as requests
from klein_mcp.jobs.execute import PreparedRequest, prepare_pixels
from klein_mcp.jobs.request import ImageRequest
from klein_mcp.jobs.save import finish
from klein_mcp.jobs.transparent import Made, Part, advance, on_backing, only_removes_background, parts
from tests.images import noise

SIDE = 96
COLOURS = {
    "gray": (140, 140, 145), "green": (50, 170, 70), "blue": (45, 90, 220), "black": (20, 20, 24),
    "white": (246, 246, 246),
}  # fmt: skip


def disc(radius: float = 0.25) -> np.ndarray:
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    return np.clip((radius - np.hypot(x - 0.5, y - 0.5)) * SIDE / 3 + 0.5, 0, 1)


class Painter:
    """Paints one subject on the backing that a prompt names."""

    def __init__(self, colour: tuple[int, int, int] = (200, 30, 40), opacity: np.ndarray | None = None) -> None:
        self.colour = colour
        self.opacity = disc() if opacity is None else opacity
        self.seen: list[Part] = []

    def make(self, prepared: PreparedRequest, index: int = 0) -> Made:
        making, result = parts(prepared, index), None
        while not isinstance(step := advance(making, result), Made):
            self.seen.append(step)
            result = Result(self.paint(step.job), step.job.seed, "nano", "f", 4, 1.0)
        return step

    def paint(self, job: Job) -> Rgb8:
        named = re.search(rf"background to ({'|'.join(COLOURS)})|({'|'.join(COLOURS)}) background", job.prompt)
        assert named, job.prompt
        return self.on(COLOURS[named[1] or named[2]])

    def on(self, backing: tuple[int, int, int]) -> Rgb8:
        share = self.opacity[..., None]
        return np.rint(share * np.array(self.colour) + (1 - share) * np.array(backing)).astype(np.uint8)


class Careless(Painter):
    """Paints another subject each time."""

    def paint(self, job: Job) -> Rgb8:
        self.opacity = np.roll(self.opacity, 25, axis=1)
        return super().paint(job)


def new(prompt: str = "a ball") -> PreparedRequest:
    return prepared(requests.generate(prompt, seed=3, background="transparent"))


def prepared(request: ImageRequest, image: "Rgb8 | None" = None) -> PreparedRequest:
    references = () if image is None else (image,)
    region = None if image is None else edit_region(image, request.region, None)
    return PreparedRequest(request, references, ("",) * len(references), (), (), "", image, region)


def edited(image: Rgb8, prompt: str) -> PreparedRequest:
    return prepared(requests.edit("k7f3q2", prompt, seed=3, background="transparent"), image)


def overlap(made: Made, truth: np.ndarray) -> float:
    found, wanted = made.image.pixels[..., 3] > 127, truth > 0.5
    return float((found & wanted).sum() / (found | wanted).sum())


def test_new_image_is_a_master_and_two_edits_with_one_seed() -> None:
    painter = Painter()
    made = painter.make(new(), index=2)
    master, *edits = (part.job for part in painter.seen)
    assert master.prompt == "a ball on a gray background"
    assert [job.prompt.split(".")[0] for job in edits] == [f"Change the background to {c}" for c in ("black", "white")]
    assert {job.seed for job in (master, *edits)} == {5}
    assert all((job.references[0] == painter.on(COLOURS["gray"])).all() and job.size == KeepSource() for job in edits)
    assert [(part.number, part.count) for part in painter.seen] == [(0, 3), (1, 3), (2, 3)]
    assert made.image.checks
    assert overlap(made, painter.opacity) > 0.97


def test_subject_that_melts_into_its_backing_gets_another() -> None:
    painter = Painter((150, 150, 150), disc())
    assert painter.make(new()).image.checks is not None
    assert [part.job.prompt for part in painter.seen[:2]] == [f"a ball on a {c} background" for c in ("gray", "green")]
    assert [(part.number, part.count) for part in painter.seen] == [(0, 3), (1, 4), (2, 4), (3, 4)]


def test_failed_check_gives_the_opaque_image_and_the_reason_first() -> None:
    painter = Careless(opacity=disc(0.2))
    image = painter.make(new()).image
    assert image.pixels.shape == (SIDE, SIDE, 3)
    assert image.checks is None
    assert image.warnings[0].startswith("not transparent: ")


def test_plain_image_is_cut_out_without_the_engine() -> None:
    painter = Painter()
    made = painter.make(edited(painter.on(COLOURS["blue"]), "Remove the background."))
    assert painter.seen == []
    assert overlap(made, painter.opacity) > 0.97
    assert made.result.model == "none"


def test_background_inside_a_ring_is_painted_away_too() -> None:
    painter = Painter(opacity=disc(0.35) - disc(0.2))
    made = painter.make(edited(painter.on(COLOURS["blue"]), "remove the background"))
    assert len(painter.seen) == 2
    assert overlap(made, painter.opacity) > 0.9


def test_busy_image_goes_on_three_backings_and_keeps_its_own_bytes() -> None:
    painter = Painter()
    share = painter.opacity[..., None]
    busy = (share * np.array(painter.colour) + (1 - share) * noise(SIDE, SIDE)).astype(np.uint8)
    made = painter.make(edited(busy, "cut it out"))
    assert [part.job.prompt.split()[4].rstrip(".") for part in painter.seen] == ["gray", "black", "white"]
    solid = made.image.pixels[..., 3] == 255
    assert (made.image.pixels[solid, :3] == busy[solid]).mean() > 0.95
    assert overlap(made, painter.opacity) > 0.97


def test_edit_of_a_plain_image_is_one_job() -> None:
    painter = Painter()
    request = edited(painter.on(COLOURS["white"]), "make the ball larger on the white background")
    made = painter.make(replace(request, request=replace(request.request, preserve="off")))
    assert len(painter.seen) == 1
    assert overlap(made, painter.opacity) > 0.97


def test_change_of_a_transparent_image_is_that_of_the_stored_one() -> None:
    original = np.dstack([np.full((SIDE, SIDE, 3), (200, 30, 40), np.uint8), np.rint(255 * disc()).astype(np.uint8)])
    prepared = prepare_pixels(requests.edit("k7f3q2", "make it darker"), [original])
    assert prepared.original is not None
    # A model paints the transparent part a little darker, which is not kept.
    finished = finish(prepared, Result(prepared.original - np.uint8(25), 1, "nano", "f", 4, 1.0))
    assert (finished.pixels[..., 3] == original[..., 3]).all()
    assert finished.changed is not None
    assert finished.changed.share == pytest.approx((disc() == 1).mean(), abs=0.01)


@pytest.mark.parametrize(
    ("prompt", "job"),
    [
        ("a cat", "a cat on a gray background"),
        ("A cat. It sits.", "A cat on a gray background. It sits."),
        ("a star on a blue background", "a star on a gray background"),
        ("An icon of a cat on a plain #00B140 green background. Flat.", "An icon of a cat on a gray background. Flat."),
        ("a dog, isolated on a transparent background, with a white background", "a dog on a gray background"),
        ("a red apple, white background", "a red apple on a gray background"),
        ("a red apple, plain light blue background, studio light", "a red apple on a gray background, studio light"),
        ("a cat isolated on white", "a cat on a gray background"),
        ("a cat against black.", "a cat on a gray background."),
        ("A fox logo. Transparent background.", "A fox logo on a gray background."),
        ("Transparent background. A fox logo. Flat.", "A fox logo on a gray background. Flat."),
        ("a fox, no background", "a fox on a gray background"),
        ("a fox without a background", "a fox on a gray background"),
        ("a cat on a white sofa", "a cat on a white sofa on a gray background"),
        ("a cat, a dog in the background", "a cat, a dog in the background on a gray background"),
        ("a dog in a white background", "a dog on a gray background"),
        ("a portrait, white and blue background, soft light", "a portrait on a gray background, soft light"),
        ("studio light, no background noise", "studio light, no background noise on a gray background"),
        ("a soft white background with a cat", "a soft white background with a cat on a gray background"),
        ("a seal on white ice", "a seal on white ice on a gray background"),
    ],
)
def test_prompt_of_a_master_names_one_backing(prompt: str, job: str) -> None:
    assert on_backing(prompt, "gray") == job


@pytest.mark.parametrize(
    "prompt",
    [
        "remove the background",
        "Make the background transparent.",
        "cut it out",
        "Cut out the red apple",
        "transparent",
        "please make it transparent",
        "delete background please",
        "Remove bg, please.",
        "transparent bg",
    ],
)
def test_prompt_that_only_removes_the_background_is_known(prompt: str) -> None:
    assert only_removes_background(prompt)


@pytest.mark.parametrize(
    "prompt",
    ["remove the cat", "remove the background and add a hat", "make the sky darker", "make the cat transparent"],
)
def test_prompt_that_changes_more_is_an_edit(prompt: str) -> None:
    assert not only_removes_background(prompt)
