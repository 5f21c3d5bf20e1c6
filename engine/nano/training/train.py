"""Trains nano for a given time, on CUDA or a CPU.

`python -m engine.nano.training.train FOLDER OUT --seconds 380`

FOLDER is a nano in diffusers format to start from (`grow` makes a larger one of the committed weights). OUT gets the
averaged weights as shards every two minutes and at the end (`shards` puts them into a folder), the decoder, and logs.
The curriculum and the learning rate follow the time: at its end the rate is 0. The decoder learns in a process of its
own from the start (`--decoder-seconds`), while this one compiles.

Without a GPU the same command runs for hours (`nice -n 19`, `--workers 1`); `--state FILE` makes it go on where it was
stopped: the time that is over counts.
"""

import argparse
import copy
import json
import os
import queue
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from engine.diffusion.tokens import unpack
from engine.nano.training.compiled_training import TrainingVelocity, leave_out_backends, multiplies_bf16, quiet
from engine.nano.training.curriculum import LEVELS, Curriculum, draw_levels
from engine.nano.training.data_loader import Batch, BatchEncoder, BatchKind, DataLoader, RawBatch, to_device
from engine.nano.training.folder import load_extras
from engine.nano.training.frames import Frame
from engine.nano.training.hold import PULL, Teacher, loaders
from engine.nano.training.model import Nano, Tokenize
from engine.nano.training.optimizer import Optimizer
from engine.nano.training.shards import DECODER, learned_parts, save_shards
from engine.nano.training.train_decoder import is_finished, take_decoder

EMA = 0.995
WARM_UP = 60
"""Steps over which the learning rate rises."""
COOLING = 0.6
"""Share of the time, at its end, in which the learning rate falls to nothing."""
REFERENCE_NOISE = 0.15
"""At most this much on references: what nano painted itself is a little off, and should be sharpened, not copied."""
CHECK_EVERY = 25
"""Steps between two looks at whether everything is finite; until then nothing waits for the device."""


