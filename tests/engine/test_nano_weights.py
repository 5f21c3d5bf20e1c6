"""The embedded weights: small enough, at home in unmodified diffusers, and as obedient as the README says."""

import json
from functools import lru_cache

import numpy as np
import pytest
import torch
from PIL import Image

from engine.nano.evaluate import Table, evaluate, questions
from engine.nano.training.folder import WEIGHTS
from engine.nano.training.metadata import vocabulary
from engine.nano.training.model import LAYERS, TEXT_LENGTH, Nano
from engine.nano.training.score import draw
from engine.nano.training.train_decoder import psnr

EVERY = 15
"""Of the held-out list: 20 questions a row, half a minute on one core."""
EVERY_CHAIN = 5
"""Six of the 30 chains."""

LEAST = {
    "background right": 0.95,
    "object there, one asked for": 0.95,
    "object there, each of two": 0.95,
    "position right": 0.95,
    "colour of a shape right": 0.95,
    "edit done": 0.90,
    "compose: every object there": 0.90,
    "compose: background right": 0.95,
}
"""A little under what was measured on these questions, 100 % each; engine/nano/README.md has the whole list's table."""
MOST = {"edit keeps the rest (of 255)": 7.0, "ten edits in a row: untouched part (of 255)": 7.0}
"""Measured on these: 6.2 and 4.8."""
LEAST_DECIBELS = 30.2
"""Measured: 30.7."""


@lru_cache(maxsize=1)
def _nano() -> Nano:
    return Nano(WEIGHTS).eval()


@lru_cache(maxsize=1)
def _table() -> Table:
    asked = [q for q in questions() if q[1] % (EVERY_CHAIN if q[0] == "chain" else EVERY) == 0]
    return evaluate(_nano(), asked)[0]


def test_it_has_at_most_15_million_parameters_and_32_megabytes():
    assert sum(parameter.numel() for parameter in _nano().parameters()) <= 15e6
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) <= 32e6


def test_its_folder_says_how_it_was_trained():
    assert json.loads((WEIGHTS / "klein.json").read_text()) == {
        "text_length": TEXT_LENGTH,
        "text_layers": list(LAYERS),
        "native_size": 128,
        "max_references": 3,
        **vocabulary(),
    }
    assert json.loads((WEIGHTS / "model_index.json").read_text())["_class_name"] == "Flux2KleinKVPipeline"


@pytest.mark.parametrize("part", ["one", "edit", "compose"])
def test_unmodified_diffusers_paints_the_same_picture(part):
    """Observed largest difference 1.5e-6 of 1, fp32, torch 2.13, diffusers 0.42.1."""
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.Flux2KleinKVPipeline.from_pretrained(WEIGHTS, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    example = next(q[2] for q in questions() if q[0] == part)
    references = draw(*example.references) if example.references else []
    given = {"image": [Image.fromarray(picture) for picture in references]} if references else {}
    theirs = pipeline(
        prompt=example.prompt,
        height=128,
        width=128,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(7),
        text_encoder_out_layers=LAYERS,
        max_sequence_length=TEXT_LENGTH,
        output_type="np",
        **given,
    ).images[0]
    stacked = torch.from_numpy(np.stack(references)).permute(0, 3, 1, 2).float()[None] / 127.5 - 1 if given else None
    ours = _nano().paint([example.prompt], [7], stacked)[0]
    assert np.abs(((ours + 1) / 2).permute(1, 2, 0).numpy() - theirs).max() < 1e-4


def test_the_decoder_gives_scenes_back():
    scenes = [q[2].target for q in questions() if q[0] in ("one", "two") and q[1] % 10 == 0]
    pictures = torch.from_numpy(np.stack(draw(*scenes))).permute(0, 3, 1, 2).float() / 127.5 - 1
    nano = _nano()
    assert psnr(pictures, nano.decode(nano.encode(pictures))) >= LEAST_DECIBELS


@pytest.mark.parametrize("measure", LEAST)
def test_it_obeys_as_well_as_measured(measure):
    assert _table().rows[measure][0] >= LEAST[measure]


@pytest.mark.parametrize("measure", MOST)
def test_it_keeps_what_it_is_not_asked_to_change(measure):
    assert _table().rows[measure][0] <= MOST[measure]
