"""Tests of nano's training data.

Every object is visible, every word is known, and training never contains the evaluation list.
"""

import ast
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.nano import evaluate
from engine.nano.training.compositor import BACKGROUNDS, CANVAS
from engine.nano.training.data_loader import paint_scenes, token_weights
from engine.nano.training.folder import WEIGHTS, load_autoencoder
from engine.nano.training.pca_encoder import fit_encoder
from engine.nano.training.prompts import EDITS, PromptSampler, combination_held_out, training_prompts, wording_held_out
from engine.nano.training.scenes import MAX_THINGS, TOLERATED_OVERLAP, World, overlap, visible
from engine.nano.training.score import draw
from engine.nano.training.sprites import KINDS, SIZES, atlas
from engine.nano.words import COLOURS, KNOWN, NOUNS, SHAPES, unknown

ENGINE = Path(evaluate.__file__).parents[1]
TASKS = ("generate", "edit", "compose")


def test_the_world_is_as_large_as_it_says():
    assert len(NOUNS) >= 48
    assert (len(SHAPES), len(COLOURS)) == (8, 12)
    assert len(BACKGROUNDS) == 18
    assert len(KINDS) == len(NOUNS) + 96


def test_no_two_sprites_are_alike():
    sprites = atlas()[SIZES[1]].astype(float)
    for i, sprite in enumerate(sprites):
        distances = np.abs(sprites - sprite).mean(axis=(1, 2, 3))
        distances[i] = np.inf
        assert distances.min() > 3, (KINDS[i], KINDS[int(distances.argmin())])


def test_every_object_of_a_scene_is_whole_and_visible():
    world = World(1)
    for _ in range(300):
        scene = world.scene()
        assert 1 <= len(scene.things) <= MAX_THINGS
        for i, thing in enumerate(scene.things):
            assert min(thing.box) >= 0
            assert max(thing.box) <= CANVAS
            assert visible(thing.kind, scene.background)
            assert all(overlap(thing, other) <= TOLERATED_OVERLAP for other in scene.things[:i])


def test_scene_is_drawn_inside_its_boxes():
    world = World(2)
    for scene in (world.scene() for _ in range(20)):
        picture, empty = draw(scene, type(scene)(scene.background))
        differs = np.abs(picture.astype(int) - empty).max(axis=-1) > 0
        for left, top, right, bottom in (thing.box for thing in scene.things):
            assert differs[top:bottom, left:right].any()
            differs[top:bottom, left:right] = False
        assert not differs.any()


@pytest.mark.parametrize("task", TASKS)
def test_every_training_word_is_in_the_vocabulary(task):
    sampler = PromptSampler(3)
    assert not {word for _ in range(500) for word in unknown(training_prompts(sampler, task).prompt)}


def test_unknown_words_are_named_once_each_in_order():
    assert unknown("A dragon beside the cat; the DRAGON wears a fedora.") == ["dragon", "wears", "fedora"]
    assert unknown("a red circle on a blue background") == []


@pytest.mark.parametrize("kind", EDITS)
def test_an_edit_changes_only_what_it_says(kind):
    sampler = PromptSampler(kind)
    made = [example for _ in range(60) if (example := sampler.edit(kind))]
    assert made
    for example in made:
        (source,) = example.references
        assert example.target != source
        gone = [thing for thing in source.things if thing not in example.target.things]
        new = [thing for thing in example.target.things if thing not in source.things]
        expected = {"background": (0, 0), "remove": (1, 0), "add": (0, 1)}.get(kind, (1, 1))
        assert (len(gone), len(new)) == expected
        assert (source.background != example.target.background) == (kind == "background")


def test_a_composition_takes_its_objects_from_its_references():
    sampler = PromptSampler(4)
    for _ in range(200):
        example = training_prompts(sampler, "compose")
        kinds = {thing.kind for scene in example.references for thing in scene.things}
        assert {thing.kind for thing in example.target.things} <= kinds


