"""Training batches: drawn by workers, rendered and encoded on the device."""

import multiprocessing
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from engine.diffusion.tokens import pack, patchify
from engine.nano.training.compositor import Compositor
from engine.nano.training.frames import TOKEN, Frame
from engine.nano.training.model import Tokenize
from engine.nano.training.pca_encoder import as_one_convolution
from engine.nano.training.prompts import Example, PromptSampler, training_prompts
from engine.nano.training.scenes import MAX_THINGS, Scene
from engine.nano.words import NOUNS
from engine.nn.autoencoder import Autoencoder

OBJECT_WEIGHT = 4.0
"""How much more a token counts that shows an object, or that an edit must repaint: backgrounds are learned first and
fill most of an image, outlines last."""
WORKERS_TIMEOUT = 30.0
"""Seconds to wait for a batch of the workers. Chosen, not measured."""
_BOXES = MAX_THINGS + 2
"""Boxes an example can have: its things, and what an edit removed or moved."""


@dataclass(frozen=True)
class BatchKind:
    """Properties that all examples of a batch share.

    task: generate, edit or compose.
    """

    frame: Frame
    task: str
    references: int
    text_length: int
    count: int

    @property
    def name(self) -> str:
        """Return a label for the log: edit1@336x192."""
        width, height = self.frame.pixels
        return f"{self.task}{self.references or ''}@{width}x{height}"


@dataclass
class SceneArrays:
    """Scenes as arrays.

    background: [n]. kind, size: [n, things]. centre: [n, things, 2] in pixels.
    """

    background: np.ndarray
    kind: np.ndarray
    size: np.ndarray
    centre: np.ndarray


@dataclass
class RawBatch:
    """A batch before it is rendered.

    ids, mask: [b, length]. boxes: [b, boxes, 4] in tokens.
    """

    kind: BatchKind
    ids: np.ndarray
    mask: np.ndarray
    scenes: SceneArrays
    boxes: np.ndarray


@dataclass
class Batch:
    """An encoded batch.

    target: [b, tokens, channels]. references: [b, references, tokens, channels]. weights: [b, tokens].
    """

    kind: BatchKind
    ids: Tensor
    mask: Tensor
    target: Tensor
    references: Tensor
    weights: Tensor


def scene_arrays(scenes: Sequence[Scene], frame: Frame) -> SceneArrays:
    """Return scenes as arrays.

    A missing thing has kind -1.
    """
    kind = np.full((len(scenes), MAX_THINGS), -1, np.int64)
    size = np.zeros((len(scenes), MAX_THINGS), np.int64)
    centre = np.zeros((len(scenes), MAX_THINGS, 2), np.int64)
    for i, scene in enumerate(scenes):
        for j, thing in enumerate(scene.things):
            kind[i, j], size[i, j] = thing.kind, thing.size
            x, y = frame.centre(thing.size, thing.slot)
            centre[i, j] = x * frame.scale, y * frame.scale
    return SceneArrays(np.array([scene.background for scene in scenes], np.int64), kind, size, centre)