class Trainer:
    """The model, its average, and one step at a time."""

    def __init__(
        self, nano: Nano, compiled: bool, rate: float, out: Path, frames: tuple[Frame, ...] = Curriculum(1).frames
    ) -> None:
        self.nano, self.rate, self.out = nano, rate, out
        nano.autoencoder.requires_grad_(False)
        self.learned = learned_parts(nano)
        self.average = copy.deepcopy(self.learned).requires_grad_(False)
        self.optimizer = Optimizer(self.learned)
        self.velocity = TrainingVelocity(nano, compiled)
        self.encoder = BatchEncoder(nano.autoencoder, frames, compiled and nano.device.type == "cuda")
        self.generator = torch.Generator().manual_seed(time.time_ns() % 2**31)
        self.device = nano.device
        self.decoder_ready = False
        self.teacher: Teacher | None = None
        self.steps = self.samples = 0
        self._good: list[Tensor] = []
        self.keep_good()

    def loss(self, batch: Batch, held: bool = False) -> Tensor:
        """Return the mean weighted squared error of the velocity.

        held: what is learned is mostly what the teacher would do.
        """
        target = batch.target.repeat_interleave(LEVELS, 0)
        weights = batch.weights.repeat_interleave(LEVELS, 0)
        sigma = to_device(draw_levels(len(batch.target), target.shape[1], self.generator), self.device)
        noise = torch.randn(target.shape, device=self.device)
        noisy = (1 - sigma)[:, None, None] * target + sigma[:, None, None] * noise
        with torch.autocast(self.device.type, torch.bfloat16, enabled=multiplies_bf16(self.device)):
            states = self.nano.read(batch.ids, batch.mask)
        references = self.worn(batch) if batch.kind.references else None
        grid, wanted = batch.kind.frame.tokens, noise - target
        if held and self.teacher:
            wanted = self.teacher.blended(wanted, batch, noisy, sigma, references)
        velocity = self.velocity(noisy, sigma, states, grid, references)
        return ((velocity - wanted).pow(2).mean(-1) * weights).mean()

    def set_compiled(self, compiled: bool) -> None:
        """Run the compiled pieces from now on, or no more."""
        self.velocity.compiled = compiled
        if self.teacher:
            self.teacher.velocity.compiled = compiled

    @torch.no_grad()
    def worn(self, batch: Batch) -> Tensor:
        """Return references as nano itself would make them.

        They are noisy, and half of them decoded and encoded again.
        """
        references = batch.references
        much = REFERENCE_NOISE * torch.rand(len(references), 1, 1, 1, device=self.device)
        references = references + much * torch.randn(references.shape, device=self.device)
        if not self.decoder_ready or float(torch.rand((), generator=self.generator)) < 0.5:
            return references
        flat = references.flatten(0, 1)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=multiplies_bf16(self.device)):
            down = batch.kind.frame.tokens[1]
            parts = [self.nano.autoencoder.decode(unpack(part, down)) for part in flat.split(128)]
        images = (torch.cat(parts).float().clamp(-1, 1) * 127.5).round() / 127.5
        return self.encoder.latents(images).unflatten(0, references.shape[:2])

    def step(self, batch: Batch, done: float, held: Batch | None = None) -> Tensor:
        """Learn from one batch and return its loss, still on the device.

        held: a batch of known skills, learned beside it.
        """
        loss = self.loss(batch)
        loss.backward()
        if held is not None:
            (PULL * self.loss(held, held=True)).backward()
            self.samples += LEVELS * len(held.target)
        rise = min(1.0, (self.steps + 1) / WARM_UP)
        fall = min(1.0, max(0.0, 1.0 - done) / COOLING)
        self.optimizer.step(self.rate * rise * fall)
        self.steps += 1
        self.samples += LEVELS * len(batch.target)
        keep = min(EMA, (self.steps + 1) / (self.steps + 20))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.learned.parameters()), 1 - keep)
        return loss.detach()

    def _all(self) -> list[Tensor]:
        return [*self.learned.parameters(), *self.average.parameters(), *self.optimizer._momentum]

    @torch.no_grad()
    def keep_good(self) -> None:
        """Remember the weights as they are."""
        self._good = [tensor.detach().clone() for tensor in self._all()]

    @torch.no_grad()
    def restore_good(self) -> None:
        """Go back to the remembered weights.

        AdamW's averages start anew.
        """
        for tensor, good in zip(self._all(), self._good, strict=True):
            tensor.copy_(good)
        self.optimizer._adam.state.clear()
        for parameter in self.learned.parameters():
            parameter.grad = None

    def load_decoder(self, path: Path) -> None:
        decoder = load_file(path)
        self.nano.autoencoder.decoder.load_state_dict({name: tensor.float() for name, tensor in decoder.items()})
        self.decoder_ready = True

    def state(self) -> dict:
        return {
            "learned": self.learned.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "samples": self.samples,
        }

    def load_state(self, state: dict) -> None:
        self.learned.load_state_dict(state["learned"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps, self.samples = state["steps"], state["samples"]


class Log:
    """Reports mean losses by kind of batch, and throughput, as JSON lines."""

    def __init__(self, out: Path, clock: "Clock") -> None:
        self.path, self.clock = out / "train.jsonl", clock
        self.losses: dict[str, list[Tensor]] = {}
        self.since, self.samples = time.monotonic(), 0

    def add(self, kind: BatchKind, loss: Tensor) -> None:
        self.losses.setdefault(kind.name, []).append(loss)

    def finite(self) -> bool:
        """Return whether every loss since the last report is finite.

        Waits for the device.
        """
        losses = [loss for group in self.losses.values() for loss in group]
        return bool(torch.stack(losses).isfinite().all()) if losses else True

    def write(self, **facts: object) -> None:
        line = json.dumps({"t": round(self.clock.elapsed(), 1), **facts})
        print(line, flush=True)
        with self.path.open("a") as log:
            log.write(line + "\n")

    def report(self, trainer: Trainer, waiting: int) -> None:
        now = time.monotonic()
        speed = (trainer.samples - self.samples) / (now - self.since)
        means = {name: round(torch.stack(group).mean().item(), 4) for name, group in sorted(self.losses.items())}
        memory = round(torch.cuda.max_memory_allocated() / 1e9, 1) if trainer.device.type == "cuda" else 0
        self.write(
            done=round(self.clock.done(), 3), steps=trainer.steps, samples=trainer.samples, per_second=round(speed),
            queued=waiting, gigabytes=memory, losses=means,
        )  # fmt: skip
        self.losses, self.since, self.samples = {}, now, trainer.samples


class Clock:
    """The elapsed share of a training's time.

    before: seconds of an earlier part of the same training.
    """

    def __init__(self, seconds: float, start: float, before: float = 0.0) -> None:
        self.seconds, self.start, self.before = seconds, start, before

    def elapsed(self) -> float:
        return self.before + time.monotonic() - self.start

    def done(self) -> float:
        return self.elapsed() / self.seconds


@dataclass(frozen=True)
class Options:
    """Options of `train`.

    report, save, keep: seconds between reports, shards and states to resume from.
    """

    report: float = 20.0
    save: float = 110.0
    keep: float = 40.0
    probed: Path | None = None
    """A file that `probe` writes once compiled pieces have proven right and faster."""
    first: float = 0.0
    """Where in the curriculum to begin, 0 … 1."""
    reserve: float = 6.0
    """Seconds at the end to save in."""
    state: Path | None = None
    failures: int = 6
    """Steps that may fail before training ends with what it has."""


def train(trainer: Trainer, loader: DataLoader, clock: Clock, options: Options, held: DataLoader | None = None) -> None:
    """Train until the time is over, then save, even after an error.

    held: draws the batches of known skills of a trainer with a teacher.
    """
    log = Log(trainer.out, clock)
    schedule = _schedule(clock, options)
    reported = saved = kept = time.monotonic()
    failures, compiled_once = 0, False
    try:
        while schedule.done() < 1.0 and failures < options.failures:
            done = options.first + (1 - options.first) * schedule.done()
            try:
                _one_step(trainer, loader, log, done, held)
            except Exception as error:
                failures += 1
                if _device_is_gone(error):
                    raise
                log.write(failure=f"{type(error).__name__}: {error}"[:600])
                traceback.print_exc()
                _recover(trainer, error)
                continue
            now = time.monotonic()
            if trainer.steps == 1:
                # Compiling is over: the curriculum has what is left.
                schedule = _schedule(clock, options)
                log.write(first_step=True)
            if now - reported > (options.report if clock.elapsed() > 60 else options.report / 2):
                log.report(trainer, loader.waiting())
                reported = now
                _look_for_decoder(trainer, log)
                if options.probed and options.probed.exists() and not compiled_once:
                    compiled_once = True
                    trainer.set_compiled(True)
                    log.write(compiled=options.probed.read_text())
            if options.state and now - kept > options.keep and trainer.steps % CHECK_EVERY == 0:
                _save_state(trainer, clock, options.state)
                kept = now
            if now - saved > options.save:
                save_shards(trainer.average, trainer.out)
                saved = now
    finally:
        for each in filter(None, (loader, held)):
            each.close()
        _finish(trainer, log, clock, options)


def _schedule(clock: Clock, options: Options) -> Clock:
    """Return a clock for the curriculum: from now to where saving begins."""
    if clock.before:
        return Clock(clock.seconds - options.reserve, clock.start, clock.before)
    now = time.monotonic()
    # A first step that took all the time leaves none: the training ends, whatever the clock says.
    return Clock(max(1e-3, clock.seconds - options.reserve - (now - clock.start)), now)


def _one_step(trainer: Trainer, loader: DataLoader, log: Log, done: float, held: DataLoader | None) -> None:
    raw = _next(loader, done, log)
    known = trainer.encoder(_next(held, done, log)) if held else None
    loss = trainer.step(trainer.encoder(raw), done, known)
    log.add(raw.kind, loss)
    if trainer.steps % CHECK_EVERY == 0:
        if log.finite():
            trainer.keep_good()
        else:
            trainer.restore_good()
            trainer.rate *= 0.5
            trainer.set_compiled(False)
            log.losses.clear()
            log.write(not_finite=True, rate=trainer.rate)


def _next(loader: DataLoader, done: float, log: Log) -> RawBatch:
    """Return a batch, drawn in this process once workers fail."""
    try:
        return loader.next(done)
    except (queue.Empty, OSError) as error:
        log.write(workers_stopped=repr(error))
        loader.stop_workers()
        return loader.next(done)


def _device_is_gone(error: Exception) -> bool:
    """Return whether only a new process can go on."""
    return "CUDA error" in str(error) and not isinstance(error, torch.cuda.OutOfMemoryError)


def _save_state(trainer: Trainer, clock: Clock, path: Path) -> None:
    torch.save({**trainer.state(), "seconds": clock.elapsed()}, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def _recover(trainer: Trainer, error: Exception) -> None:
    """Go on from the last good weights, without the compiler."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        torch.cuda.empty_cache()
    else:
        trainer.set_compiled(False)
        for compositor in trainer.encoder.compositors.values():
            compositor.compiled = False
    trainer.restore_good()


def _look_for_decoder(trainer: Trainer, log: Log) -> None:
    """Use the decoder that learned beside this training."""
    if not trainer.decoder_ready and is_finished(trainer.out):
        trainer.load_decoder(trainer.out / DECODER)
        log.write(decoder="in use for references")


def _finish(trainer: Trainer, log: Log, clock: Clock, options: Options) -> None:
    if not all(bool(p.isfinite().all()) for p in trainer.average.parameters()):
        trainer.restore_good()
    log.report(trainer, 0)
    save_shards(trainer.average, trainer.out)
    if options.state:
        _save_state(trainer, clock, options.state)
    log.write(saved=True)


def start_decoder(args: argparse.Namespace) -> subprocess.Popen | None:
    """Start the decoder's training in a process of its own."""
    if not args.decoder_seconds:
        return None
    command = [sys.executable, "-m", "engine.nano.training.train_decoder", str(args.folder), str(args.out)]
    command += ["--seconds", str(args.decoder_seconds), "--device", args.device]
    if args.decoder_batch:
        command += ["--batch", str(args.decoder_batch)]
    return subprocess.Popen(command)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a nano in diffusers format to start from")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, help="of the whole training, saving included")
    parser.add_argument("--deadline", type=float, help="instead of --seconds: when to be done, in Unix time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--examples", type=int, help="in a batch, two noise levels each (CPU 8, CUDA 384)")
    parser.add_argument("--rate", type=float, default=3e-3, help="Muon's highest learning rate")
    parser.add_argument("--first", type=float, default=0.0, help="where in the curriculum to begin (0 … 1)")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 3))
    parser.add_argument("--decoder-seconds", type=float, default=0.0, help="0: leave the decoder as it is")
    parser.add_argument("--decoder-batch", type=int)
    parser.add_argument("--compile", action="store_true", help="compile the pieces of the transformer (CPU)")
    parser.add_argument("--probed", type=Path, help="compile once `probe` has written this file")
    parser.add_argument("--attention", type=int, default=0, help="of CUDA's: 0 flash first, 1 efficient, 2 plain")
    parser.add_argument("--state", type=Path, help="where to keep what a later run goes on from")
    parser.add_argument("--hold", type=Path, help="the nano, with old words, whose skills FOLDER shall not forget")
    return parser.parse_args()


def _prepare_process(args: argparse.Namespace) -> None:
    """Set what holds for the whole process."""
    quiet()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not args.device.startswith("cuda"):
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    leave_out_backends(args.attention)


def _loaders(args: argparse.Namespace, curriculum: Curriculum, nouns: int) -> tuple[DataLoader, DataLoader | None]:
    """Return the loaders of new batches and, with `--hold`, known ones."""
    seed, tokenize = time.time_ns() % 2**31, Tokenize(args.folder)
    if args.hold:
        return loaders(args.hold, curriculum, tokenize, args.workers, seed, nouns)
    return DataLoader(curriculum, tokenize, curriculum.frames, args.workers, seed, nouns), None


def _trainer(args: argparse.Namespace, curriculum: Curriculum, nouns: int) -> tuple[Trainer, float]:
    """Return the trainer, and the seconds it was trained for before."""
    nano = Nano(args.folder).to(args.device)
    trainer = Trainer(nano, args.compile, args.rate, args.out, curriculum.frames)
    if args.hold:
        trainer.teacher = Teacher(Nano(args.folder).to(args.device), args.compile)
    before = 0.0
    if args.state and args.state.exists():
        state = torch.load(args.state, map_location=args.device)
        trainer.load_state(state)
        before = state["seconds"]
    if not args.decoder_seconds:
        trainer.decoder_ready = take_decoder(nano, args.out, nouns)
    return trainer, before


def main() -> None:
    start = time.monotonic()
    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    _prepare_process(args)
    decoder = start_decoder(args)
    own = load_extras(args.folder)
    examples, nouns = args.examples or (384 if args.device.startswith("cuda") else 8), len(own["nouns"])
    curriculum = Curriculum(examples, own["native_size"], own["text_length"])
    loader, held = _loaders(args, curriculum, nouns)  # forked before the device is touched
    trainer, before = _trainer(args, curriculum, nouns)
    seconds = args.seconds if args.deadline is None else before + args.deadline - time.time() + time.monotonic() - start
    options = Options(state=args.state, first=args.first, probed=args.probed)
    train(trainer, loader, Clock(seconds, start, before), options, held)
    if decoder is not None:
        try:
            decoder.wait(timeout=5)
        except subprocess.TimeoutExpired:
            decoder.terminate()


if __name__ == "__main__":
    main()
