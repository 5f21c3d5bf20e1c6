"""Measure how well nano follows prompts, on a held-out list.

`python -m engine.nano.evaluate` generates the list's images, scores them and prints the table.
Wordings and combinations of the list were never trained on. `held_out.jsonl` fixes them with their seeds, so that two
sets of weights answer the same questions. `--write` draws a new list, which makes older figures incomparable.
"""

import argparse
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from engine.diffusion.change_mask import find_change
from engine.nano.training.compositor import BACKGROUNDS
from engine.nano.training.folder import WEIGHTS
from engine.nano.training.model import Nano
from engine.nano.training.prompts import EDITS, Example, PromptSampler, touched, unseen
from engine.nano.training.scenes import Scene, Thing
from engine.nano.training.score import (
    Rgb8,
    background_right,
    composed,
    draw,
    edit_done,
    look,
    place_right,
    places_right,
    rest_kept,
    untouched,
)
from engine.nano.training.sprites import KINDS

LIST = Path(__file__).parent / "training" / "held_out.jsonl"
ROWS = 300
"""Number of questions of each kind."""
CHAINS = 30
CHAIN_LENGTH = 10
BATCH = 20
SHOULD_CHANGE = 8
"""Difference in the channel that differs most, of 255. A smaller one is no change that the edit asked for."""
CHAINED = "ten edits in a row: untouched part (of 255)"
CHAINED_PRESERVED = "ten edits in a row, the original put back around each: untouched part (of 255)"

Question = tuple[str, int, Example]
"""(part of the list, seed, example). A chain is CHAIN_LENGTH questions of one seed, each about the last answer."""
Chain = tuple[list[Example], tuple[Rgb8, ...]]
"""The edits of a chain, and the image after each."""


def _pack(scene: Scene) -> list:
    return [BACKGROUNDS[scene.background], *([thing.name, thing.size, *thing.slot] for thing in scene.things)]


def _unpack(packed: list) -> Scene:
    ground, *things = packed
    return Scene(
        BACKGROUNDS.index(ground), tuple(Thing(KINDS.index(name), size, (x, y)) for name, size, x, y in things)
    )


def questions(path: Path = LIST) -> Iterator[Question]:
    """Yield the list's questions, in order."""
    for line in path.read_text().splitlines():
        part, seed, task, prompt, target, *references = json.loads(line)
        scenes = tuple(_unpack(reference) for reference in references)
        scene = _unpack(target)
        boxes = touched(scenes[0], scene) if task in EDITS else ()
        yield part, seed, Example(task, prompt, scene, scenes, boxes)


def draw_questions() -> Iterator[Question]:
    """Yield the questions of a new list."""
    sampler = PromptSampler("held out")
    world = sampler.world
    makes: dict[str, Callable[[PromptSampler], Example | None]] = {
        "one": lambda sampler: sampler.generate(world.single),
        "two": lambda sampler: sampler.generate(world.pair),
        "compose": lambda sampler: sampler.compose(),
    }
    for part, make in makes.items():
        for seed in range(ROWS):
            yield part, seed, unseen(sampler, make)
    for seed in range(ROWS):
        # This kind is chosen first, because kinds with many held-out wordings would crowd out the others.
        kind = sampler.kind_of_edit()
        yield "edit", seed, unseen(sampler, lambda sampler, kind=kind: sampler.edit(kind))
    for seed in range(CHAINS):
        yield from (("chain", seed, example) for example in _chain(sampler))


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
    lines = (
        [part, seed, example.task, example.prompt, _pack(example.target), *map(_pack, example.references)]
        for part, seed, example in draw_questions()
    )
    path.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))