def to_device(array: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting for its queue."""
    tensor = torch.as_tensor(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def render(compositor: Compositor, scenes: SceneArrays, frame: Frame) -> Tensor:
    """Return images [n, 3, height, width] in [-1, 1]."""
    device = compositor.sprites.device
    things = max(1, int((scenes.kind >= 0).sum(axis=1).max()))
    arrays = (scenes.background, scenes.kind[:, :things], scenes.size[:, :things], scenes.centre[:, :things])
    return compositor(frame, *(to_device(array, device) for array in arrays))


def _token_boxes(example: Example) -> list[list[int]]:
    """Return the boxes that weigh most in the loss, in tokens."""
    frame = example.frame
    boxes = (*(thing.box(frame) for thing in example.target.things), *example.touched)
    rows = [
        [left // TOKEN, top // TOKEN, -(-right // TOKEN), -(-bottom // TOKEN)]
        for left, top, right, bottom in boxes[:_BOXES]
    ]  # fmt: skip
    return rows + [[0, 0, 0, 0]] * (_BOXES - len(rows))


def token_weights(boxes: Tensor, frame: Frame) -> Tensor:
    """Return the tokens' weights in the loss, [b, tokens] with mean 1.

    Tokens inside the boxes [b, boxes, 4] have OBJECT_WEIGHT times as much.
    """
    across, down = frame.tokens
    x = torch.arange(across, device=boxes.device)
    y = torch.arange(down, device=boxes.device)[:, None]
    left, top, right, bottom = boxes[:, :, :, None, None].unbind(2)
    inside = ((x >= left) & (x < right) & (y >= top) & (y < bottom)).any(1).flatten(1)
    weights = 1.0 + (OBJECT_WEIGHT - 1) * inside
    return weights / weights.mean(dim=1, keepdim=True)


Wanted = Callable[[BatchKind, Example], bool]
"""Whether an example belongs into a training."""


def draw_batch(
    samplers: dict[Frame, PromptSampler], kind: BatchKind, tokenize: Tokenize, wanted: Wanted | None = None
) -> RawBatch:
    """Draw a batch of one kind.

    wanted: draws others until it is content.
    """
    sampler = samplers[kind.frame]
    examples: list[Example] = []
    while len(examples) < kind.count:
        example = training_prompts(sampler, kind.task, kind.references or None)
        if tokenize.length(example.prompt) < kind.text_length and (wanted is None or wanted(kind, example)):
            examples.append(example)
    ids, mask = tokenize([example.prompt for example in examples], kind.text_length)
    scenes = [scene for example in examples for scene in (example.target, *example.references)]
    boxes = np.array([_token_boxes(example) for example in examples], np.int64)
    return RawBatch(kind, ids, mask, scene_arrays(scenes, kind.frame), boxes)


Plan = Callable[[float, random.Random], BatchKind]
"""(share of the training that is over, randomness) -> the kind of the next batch."""


def _samplers(seed: int, frames: tuple[Frame, ...], nouns: int) -> dict[Frame, PromptSampler]:
    return {frame: PromptSampler(f"{seed} {frame}", frame, nouns) for frame in frames}


def _work(
    queue, plan: Plan, tokenize: Tokenize, samplers: dict[Frame, PromptSampler], seed: int, done, wanted: Wanted | None
) -> None:
    torch.set_num_threads(1)
    draws = random.Random(seed)
    while True:
        queue.put(draw_batch(samplers, plan(done.value, draws), tokenize, wanted))


class DataLoader:
    """Draws batches in worker processes, or in this one without workers.

    Start it before the device is used: workers are forked. nouns: of the world that examples are drawn from.
    """

    def __init__(
        self, plan: Plan, tokenize: Tokenize, frames: tuple[Frame, ...], workers: int, seed: int,
        nouns: int = len(NOUNS), wanted: Wanted | None = None,
    ) -> None:  # fmt: skip
        self._plan, self._tokenize, self._wanted = plan, tokenize, wanted
        self._draws = random.Random(seed)
        self._samplers = _samplers(seed, frames, nouns)
        context = multiprocessing.get_context("fork")
        self._done = context.Value("d", 0.0)
        self._queue = context.Queue(maxsize=4 * workers) if workers else None
        self._workers = [
            context.Process(
                target=_work,
                args=(self._queue, plan, tokenize, _samplers(of, frames, nouns), of, self._done, wanted),
                daemon=True,
            )
            for of in range(seed + 1, seed + 1 + workers)
        ]
        for worker in self._workers:
            worker.start()

    def next(self, done: float) -> RawBatch:
        """Return a batch.

        done: share of the training that is over. Queued batches may be a few seconds old.
        Raises queue.Empty if the workers draw none in WORKERS_TIMEOUT, OSError if their queue breaks.
        """
        self._done.value = done  # type: ignore[attr-defined] - typed as its lock's wrapper
        if self._queue is not None:
            return self._queue.get(timeout=WORKERS_TIMEOUT)
        return draw_batch(self._samplers, self._plan(done, self._draws), self._tokenize, self._wanted)

    def waiting(self) -> int:
        """Return the number of queued batches.

        0 means that the workers are the bottleneck.
        """
        try:
            return self._queue.qsize() if self._queue is not None else 0
        except NotImplementedError:
            return 0

    def stop_workers(self) -> None:
        """Go on without workers, drawing batches in this process."""
        self.close()
        self._queue, self._workers = None, []

    def close(self) -> None:
        for worker in self._workers:
            worker.terminate()
        deadline = time.monotonic() + 5
        for worker in self._workers:
            worker.join(max(0.0, deadline - time.monotonic()))


class BatchEncoder(nn.Module):
    """Renders and encodes batches on the device of the autoencoder."""

    def __init__(self, autoencoder: Autoencoder, frames: tuple[Frame, ...], compiled: bool = False) -> None:
        super().__init__()
        device = autoencoder.bn.running_mean.device
        self.compositors = {
            scale: Compositor(scale, compiled).to(device) for scale in {frame.scale for frame in frames}
        }
        self.bn = autoencoder.bn
        self.patches = as_one_convolution(autoencoder).requires_grad_(False)

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """Return latents [n, tokens, channels].

        images: [n, 3, h, w] in [-1, 1].
        """
        return pack(self.bn.normalise(patchify(self.patches(images))))

    @torch.no_grad()
    def forward(self, raw: RawBatch) -> Batch:
        kind, device = raw.kind, self.patches.weight.device
        images = render(self.compositors[kind.frame.scale], raw.scenes, kind.frame)
        latents = self.latents(images).unflatten(0, (kind.count, 1 + kind.references))
        boxes = to_device(raw.boxes, device)
        ids, mask = (to_device(array, device) for array in (raw.ids, raw.mask))
        return Batch(kind, ids, mask, latents[:, 0], latents[:, 1:], token_weights(boxes, kind.frame))
