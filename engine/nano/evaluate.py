"""Measure how well nano follows prompts, on a held-out list.

`python -m engine.nano.evaluate` generates the list's images, scores them and prints the table.
Wordings and combinations of the lists were never trained on. `held_out.jsonl` is the list of the whole world,
`held_out_48.jsonl` that of the first nano (48 nouns, one canvas). `--list old` asks the latter, so that both can be
compared. `held_out_48_wide.jsonl` (`--list wide`) has what that first nano did not know: more backgrounds,
groups, one thing inside another, four things, three and four references, other shapes. Lists hold their seeds, so that
two sets of weights answer the same questions. `--write` draws the list anew, which makes older figures incomparable.
"""

import argparse
import json
import os
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from engine.diffusion.change_mask import find_change
from engine.nano.training.compositor import as_tensor, as_uint8
from engine.nano.training.edits import EDITS
from engine.nano.training.folder import WEIGHTS
from engine.nano.training.frames import SQUARE, Frame
from engine.nano.training.model import Nano
from engine.nano.training.prompts import Example
from engine.nano.training.questions import (
    CHAIN_LENGTH,
    LISTS,
    Question,
    as_scored,
    at_scale,
    known_list,
    questions,
    write_questions,
)
from engine.nano.training.score import (
    Rgb8,
    background_right,
    composed,
    draw,
    edit_done,
    in_units,
    look,
    place_right,
    places_right,
    rest_kept,
    sharpness,
    untouched,
)

BATCH = 20
SHOULD_CHANGE = 8
"""Difference in the channel that differs most, of 255. A smaller one is no change that the edit asked for."""
CHAINED = "ten edits in a row: untouched part (of 255)"
CHAINED_PRESERVED = "ten edits in a row, the original put back around each: untouched part (of 255)"

Chain = tuple[list[Example], tuple[Rgb8, ...]]
"""The edits of a chain, and the image after each."""

ALONE = ("one", "two", "edit", "compose", "count", "inside", "four", "shape", "shape edit")
"""The parts whose questions stand alone."""


def answers(nano: Nano, asked: list[Question], steps: int) -> list[Rgb8]:
    """Return nano's images for independent questions.

    A batch holds questions with the same canvas and number of references.
    """
    groups: dict[tuple[Frame, int], list[int]] = {}
    for i, (_, _, example) in enumerate(asked):
        groups.setdefault((example.frame, len(example.references)), []).append(i)
    images: dict[int, Rgb8] = {}
    for (frame, count), members in groups.items():
        for batch in (members[i : i + BATCH] for i in range(0, len(members), BATCH)):
            references = None
            if count:
                drawn = [as_tensor(draw(*asked[i][2].references, frame=frame)) for i in batch]
                references = torch.stack(drawn).to(nano.device)
            prompts, seeds = [asked[i][2].prompt for i in batch], [asked[i][1] for i in batch]
            made = nano.sample(prompts, seeds, references, steps, frame.pixels)
            images.update(zip(batch, as_uint8(made), strict=True))
    return [images[i] for i in range(len(asked))]


@dataclass(frozen=True)
class Preserved:
    """An edit with the original restored around its change.

    mask: bool, true where the edit may differ from the original.
    ms: to find the change and restore the rest, with the round trip at hand.
    """

    image: Rgb8
    mask: np.ndarray
    whole: bool
    ms: float


def preserved(nano: Nano, edited: list[Rgb8], originals: list[Rgb8]) -> list[Preserved]:
    """Restore the originals around edits, like the server does.

    The engine's change mask finds the unchanged parts.
    """
    kept = []
    for image, original in zip(edited, originals, strict=True):
        tensor = as_tensor([original]).to(nano.device)
        grid = original.shape[1] // nano.token, original.shape[0] // nano.token
        round_trip = nano.decode(nano.encode(tensor), grid)
        started = time.perf_counter()
        change = find_change(as_tensor([image]).to(nano.device), round_trip)
        opacity = change.opacity.cpu().numpy()[..., None]
        painted = ((change.painted[0] + 1) * 127.5).permute(1, 2, 0).cpu().numpy()
        mixed = np.rint(original + opacity * (painted - original)).astype(np.uint8)
        spent = 1000 * (time.perf_counter() - started)
        kept.append(Preserved(mixed, opacity[..., 0] > 0, change.whole, spent))
    return kept


