"""A held training: which examples its start knows, and what a batch of those asks for."""

import random
import time
from dataclasses import replace

import pytest
import torch

from engine.nano.training import hold
from engine.nano.training.compositor import BACKGROUNDS
from engine.nano.training.curriculum import LEVELS, Curriculum
from engine.nano.training.data_loader import BatchKind, draw_batch
from engine.nano.training.folder import WEIGHTS, load_extras
from engine.nano.training.frames import NATIVE, NATIVE_SHAPES
from engine.nano.training.hold import FirstWorld, Teacher, loaders
from engine.nano.training.model import Nano, Tokenize
from engine.nano.training.prompts import Example, PromptSampler
from engine.nano.training.scenes import Scene
from engine.nano.training.train import Clock, Options, Trainer, train

NOUNS = 48
KIND = BatchKind(NATIVE, "generate", 0, 64, 1)
FIRST = FirstWorld(WEIGHTS)


def _example(draw: str, background: str = "red") -> Example:
    """Draw a scene of a kind on a background, in words that the first nano knows."""
    world = PromptSampler(1, NATIVE, NOUNS).world
    scene: Scene = replace(getattr(world, draw)(), background=BACKGROUNDS.index(background))
    return Example("generate", "a cat on the left", scene)


@pytest.mark.parametrize("draw", ["single", "pair", "row"])
def test_scenes_of_the_first_nano_are_known(draw: str) -> None:
    assert FIRST.known(KIND, _example(draw))
    assert FIRST.known(KIND, _example(draw, "snow"))


@pytest.mark.parametrize("draw", ["four", "counted", "inside"])
def test_scenes_that_it_never_drew_are_new(draw: str) -> None:
    assert not FIRST.known(KIND, _example(draw))


def test_new_words_grounds_shapes_and_references_are_new() -> None:
    known = _example("pair")
    assert not FIRST.known(KIND, replace(known, prompt="a fox on the left"))
    assert not FIRST.known(KIND, _example("pair", "room"))
    assert not FIRST.known(KIND, replace(known, references=(_example("four").target,)))
    assert not FIRST.known(replace(KIND, frame=NATIVE_SHAPES[0]), known)
    assert not FIRST.known(replace(KIND, task="compose", references=3), known)


def test_each_half_of_a_step_draws_its_own_examples() -> None:
    extras = load_extras(WEIGHTS)
    curriculum = Curriculum(2, extras["native_size"], extras["text_length"])
    new, known = loaders(WEIGHTS, curriculum, Tokenize(WEIGHTS), 0, 1, NOUNS)
    kinds = [known.next(0.5).kind for _ in range(12)]
    assert {(kind.frame, kind.references > 2) for kind in kinds} == {(NATIVE, False)}
    drawn = [new.next(0.5) for _ in range(12)]
    # Groups, one thing inside another and four things are most of what the other half generates.
    assert max((raw.scenes.kind >= 0).sum(axis=1).max() for raw in drawn) == 4


def _trainer(tmp_path, truth: float, monkeypatch) -> tuple[Trainer, PromptSampler]:
    monkeypatch.setattr(hold, "TRUTH", truth)
    (tmp_path / "out").mkdir()
    trainer = Trainer(Nano(WEIGHTS), False, 1e-3, tmp_path / "out")
    trainer.teacher = Teacher(Nano(WEIGHTS), False)
    trainer.decoder_ready = True
    return trainer, PromptSampler(3, NATIVE, NOUNS)


@pytest.mark.parametrize(("task", "references"), [("generate", 0), ("edit", 1)])
def test_held_batch_asks_nothing_of_its_own_teacher(tmp_path, monkeypatch, task: str, references: int) -> None:
    trainer, sampler = _trainer(tmp_path, 0.0, monkeypatch)
    kind = BatchKind(NATIVE, task, references, 64, 2)
    batch = trainer.encoder(draw_batch({NATIVE: sampler}, kind, Tokenize(WEIGHTS)))
    assert trainer.loss(batch, held=True) < 1e-9
    assert trainer.loss(batch) > 1e-3
    with torch.no_grad():
        next(trainer.learned.parameters()).mul_(1.1)
    assert trainer.loss(batch, held=True) > 1e-9, "the teacher moved with its pupil"


def test_held_training_learns_from_both_halves_and_ends(tmp_path, monkeypatch) -> None:
    trainer, sampler = _trainer(tmp_path, 0.3, monkeypatch)

    class Drawn:
        def next(self, done: float):
            return draw_batch({NATIVE: sampler}, KIND, Tokenize(WEIGHTS))

        def waiting(self) -> int:
            return 0

        def close(self) -> None:
            closed.append(self)

    closed: list[Drawn] = []
    options = Options(report=1.0, save=1.0, reserve=0.1)
    train(trainer, Drawn(), Clock(0.5, time.monotonic()), options, Drawn())  # type: ignore[arg-type] - drawn here
    assert trainer.samples == trainer.steps * 2 * KIND.count * LEVELS > 0
    assert len(closed) == 2


def test_a_few_known_examples_stay_among_the_new() -> None:
    random.seed(1)
    known = _example("pair")
    kept = sum(FIRST.new(KIND, known) for _ in range(2000)) / 2000
    # Observed: 0.04.
    assert 0.02 < kept < 0.07
    assert FIRST.new(KIND, _example("four"))