def test_most_training_edits_have_several_objects_of_mixed_sizes():
    """Train on scenes such as a chain of edits produces.

    After training on tidy scenes only, three moves of five failed on them.
    """
    sampler = PromptSampler(8)
    scenes = [training_prompts(sampler, "edit").references[0] for _ in range(1000)]
    assert sum(len(scene.things) > 1 for scene in scenes) > 600
    assert sum(len({thing.size for thing in scene.things}) > 1 for scene in scenes) > 200
    kinds = Counter(training_prompts(sampler, "edit").task for _ in range(1000))
    assert min(kinds[kind] for kind in EDITS) > 30


def test_training_never_contains_the_held_out_list():
    asked = [q[2] for q in evaluate.questions() if q[0] != "chain"]
    assert all(wording_held_out(example) and combination_held_out(example) for example in asked)
    sampler = PromptSampler(5)
    for task in TASKS:
        for _ in range(300):
            example = training_prompts(sampler, task)
            assert not wording_held_out(example)
            assert not combination_held_out(example)


def test_every_vocabulary_and_evaluation_word_occurs_in_training():
    """Allow new wordings in the evaluation list, but no new words.

    "shrink" once occurred in no training sentence, and nano never shrank anything.
    """
    sampler = PromptSampler(5)
    examples = [training_prompts(sampler, task) for task in TASKS for _ in range(3000)]
    practised = {word for example in examples for word in re.findall(r"[a-z]+", example.prompt.lower())}
    asked = {word for question in evaluate.questions() for word in re.findall(r"[a-z]+", question[2].prompt.lower())}
    assert not (asked | KNOWN) - practised


def test_list_has_300_questions_a_row_and_chains_of_ten():
    parts = [q[0] for q in evaluate.questions()]
    assert all(parts.count(part) >= 300 for part in ("one", "two", "edit", "compose"))
    assert parts.count("chain") % evaluate.CHAIN_LENGTH == 0


def test_chain_gives_each_edit_the_previous_image():
    chains: dict[int, list] = {}
    for part, seed, example in evaluate.questions():
        if part == "chain":
            chains.setdefault(seed, []).append(example)
    for chain in chains.values():
        for before, after in pairwise(chain):
            assert after.references == (before.target,)


def test_loss_weighs_objects_most():
    example = training_prompts(PromptSampler(6), "generate")
    weights = token_weights(example).reshape(8, 8)
    assert weights.mean().item() == pytest.approx(1.0)
    left, top, _, _ = example.target.things[0].box
    assert weights[(top + 8) // 16, (left + 8) // 16] == weights.max()


def test_the_computed_encoder_is_linear_and_local():
    """Encode two distant objects independently of each other.

    The residual is at most 0.3 %.
    """
    autoencoder = load_autoencoder(WEIGHTS)
    world = World(7)
    pictures = paint_scenes(_painter(), [world.scene() for _ in range(64)])
    if 2 * autoencoder.shape.latent >= autoencoder.shape.encoder[-1]:
        pytest.skip("this set's encoder was learned")
    fit_encoder(autoencoder, pictures)
    with torch.no_grad():
        left, right = pictures[:8].clone(), pictures[:8].clone()
        left[..., 64:], right[..., :64] = 0, 0
        both, nothing = autoencoder.encode(pictures[:8]), autoencoder.encode(torch.zeros_like(left))
        summed = autoencoder.encode(left) + autoencoder.encode(right) - nothing
    assert ((both - summed).abs().mean() / both.abs().mean()).item() < 0.01


def _painter():
    from engine.nano.training.compositor import Compositor

    return Compositor()


def test_only_training_and_evaluation_know_the_scenes():
    """Check that only training and evaluation import the scenes.

    Generated images come from the network alone.
    """
    for path in ENGINE.rglob("*.py"):
        if path.is_relative_to(ENGINE / "nano"):
            continue
        imported = {
            name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        }
        assert not [name for name in imported if name.startswith("engine.nano.")], path