def chained(nano: Nano, asked: list[Question], steps: int, preserve: bool = False) -> list[Chain]:
    """Return each chain with the image after each of its edits.

    Each edit starts from the image that the previous edit made.
    """
    chains: dict[int, list[Example]] = {}
    for _, seed, example in asked:
        chains.setdefault(seed, []).append(example)
    seeds = list(chains)
    images = [draw(chains[seed][0].references[0], frame=chains[seed][0].frame)[0] for seed in seeds]
    trail = []
    for step in range(CHAIN_LENGTH):
        prompts = [chains[seed][step].prompt for seed in seeds]
        references = as_tensor(images)[:, None].to(nano.device)
        edited = as_uint8(nano.sample(prompts, [seed * CHAIN_LENGTH + step for seed in seeds], references, steps))
        images = [kept.image for kept in preserved(nano, edited, images)] if preserve else edited
        trail.append(images)
    return list(zip(chains.values(), zip(*trail, strict=True), strict=True))


@dataclass
class Table:
    """Table of measures -> (value, number of samples)."""

    rows: dict[str, tuple[float, int]] = field(default_factory=dict)

    def add(self, name: str, values: list[float] | list[bool]) -> None:
        if values:
            self.rows[name] = (float(np.mean(values)), len(values))

    def __str__(self) -> str:
        lines = []
        for name, (value, count) in self.rows.items():
            plain = name.endswith(("of 255)", "(ms)", "(1 is as sharp)"))
            lines.append(f"| {name} | {f'{value:.2f}' if plain else f'{100 * value:.1f} %'} | {count} |")
        return "\n".join(["| measure | value | n |", "|---|---|---|", *lines])


@dataclass(frozen=True)
class Answer:
    """The image for a question, and whether it is right."""

    question: Question
    image: Rgb8
    small: Rgb8
    right: bool

    @property
    def example(self) -> Example:
        return self.question[2]


Answers = list[tuple[Question, Rgb8, Rgb8]]


def evaluate(nano: Nano, asked: list[Question], steps: int = 4) -> tuple[Table, list[Answer]]:
    """Return the table and every image made for it."""
    table = Table()
    alone = [q for q in asked if q[0] in ALONE]
    images = answers(nano, alone, steps)
    parts: dict[str, Answers] = {part: [] for part in ALONE}
    for q, image in zip(alone, images, strict=True):
        parts[q[0]].append((q, image, in_units(image, q[2].frame)))
    shown = _generated(table, parts)
    shown += _edited(table, parts["edit"])
    _add_preserved(table, nano, parts["edit"])
    together = [composed(small, q[2].target) for q, _, small in parts["compose"]]
    table.add("compose: every object there", together)
    table.add("compose: background right", [background_right(small, q[2].target) for q, _, small in parts["compose"]])
    shown += [Answer(*answer, right) for answer, right in zip(parts["compose"], together, strict=True)]
    shown += _beyond(table, parts)
    if chains := [q for q in asked if q[0] == "chain"]:
        table.add(CHAINED, _drifts(chained(nano, chains, steps)))
        table.add(CHAINED_PRESERVED, _drifts(chained(nano, chains, steps, preserve=True)))
    return table, shown


