"""The held-out lists: questions that training never meets."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from engine.nano.training.edits import EDITS, touched
from engine.nano.training.folder import load_extras
from engine.nano.training.frames import SQUARE, UNIT_SHAPES, UNITS, Frame
from engine.nano.training.held_out import OLD_LIST
from engine.nano.training.prompts import Example, PromptSampler, unseen
from engine.nano.training.scenes import Scene
from engine.nano.words import NOUNS

LIST = OLD_LIST.with_name("held_out.jsonl")
WIDE_LIST = OLD_LIST.with_name("held_out_48_wide.jsonl")
OLD_NOUNS = 48
"""Nouns of the first nano."""
LISTS = {"new": LIST, "old": OLD_LIST, "wide": WIDE_LIST}
ROWS = 300
"""Number of questions of each main kind."""
FEWER_ROWS = 100
"""Questions of each of the others: counts, one thing inside another, four things, other shapes."""
CHAINS = 30
CHAIN_LENGTH = 10

Question = tuple[str, int, Example]
"""(part of the list, seed, example). A chain is CHAIN_LENGTH questions of one seed, each about the last answer."""


def questions(path: Path = LIST) -> Iterator[Question]:
    """Yield the list's questions, in order."""
    for line in path.read_text().splitlines():
        part, seed, task, prompt, target, *references = json.loads(line)
        part, _, sides = part.partition("@")
        frame = Frame(*map(int, sides.split("x"))) if sides else UNITS
        scenes = tuple(map(Scene.unpack, references))
        scene = Scene.unpack(target)
        boxes = touched(scenes[0], scene, frame) if task in EDITS else ()
        yield part, seed, Example(task, prompt, scene, scenes, boxes, frame)


def known_list(weights: Path) -> str:
    """Return the list whose nouns the weights know: old or new."""
    return "new" if {*NOUNS} <= {*load_extras(weights)["words"]} else "old"


def at_scale(asked: list[Question], scale: int) -> list[Question]:
    """Return the questions for images of `scale` pixels a unit.

    Scale 1 is 128 × 128 and 2 is 256 × 256.
    """
    return [(part, seed, _framed(example, replace(example.frame, scale=scale))) for part, seed, example in asked]


def as_scored(example: Example) -> Example:
    """Return the example at one pixel a unit."""
    return _framed(example, replace(example.frame, scale=1))


def _framed(example: Example, frame: Frame) -> Example:
    """Return the example on another canvas, where things stand elsewhere."""
    boxes = touched(example.references[0], example.target, frame) if example.task in EDITS else ()
    return replace(example, frame=frame, touched=boxes)


def draw_wide_questions() -> Iterator[Question]:
    """Yield a new list of what the old nouns can learn later."""
    sampler = PromptSampler("held out wide", nouns=OLD_NOUNS)
    world = sampler.world
    makes: dict[str, Callable[[PromptSampler], Example | None]] = {
        "one": lambda sampler: sampler.generate(world.single),
        "compose": lambda sampler: sampler.compose(sampler.pick((3, 4))),
        "count": lambda sampler: sampler.generate(world.counted),
        "inside": lambda sampler: sampler.generate(world.inside),
        "four": lambda sampler: sampler.generate(world.four),
    }
    for part, make in makes.items():
        for seed in range(FEWER_ROWS):
            yield part, seed, unseen(sampler, make)
    yield from _shaped_questions("held out wide", UNIT_SHAPES, OLD_NOUNS)


def draw_questions() -> Iterator[Question]:
    """Yield the questions of a new list."""
    sampler = PromptSampler("held out")
    world = sampler.world
    makes: dict[str, tuple[int, Callable[[PromptSampler], Example | None]]] = {
        "one": (ROWS, lambda sampler: sampler.generate(world.single)),
        "two": (ROWS, lambda sampler: sampler.generate(world.pair)),
        "compose": (ROWS, lambda sampler: sampler.compose()),
        "count": (FEWER_ROWS, lambda sampler: sampler.generate(world.counted)),
        "inside": (FEWER_ROWS, lambda sampler: sampler.generate(world.inside)),
        "four": (FEWER_ROWS, lambda sampler: sampler.generate(world.four)),
    }
    for part, (rows, make) in makes.items():
        for seed in range(rows):
            yield part, seed, unseen(sampler, make)
    for seed in range(ROWS):
        # This kind is chosen first, because kinds with many held-out wordings would crowd out the others.
        yield "edit", seed, unseen(sampler, partial(_edit, kind=sampler.kind_of_edit()))
    yield from _shaped_questions("held out", UNIT_SHAPES, len(NOUNS))
    for seed in range(CHAINS):
        yield from (("chain", seed, example) for example in _chain(sampler))


def _shaped_questions(name: str, shapes: tuple[Frame, ...], nouns: int) -> Iterator[Question]:
    for seed in range(FEWER_ROWS):
        other = PromptSampler(f"{name} {seed}", shapes[seed % len(shapes)], nouns)
        yield "shape", seed, unseen(other, lambda sampler: sampler.generate())
        yield "shape edit", seed, unseen(other, partial(_edit, kind=other.kind_of_edit()))


def _edit(sampler: PromptSampler, kind: str) -> Example | None:
    return sampler.edit(kind)


def _chain(sampler: PromptSampler) -> list[Example]:
    """Return ten edits that leave the background and the first thing unchanged."""
    while True:
        scene = first = sampler.world.pair()
        chain: list[Example] = []
        for _ in range(100):
            example = sampler.edit(sampler.pick([kind for kind in EDITS if kind != "background"]), scene)
            if example and first.things[0] in example.target.things:
                chain.append(example)
                scene = example.target
            if len(chain) == CHAIN_LENGTH:
                return chain


def write_questions(path: Path = LIST) -> None:
    """Draw a list anew."""
    lines = []
    for part, seed, example in draw_wide_questions() if path == WIDE_LIST else draw_questions():
        frame = example.frame
        square = frame.width == frame.height == SQUARE
        shape = "" if square else f"@{frame.width}x{frame.height}"
        scenes = (example.target, *example.references)
        lines.append([part + shape, seed, example.task, example.prompt, *(scene.pack() for scene in scenes)])
    path.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
