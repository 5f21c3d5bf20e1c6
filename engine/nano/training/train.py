"""Trains nano on a CPU or a GPU.

python -m engine.nano.training.train STAGE RUN

Resumable, and warm from the committed weights.

Stages: `encoder` (compute it: seconds; the latents change, so only before all else), `decoder` (from latents back to
images; the latents stay), `generate` (mostly text to image), `all` (generate, edit, compose), `cool` (as `all`, with
the learning rate falling to nothing).
`--workers 2`: two processes teach one set of weights without waiting for each other (Hogwild), so that a core that is
busy elsewhere slows only its own.
A run is a folder: `state.pt` to go on from, `weights/` in diffusers format, `log.jsonl`. Stopping a run at any time
loses at most the minutes since its last save. `export RUN TO` copies the averaged weights.
"""

import argparse
import copy
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, multiprocessing

from engine.diffusion.schedule import sigmas
from engine.nano.training import compiled_training
from engine.nano.training.compiled_training import Velocity
from engine.nano.training.data_loader import DataLoader, Item
from engine.nano.training.folder import WEIGHTS, save_autoencoder, save_text_encoder, save_transformer
from engine.nano.training.model import STEPS, TEXT_LENGTH, Nano
from engine.nano.training.train_decoder import fit, train_decoder

OWN_LEVELS = sigmas(STEPS, 64)[:-1]
"""The four noise levels nano paints with."""
OWN_WEIGHTS = (1.0, 1.0, 1.5, 2.5)
"""How often each is practised: the last step alone decides what is seen, the ones before only where it starts."""
OWN_SHARE = 0.7
"""Of training, on exactly those levels; the rest spread over all, for other step counts."""
SHORT_TEXT = 32
"""Holds every practised prompt. Most batches are padded to this alone: pads cost as much as words do."""
EMA = 0.999
BETAS = (0.9, 0.99)
WARM_UP = 100
"""Steps over which the learning rate rises after every start: Adam's averages may be cold."""


@dataclass(frozen=True)
class TrainingStage:
    """One stage of training.

    shares: of batches, by (task, references). long_text: share of batches at the full text length.

    cooling: share of the time, at its end, in which the learning rate falls to nothing.
    """

    shares: dict[tuple[str, int], float]
    rate: float
    long_text: float = 0.25
    cooling: float = 0.0


_ALL = {("generate", 0): 0.36, ("edit", 1): 0.42, ("compose", 2): 0.18, ("compose", 3): 0.04}
# Images from words alone are learned by then; edits among several things are the hardest, and take longest.
_HARDER = {("generate", 0): 0.14, ("edit", 1): 0.58, ("compose", 2): 0.22, ("compose", 3): 0.06}
STAGES = {
    "generate": TrainingStage({("generate", 0): 0.80, ("edit", 1): 0.12, ("compose", 2): 0.08}, 2e-3),
    "all": TrainingStage(_ALL, 2e-3),
    "cool": TrainingStage(_HARDER, 2e-3, long_text=0.6, cooling=0.6),
}


def draw_levels(count: int, levels: int, generator: torch.Generator) -> Tensor:
    """Draw noise levels, [count · levels].

    Different ones for the `levels` uses of the same example.
    """
    own = torch.tensor(OWN_LEVELS)
    # Weighted draws without replacement: the largest of uniform^(1/weight).
    keys = torch.rand(count, len(own), generator=generator) ** (1 / torch.tensor(OWN_WEIGHTS))
    order = keys.topk(levels, dim=1).indices
    # Logit-normal pushed by a shift of 3, as flow models of this family are trained; 12 % pure noise.
    spread = torch.sigmoid(torch.randn(count, levels, generator=generator) + math.log(3.0))
    spread = torch.where(torch.rand(count, levels, generator=generator) < 0.12, torch.ones(()), spread)
    chosen = torch.rand(count, levels, generator=generator) < OWN_SHARE
    return torch.where(chosen, own[order], spread).flatten()


def velocity_loss(
    nano: Nano, predict: Velocity, items: list[Item], levels: int, length: int, generator: torch.Generator
) -> Tensor:
    """Return the weighted squared error of the velocity, [b · levels]."""
    device = nano.device
    target = torch.stack([item.target for item in items]).repeat_interleave(levels, 0)
    weights = torch.stack([item.weights for item in items]).repeat_interleave(levels, 0)
    references = torch.stack([item.references for item in items])
    if references.shape[1]:
        # What nano painted itself is a little off; references that are too make it sharpen them, not copy the fault.
        blur = 0.15 * torch.rand(references.shape[0], 1, 1, 1, generator=generator)
        references = references + (blur * torch.randn(references.shape, generator=generator)).to(device)
    sigma = draw_levels(len(items), levels, generator).to(device)
    noise = torch.randn(target.shape, generator=generator).to(device)
    noisy = (1 - sigma)[:, None, None] * target + sigma[:, None, None] * noise
    prompts = nano.tokenize([item.prompt for item in items], length)
    velocity = predict(noisy, sigma, prompts, references if references.shape[1] else None)
    return ((velocity - (noise - target)).pow(2).mean(-1) * weights).mean(-1)


