"""Rewritten prompts on the embedded model: what it paints is scored."""

import numpy as np
import pytest

from engine.contract import EngineConfig, Job, KeepSource, Result, Rgb8
from engine.engine import Engine
from engine.nano.training.compositor import BACKGROUNDS
from engine.nano.training.edits import touched
from engine.nano.training.prompts import Example
from engine.nano.training.scenes import MIDDLE, NORMAL, Scene, Thing
from engine.nano.training.score import draw, edit_done, look
from engine.nano.training.sprites import KINDS
from tests.embedded import in_units
from tests.engine.test_reading import LIST, PLACES


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(EngineConfig(device="cpu"))


def scene(ground: str, *things: tuple[str, tuple[int, int]]) -> Scene:
    return Scene(BACKGROUNDS.index(ground), tuple(Thing(KINDS.index(kind), NORMAL, slot) for kind, slot in things))


LEFT, RIGHT = (-1, 0), (1, 0)
SMALL_SIZE = NORMAL - 1
"""Things beside two others are painted smaller."""
EDITS = [
    ("background", "Make the background green", scene("blue", ("apple", MIDDLE)), scene("green", ("apple", MIDDLE))),
    ("background", "Put it in the snow", scene("green", ("dog", MIDDLE)), scene("snow", ("dog", MIDDLE))),
    ("remove", "Remove the cat", scene("white", ("cat", LEFT), ("car", RIGHT)), scene("white", ("car", RIGHT))),
    ("move", "Move the apple to the left", scene("cyan", ("apple", MIDDLE)), scene("cyan", ("apple", LEFT))),
    ("recolour", "Make the ring red", scene("white", ("blue ring", MIDDLE)), scene("white", ("red ring", MIDDLE))),
    ("replace", "Replace the fish with a bird", scene("pink", ("fish", MIDDLE)), scene("pink", ("bird", MIDDLE))),
    ("remove", "Delete the pizza", scene("blue", ("pizza", LEFT), ("duck", RIGHT)), scene("blue", ("duck", RIGHT))),
    ("replace", "Turn the house into a tree", scene("yellow", ("house", MIDDLE)), scene("yellow", ("tree", MIDDLE))),
]  # fmt: skip


def test_three_listed_references_are_all_composed(engine: Engine) -> None:
    sources = tuple(draw(scene("white", (kind, MIDDLE)))[0] for kind in ("apple", "house", "car"))
    listed, placed = (
        next(event for event in engine.run(Job(prompt, model="nano", references=sources)) if isinstance(event, Result))
        for prompt in (LIST.replace("rocket", "car"), PLACES.replace("rocket", "car"))
    )
    assert np.array_equal(listed.image, placed.image)
    kinds = zip(("apple", "house", "car"), (LEFT, MIDDLE, RIGHT), strict=True)
    result = Scene(BACKGROUNDS.index("blue"), tuple(Thing(KINDS.index(kind), SMALL_SIZE, slot) for kind, slot in kinds))
    for index, thing in enumerate(result.things):
        assert look(in_units(listed.image), result, index).nearest == thing.kind


@pytest.mark.parametrize(("kind", "prompt", "before", "after"), EDITS, ids=[edit[1] for edit in EDITS])
def test_edit_succeeds_with_and_without_a_preservation_sentence(
    engine: Engine, kind: str, prompt: str, before: Scene, after: Scene
) -> None:
    (source,) = draw(before)
    example = Example(kind, prompt, after, (before,), touched(before, after))
    plain = paint(engine, source, prompt)
    constrained = paint(engine, source, f"{prompt}. Keep everything else exactly as it is.")
    assert edit_done(plain.image, example)
    assert np.array_equal(constrained.image, plain.image)
    assert (plain.read_as, constrained.read_as) == ("", prompt)


def paint(engine: Engine, source: Rgb8, prompt: str) -> Result:
    *_, result = engine.run(Job(prompt, (source,), size=KeepSource(), model="nano", seed=7))
    assert isinstance(result, Result)
    return result


def test_thing_is_added_where_the_change_is_kept(engine: Engine) -> None:
    (image,) = draw(scene("white", ("cat", RIGHT)))
    job = Job("add an apple", (image,), size=KeepSource(), seed=1, model="nano", place="on the left")
    *_, result = engine.run(job)
    assert isinstance(result, Result)
    assert result.read_as == "add an apple on the left"
    apple = Scene(BACKGROUNDS.index("white"), (Thing(KINDS.index("apple"), SMALL_SIZE, LEFT),))
    assert look(result.image, apple, 0).nearest == KINDS.index("apple")