def _generated(table: Table, parts: dict[str, Answers]) -> list[Answer]:
    """Add the rows of one and two objects."""
    shown: list[Answer] = []
    grounds: list[bool] = []
    colours: list[bool] = []
    sharp: list[float] = []
    sharp_in_units: list[float] = []
    found: dict[str, list[bool]] = {"one": [], "two": []}
    for q, image, small in (*parts["one"], *parts["two"]):
        scene = q[2].target
        grounds.append(background_right(small, scene))
        whole = grounds[-1]
        for i, thing in enumerate(scene.things):
            finding = look(small, scene, i)
            right = finding.right(thing)
            found[q[0]].append(right)
            whole &= right
            if right:
                sharp.append(sharpness(image, q[2], i))
                sharp_in_units.append(sharpness(small, as_scored(q[2]), i))
            if thing.colour is not None:
                colours.append(finding.colour == thing.colour)
        shown.append(Answer(q, image, small, whole))
    table.add("background right", grounds)
    table.add("object there, one asked for", found["one"])
    table.add("object there, each of two", found["two"])
    places = [place_right(small, q[2].target) for q, _, small in parts["one"]]
    places += [places_right(small, q[2].target) for q, _, small in parts["two"]]
    table.add("position right", places)
    table.add("colour of a shape right", colours)
    table.add("outline of what is there (1 is as sharp)", sharp)
    table.add("outline at 128 × 128 (1 is as sharp)", sharp_in_units)
    return shown


def _edited(table: Table, edits: Answers) -> list[Answer]:
    """Add the rows of single edits."""
    done = [edit_done(small, q[2]) for q, _, small in edits]
    table.add("edit done", done)
    for kind in EDITS:
        table.add(f"edit done: {kind}", [d for d, (q, _, _) in zip(done, edits, strict=True) if q[2].task == kind])
    table.add("edit keeps the rest (of 255)", [rest_kept(image, q[2]) for q, image, _ in edits])
    table.add("edit keeps the rest at 128 × 128 (of 255)", [rest_kept(small, as_scored(q[2])) for q, _, small in edits])
    return [Answer(*answer, right) for answer, right in zip(edits, done, strict=True)]


def _beyond(table: Table, parts: dict[str, Answers]) -> list[Answer]:
    """Add the rows of what only the larger world has."""
    shown: list[Answer] = []
    names = {"count": "two to four of a kind: all there", "inside": "one inside another: both there",
             "four": "four things: each there", "shape": "other shapes: every object there"}  # fmt: skip
    for part, name in names.items():
        each = [
            [look(small, q[2].target, i).right(thing) for i, thing in enumerate(q[2].target.things)]
            for q, _, small in parts[part]
        ]
        table.add(name, [right for row in each for right in row] if part == "four" else [all(row) for row in each])
        shown += [Answer(*answer, all(row)) for answer, row in zip(parts[part], each, strict=True)]
    done = [edit_done(small, q[2]) for q, _, small in parts["shape edit"]]
    table.add("other shapes: edit done", done)
    shown += [Answer(*answer, right) for answer, right in zip(parts["shape edit"], done, strict=True)]
    return shown


def _drifts(chains: list[Chain], edits: int = CHAIN_LENGTH) -> list[float]:
    """Return mean differences, of 255, after so many edits.

    They are those of the part that no edit of the chain should touch.
    """
    drift = []
    for chain, images in chains:
        image = images[edits - 1]
        same = untouched(tuple(box for example in chain for box in example.touched), chain[0].frame)
        (original,) = draw(chain[0].references[0], frame=chain[0].frame)
        drift.append(float(np.abs(original[same].astype(int) - image[same]).mean()))
    return drift


def drift_by_edit(nano: Nano, asked: list[Question], steps: int = 4) -> dict[str, list[float]]:
    """Return the mean drift after each edit of the chains, by `preserve`."""
    chains = [q for q in asked if q[0] == "chain"]
    curves = {}
    for name in ("off", "auto"):
        trails = chained(nano, chains, steps, preserve=name == "auto")
        curves[name] = [round(float(np.mean(_drifts(trails, n + 1))), 2) for n in range(CHAIN_LENGTH)]
    return curves