def _learned(nano: Nano) -> torch.nn.ModuleList:
    return torch.nn.ModuleList([nano.transformer, nano.text_encoder])


class Optimiser:
    """Muon for the blocks' matrices, AdamW for everything else.

    Both at one learning rate.
    """

    def __init__(self, learned: torch.nn.Module) -> None:
        matrices, others = [], []
        for name, parameter in learned.named_parameters():
            inside = parameter.ndim == 2 and ("blocks." in name or "layers." in name)
            (matrices if inside else others).append(parameter)
        self.parameters = [*matrices, *others]
        self.parts = (
            torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, betas=BETAS, weight_decay=0.0),
        )

    def learn(self, loss: Tensor, rate: float) -> None:
        """One step down the gradient."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


@dataclass(frozen=True)
class Lessons:
    """The training loop of one process.

    start: when the stage began, by the monotonic clock.

    compiled: in bf16, by a function that takes minutes to compile (`compiled_training`).
    """

    stage: TrainingStage
    minutes: float
    batch: int
    levels: int
    start: float
    compiled: bool = False

    def done(self) -> float:
        """Return the elapsed share of the time, 0 … 1.

        0 while it has no end.
        """
        return (time.monotonic() - self.start) / (60 * self.minutes) if self.minutes else 0.0


class Learner:
    """One process's examples, noise and optimizer, for weights that may be shared."""

    def __init__(self, nano: Nano, optimiser: Optimiser, lessons: Lessons) -> None:
        seed = time.time_ns() % 2**31
        self.nano, self.optimiser, self.lessons = nano, optimiser, lessons
        self.predict = compiled_training.compiled(nano) if lessons.compiled else compiled_training.plain(nano)
        self.data = DataLoader(nano, seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.steps = 0

    def step(self) -> tuple[str, int, float]:
        """Learn from one batch.

        Returns its task, how many samples it had and their mean loss.
        """
        stage, draw = self.lessons.stage, self.data.sampler.random
        self.steps += 1
        rise = min(1.0, self.steps / WARM_UP)
        fall = min(1.0, (1.0 - min(self.lessons.done(), 1.0)) / stage.cooling) if stage.cooling else 1.0
        rate = stage.rate * rise * fall
        (task, images), *_ = draw.choices(tuple(stage.shares), tuple(stage.shares.values()))
        length = TEXT_LENGTH if draw.random() < stage.long_text else SHORT_TEXT
        items = self.data.take(task, images, self.lessons.batch)
        loss = velocity_loss(self.nano, self.predict, items, self.lessons.levels, length, self.generator)
        self.optimiser.learn(loss.mean(), rate)
        return f"{task}{images or ''}", loss.numel(), loss.detach().mean().item()


def _help(folder: Path, shared: list[Tensor], samples: Tensor, lessons: Lessons, parent: int) -> None:
    """Train the shared weights until the first process ends this one."""
    torch.set_num_threads(1)
    nano = Nano(folder)
    nano.autoencoder.requires_grad_(False)
    for parameter, weight in zip(_learned(nano).parameters(), shared, strict=True):
        parameter.data = weight
    learner = Learner(nano, Optimiser(_learned(nano)), lessons)
    while os.getppid() == parent:
        samples += learner.step()[1]


@contextmanager
def helpers(run: "Run", lessons: Lessons, count: int) -> Iterator[list[Tensor]]:
    """Start worker processes.

    Yields the number of samples each has used so far.
    """
    shared = [parameter.data.share_memory_() for parameter in _learned(run.nano).parameters()] if count else []
    samples = [torch.zeros(1, dtype=torch.long).share_memory_() for _ in range(count)]
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_help, args=(run.folder / "weights", shared, counter, lessons, os.getpid()), daemon=True)
        for counter in samples
    ]
    for process in processes:
        process.start()
    try:
        yield samples
    finally:
        for process in processes:
            process.terminate()
            process.join()