def _images(tensor: torch.Tensor) -> list[Rgb8]:
    return list(((tensor + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy())


def _tensor(images: list[Rgb8]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def answers(nano: Nano, asked: list[Question], steps: int) -> list[Rgb8]:
    """Return nano's images for independent questions.

    A batch holds questions with the same number of references.
    """
    order = sorted(range(len(asked)), key=lambda i: len(asked[i][2].references))
    painted: dict[int, Rgb8] = {}
    while order:
        count = len(asked[order[0]][2].references)
        batch = [i for i in order[:BATCH] if len(asked[i][2].references) == count]
        order = order[len(batch) :]
        references = None
        if count:
            drawn = [_tensor(draw(*asked[i][2].references)) for i in batch]
            references = torch.stack(drawn).to(nano.device)
        prompts, seeds = [asked[i][2].prompt for i in batch], [asked[i][1] for i in batch]
        painted.update(zip(batch, _images(nano.paint(prompts, seeds, references, steps)), strict=True))
    return [painted[i] for i in range(len(asked))]


@dataclass
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
        round_trip = nano.decode(nano.encode(_tensor([original]).to(nano.device)))
        started = time.perf_counter()
        change = find_change(_tensor([image]).to(nano.device), round_trip)
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
    images = [draw(chains[seed][0].references[0])[0] for seed in seeds]
    trail = []
    for step in range(CHAIN_LENGTH):
        prompts = [chains[seed][step].prompt for seed in seeds]
        references = _tensor(images)[:, None].to(nano.device)
        edited = _images(nano.paint(prompts, [seed * CHAIN_LENGTH + step for seed in seeds], references, steps))
        images = [kept.image for kept in preserved(nano, edited, images)] if preserve else edited
        trail.append(images)
    return list(zip(chains.values(), zip(*trail, strict=True), strict=True))


@dataclass
class Table:
    """Table of measures -> (value, number of samples)."""

    rows: dict[str, tuple[float, int]]

    def add(self, name: str, values: list[float] | list[bool]) -> None:
        if values:
            self.rows[name] = (float(np.mean(values)), len(values))

    def __str__(self) -> str:
        lines = []
        for name, (value, count) in self.rows.items():
            plain = name.endswith(("of 255)", "(ms)"))
            shown = f"{value:.2f}" if plain else f"{100 * value:.1f} %"
            lines.append(f"| {name} | {shown} | {count} |")
        return "\n".join(["| measure | value | n |", "|---|---|---|", *lines])


def evaluate(nano: Nano, asked: list[Question], steps: int = 4) -> tuple[Table, list[tuple[Question, Rgb8, bool]]]:
    """Return the table, and every image with whether it is right.

    An image is right if all its parts are.
    """
    table = Table({})
    parts = {part: [q for q in asked if q[0] == part] for part in ("one", "two", "edit", "compose", "chain")}
    alone = [q for part in ("one", "two", "edit", "compose") for q in parts[part]]
    painted = dict(zip(map(id, alone), answers(nano, alone, steps), strict=True))
    shown: list[tuple[Question, Rgb8, bool]] = []

    def each(part: str) -> list[tuple[Question, Rgb8]]:
        return [(q, painted[id(q)]) for q in parts[part]]

    generated = [*each("one"), *each("two")]
    grounds = [background_right(image, q[2].target) for q, image in generated]
    table.add("background right", grounds)
    colours: list[bool] = []
    found: dict[str, list[bool]] = {"one": [], "two": []}
    for (q, image), ground in zip(generated, grounds, strict=True):
        scene = q[2].target
        whole = ground
        for i, thing in enumerate(scene.things):
            finding = look(image, scene, i)
            right = finding.right(thing)
            found[q[0]].append(right)
            whole &= right
            if thing.colour is not None:
                colours.append(finding.colour == thing.colour)
        shown.append((q, image, whole))
    table.add("object there, one asked for", found["one"])
    table.add("object there, each of two", found["two"])
    places = [place_right(image, q[2].target) for q, image in each("one")]
    places += [places_right(image, q[2].target) for q, image in each("two")]
    table.add("position right", places)
    table.add("colour of a shape right", colours)

    done = {id(q): edit_done(image, q[2]) for q, image in each("edit")}
    table.add("edit done", list(done.values()))
    for kind in EDITS:
        table.add(f"edit done: {kind}", [done[id(q)] for q in parts["edit"] if q[2].task == kind])
    table.add("edit keeps the rest (of 255)", [rest_kept(image, q[2]) for q, image in each("edit")])
    shown += [(q, image, done[id(q)]) for q, image in each("edit")]

    _add_preserved(table, nano, each("edit"))

    together = {id(q): composed(image, q[2].target) for q, image in each("compose")}
    table.add("compose: every object there", list(together.values()))
    table.add("compose: background right", [background_right(image, q[2].target) for q, image in each("compose")])
    shown += [(q, image, together[id(q)]) for q, image in each("compose")]

    if parts["chain"]:
        table.add(CHAINED, _drifts(chained(nano, parts["chain"], steps)))
        table.add(CHAINED_PRESERVED, _drifts(chained(nano, parts["chain"], steps, preserve=True)))
    return table, shown


def _drifts(chains: list[Chain], edits: int = CHAIN_LENGTH) -> list[float]:
    """Return mean differences, of 255, after so many edits.

    They are those of the part that no edit of the chain should touch.
    """
    drift = []
    for chain, images in chains:
        image = images[edits - 1]
        same = untouched(tuple(box for example in chain for box in example.touched))
        (original,) = draw(chain[0].references[0])
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


def _add_preserved(table: Table, nano: Nano, edits: list[tuple[Question, Rgb8]]) -> None:
    """Add to the table how well each change mask fits its edit.

    The mask should cover the pixels that should have changed.
    """
    originals = [draw(q[2].references[0])[0] for q, _ in edits]
    kept = preserved(nano, [image for _, image in edits], originals)
    rows: dict[str, list[float]] = defaultdict(list)
    for (q, image), original, result in zip(edits, originals, kept, strict=True):
        (target,) = draw(q[2].target)
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


def montage(shown: list[tuple[Question, Rgb8, bool]], path: Path, columns: int = 8) -> None:
    """Draw a sheet of references, prompts and answers.

    The colour of a prompt is the verdict: green for right, red for wrong.
    """
    cell, text = 132, 34
    rows: list[list[tuple[Rgb8, str, str]]] = [[]]
    for (_, _, example), image, right in shown:
        group = [(reference, "", "black") for reference in draw(*example.references)] if example.references else []
        group.append((image, example.prompt, "darkgreen" if right else "red"))
        if len(rows[-1]) + len(group) > columns:
            rows.append([])
        rows[-1] += group
    sheet = Image.new("RGB", (columns * cell, len(rows) * (cell + text)), "white")
    pen = ImageDraw.Draw(sheet)
    for y, row in enumerate(rows):
        for x, (image, prompt, colour) in enumerate(row):
            sheet.paste(Image.fromarray(image), (x * cell, y * (cell + text)))
            lines = [prompt[i : i + 21] for i in range(0, len(prompt), 21)]
            pen.multiline_text((x * cell, y * (cell + text) + 128), "\n".join(lines[:3]), fill=colour, spacing=0)
    sheet.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--montage", type=Path, default=Path("nano.png"))
    parser.add_argument("--every", type=int, default=1, help="of the list, every n-th question; chains stay whole")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--drift", type=Path, help="measure the chains only, after each edit; write JSON there")
    parser.add_argument("--write", action="store_true", help="draw the held-out list anew")
    args = parser.parse_args()
    if args.write:
        write_questions()
    if not args.device.startswith("cuda"):
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    asked = [q for q in questions() if q[1] % args.every == 0]
    nano = Nano(args.weights).to(args.device)
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