def _add_preserved(table: Table, nano: Nano, edits: Answers) -> None:
    """Add to the table how well each change mask fits its edit.

    The mask should cover the pixels that should have changed.
    """
    originals = [draw(q[2].references[0], frame=q[2].frame)[0] for q, _, _ in edits]
    kept = preserved(nano, [image for _, image, _ in edits], originals)
    rows: dict[str, list[float]] = defaultdict(list)
    for (q, image, _), original, result in zip(edits, originals, kept, strict=True):
        (target,) = draw(q[2].target, frame=q[2].frame)
        kind = "global" if q[2].task == "background" else "local"
        rows[f"{kind} edits: error as painted (of 255)"].append(_error(image, target))
        rows[f"{kind} edits: error with the original put back (of 255)"].append(_error(result.image, target))
        rows[f"{kind} edits: taken for global"].append(result.whole)
        if kind == "local":
            rows["local edits: for the change mask (ms)"].append(result.ms)
            should = np.abs(target.astype(int) - original).max(axis=2) > SHOULD_CHANGE
            same = (result.image == original).all(axis=2)
            rows["local edits: pixels that should change, found"].append((result.mask & should).sum() / should.sum())
            rows["local edits: pixels that should stay, byte-identical"].append(
                (same & ~should).sum() / (~should).sum()
            )
    for name, values in rows.items():
        table.add(name, values)


def _error(image: Rgb8, target: Rgb8) -> float:
    return float(np.abs(image.astype(int) - target).mean())


def montage(shown: list[Answer], path: Path, columns: int = 8) -> None:
    """Draw a sheet of references, prompts and answers.

    The colour of a prompt is the verdict: green for right, red for wrong.
    """
    side = max((max(answer.image.shape[:2]) for answer in shown), default=SQUARE)
    cell, text = side + 4, 34
    rows: list[list[tuple[Rgb8, str, str]]] = [[]]
    for answer in shown:
        example = answer.example
        references = draw(*example.references, frame=example.frame) if example.references else []
        group = [(reference, "", "black") for reference in references]
        group.append((answer.image, example.prompt, "darkgreen" if answer.right else "red"))
        if len(rows[-1]) + len(group) > columns:
            rows.append([])
        rows[-1] += group
    sheet = Image.new("RGB", (columns * cell, len(rows) * (cell + text)), "white")
    pen = ImageDraw.Draw(sheet)
    width = side // 6
    for y, row in enumerate(rows):
        for x, (image, prompt, colour) in enumerate(row):
            sheet.paste(Image.fromarray(image), (x * cell, y * (cell + text)))
            lines = [prompt[i : i + width] for i in range(0, len(prompt), width)]
            pen.multiline_text((x * cell, y * (cell + text) + side), "\n".join(lines[:3]), fill=colour, spacing=0)
    sheet.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--list", choices=tuple(LISTS), help="old: the first nano's (default: what the weights know)")
    parser.add_argument("--montage", type=Path, default=Path("nano.png"))
    parser.add_argument("--parts", default="", help="of the list, separated by commas: one, two, edit, chain …")
    parser.add_argument("--every", type=int, default=1, help="of the list, every n-th question; chains stay whole")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--drift", type=Path, help="measure the chains only, after each edit; write JSON there")
    parser.add_argument("--write", action="store_true", help="draw the held-out list anew")
    args = parser.parse_args()
    if args.write:
        write_questions(LISTS[args.list or "new"])
        return
    if not args.device.startswith("cuda"):
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    nano = Nano(args.weights).to(args.device).eval()
    scale = nano.native_size // SQUARE
    path = LISTS[args.list or known_list(args.weights)]
    parts = tuple(filter(None, args.parts.split(",")))
    asked = [q for q in questions(path) if q[1] % args.every == 0 and (not parts or q[0] in parts)]
    asked = at_scale(asked, scale)
    if args.drift:
        args.drift.write_text(json.dumps(drift_by_edit(nano, asked, args.steps)) + "\n")
        return
    start = time.monotonic()
    table, shown = evaluate(nano, asked, args.steps)
    print(table)
    print(f"{time.monotonic() - start:.0f} s")
    montage(shown[:: max(1, len(shown) // 60)], args.montage)


if __name__ == "__main__":
    main()