class Run:
    """A training folder: weights, their average, optimizer state and progress."""

    def __init__(self, folder: Path, start: Path, device: str) -> None:
        self.folder = folder
        weights = folder / "weights"
        if not weights.exists():
            shutil.copytree(start, weights)
        self.nano = Nano(weights).to(device)
        self.nano.autoencoder.requires_grad_(False)
        self.average = copy.deepcopy(_learned(self.nano))
        self.optimiser = Optimiser(_learned(self.nano))
        self.step = 0
        self.samples = 0
        self.seconds = 0.0
        if (folder / "state.pt").exists():
            self._resume()

    def _resume(self) -> None:
        state = torch.load(self.folder / "state.pt", map_location=self.nano.device)
        _learned(self.nano).load_state_dict(state["learned"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.samples, self.seconds = state["step"], state["samples"], state["seconds"]

    def save(self) -> None:
        """Write a checkpoint, and the average as a diffusers folder.

        Each file is replaced in one step, so none is ever partial.
        """
        state = {
            "learned": _learned(self.nano).state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "samples": self.samples,
            "seconds": self.seconds,
        }
        torch.save(state, self.folder / "state.pt.new")
        os.replace(self.folder / "state.pt.new", self.folder / "state.pt")
        export(self, self.folder / "weights")

    def follow(self) -> None:
        """Move the average towards the newest weights.

        Faster at the start of training.
        """
        keep = min(EMA, (self.step + 1) / (self.step + 50))
        with torch.no_grad():
            for mean, new in zip(self.average.parameters(), _learned(self.nano).parameters(), strict=True):
                mean.lerp_(new, 1 - keep)


def export(run: Run, folder: Path) -> None:
    """Write the averaged weights, in 16 bit, into a folder with configs."""
    transformer, text_encoder = run.average
    # The average is of modules of these two types.
    save_transformer(transformer, folder)  # type: ignore[arg-type]
    save_text_encoder(text_encoder, folder)  # type: ignore[arg-type]
    save_autoencoder(run.nano.autoencoder, folder)


def train(run: Run, lessons: Lessons, save_minutes: float, workers: int = 1) -> None:
    """Train until the minutes are over.

    minutes: 0 means until it is stopped.
    """
    learner = Learner(run.nano, run.optimiser, lessons)
    last_save = last_report = lessons.start
    reported = run.samples
    losses: dict[str, list[float]] = {}
    with helpers(run, lessons, workers - 1) as helped:
        counted = 0
        while lessons.done() < 1.0:
            task, samples, loss = learner.step()
            run.step += 1
            total = sum(int(counter) for counter in helped)
            run.samples += samples + total - counted
            counted = total
            run.follow()
            losses.setdefault(task, []).append(loss)
            now = time.monotonic()
            # The first minute tells whether the machine is worth its time; after that, now and then.
            if now - last_report > (20 if now - lessons.start < 60 else 120):
                reported, last_report, losses = _report(run, reported, last_report, losses)
            if now - last_save > 60 * save_minutes:
                run.seconds += now - last_save
                last_save = now
                run.save()
    run.seconds += time.monotonic() - last_save
    run.save()


def _report(run: Run, reported: int, since: float, losses: dict[str, list[float]]) -> tuple[int, float, dict]:
    now = time.monotonic()
    line = {
        "step": run.step,
        "samples": run.samples,
        "per_second": round((run.samples - reported) / (now - since), 1),
        "minutes": round(run.seconds / 60, 1),
        **{name: round(sum(values) / len(values), 4) for name, values in losses.items()},
    }
    print(json.dumps(line), flush=True)
    with (run.folder / "log.jsonl").open("a") as log:
        log.write(json.dumps(line) + "\n")
    return run.samples, now, {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("encoder", "decoder", *STAGES, "export"))
    parser.add_argument("run", type=Path)
    parser.add_argument("to", type=Path, nargs="?", help="export: the folder to fill")
    parser.add_argument("--start", type=Path, default=WEIGHTS, help="weights a new run begins with")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=0.0, help="0: until stopped")
    parser.add_argument("--batch", type=int, help="examples a step (CPU 16, CUDA 384)")
    parser.add_argument("--levels", type=int, default=2, help="noise levels an example")
    parser.add_argument("--rate", type=float, help="learning rate, instead of the stage's")
    parser.add_argument("--workers", type=int, default=1, help="processes that learn (CPU only)")
    parser.add_argument("--save-minutes", type=float, default=2.0)
    args = parser.parse_args()
    on_gpu = args.device.startswith("cuda")
    if not on_gpu:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    args.run.mkdir(parents=True, exist_ok=True)
    run = Run(args.run, args.start, args.device)
    if args.stage == "export":
        shutil.copytree(args.run / "weights", args.to, dirs_exist_ok=True)
    elif args.stage == "encoder":
        fit(run.nano.autoencoder, args.device)
        run.save()
    elif args.stage == "decoder":
        weights = args.run / "weights"
        train_decoder(
            run.nano.autoencoder, args.minutes, args.device, lambda average: save_autoencoder(average, weights)
        )
        run.save()
    else:
        stage = STAGES[args.stage]
        stage = replace(stage, rate=args.rate or stage.rate)
        batch, compiled = args.batch or (384 if on_gpu else 16), compiled_training.pays(run.nano.device)
        lessons = Lessons(stage, args.minutes, batch, args.levels, time.monotonic(), compiled)
        train(run, lessons, args.save_minutes, 1 if on_gpu else args.workers)


if __name__ == "__main__":
    main()
