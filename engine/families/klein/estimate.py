"""Estimates of the time an image takes, by measured speed.

The work is counted from shapes. The speed is that of a trial product, and of earlier images' stages once there are any.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from engine.families.klein.text_encoder import TextEncoder
from engine.families.klein.transformer import SingleBlock, Transformer, TransformerShape
from engine.families.klein.variants import Variant
from engine.memory.device import Device
from engine.nn.autoencoder import Autoencoder

TRIAL = 0.05
"""Seconds that a trial product should take: long enough for a clock, short beside loading."""

_FIRST_ROWS = 16
_MIN_MEASURED = 0.05
"""Seconds of a stage from which its own speed counts more than the trial's."""

Work = dict[str, float]
"""Floating-point operations by stage."""


def trial_speed(transformer: Transformer, device: Device, most_rows: int) -> float:
    """Return the operations a second of one product with a large layer.

    most_rows: tokens of an image. It begins with a few, because a slow machine needs seconds for all of them.
    """
    block = transformer.single_blocks[-1]
    assert isinstance(block, SingleBlock)
    layer, columns, rows = block.linear2, transformer.shape.hidden + transformer.shape.mlp, _FIRST_ROWS
    outputs = transformer.shape.hidden
    while True:
        x = torch.ones(1, rows, columns, device=device.device, dtype=device.dtype)
        seconds = min(_seconds(layer, x, device) for _ in range(2))
        if seconds >= TRIAL or 2 * rows > most_rows:
            return 2.0 * rows * columns * outputs / max(seconds, 1e-6)
        rows *= 2


def _seconds(layer: nn.Module, x: torch.Tensor, device: Device) -> float:
    device.sync()
    start = time.perf_counter()
    layer(x)
    device.sync()
    return time.perf_counter() - start


class Estimator:
    """Estimates the seconds of one model's images on this machine."""

    def __init__(
        self,
        variant: Variant,
        shape: TransformerShape,
        autoencoder: Autoencoder,
        encoder: TextEncoder,
        trial: float = 0.0,
    ) -> None:
        """trial: operations a second of a trial product, 0 without one."""
        self._variant, self._shape = variant, shape
        # Counted once: walking through the modules takes milliseconds, which every image would wait for.
        self._down, self._down_rest = _by_level(autoencoder.encoder, autoencoder.encoder.down)
        self._up, self._up_rest = _by_level(autoencoder.decoder, autoencoder.decoder.up)
        self._upsamplers = tuple(_convolutions(_upsampler(level)) for level in autoencoder.decoder.up)
        self._prompt = 2.0 * variant.text_length * _matrices(encoder)
        self.trial = trial
        self._speeds: dict[str, float] = {}

    def image(
        self, canvas: int, references: tuple[int, ...], steps: int, *, guided: bool = False, changed: bool = False
    ) -> "ImageEstimate":
        """Estimate an image.

        canvas, references: their tokens. guided: each step runs twice. changed: a reference is decoded as well.
        """
        passes = 2 if guided else 1
        work = {
            "prompt": passes * self._prompt,
            "references": sum(map(self._encode, references)) + self._prefill(sum(references)),
            "denoise": passes * steps * self._step(canvas, sum(references)),
            "decode": (2 if changed else 1) * self._decode(canvas),
        }
        return ImageEstimate(work, dict(self._speeds), self.trial)

    def learn(self, estimate: "ImageEstimate", ms: Mapping[str, float]) -> None:
        """Take the speeds of a finished image's stages.

        Stages that the cache spared are left out.
        """
        for stage, work in estimate.work.items():
            if ms.get(stage, 0.0) > 0 and stage not in estimate.spared:
                self._speeds[stage] = work / (ms[stage] / 1000)

    def _step(self, canvas: int, references: int) -> float:
        """Count one velocity."""
        shape, blocks = self._shape, self._shape.double_blocks + self._shape.single_blocks
        keys = self._variant.text_length + canvas + references
        tokens = keys - (references if self._variant.kv else 0)
        return blocks * (2.0 * tokens * _block_weights(shape) + 4.0 * tokens * keys * shape.hidden)

    def _prefill(self, tokens: int) -> float:
        shape, blocks = self._shape, self._shape.double_blocks + self._shape.single_blocks
        if not self._variant.kv:
            return 0.0
        return blocks * (2.0 * tokens * _block_weights(shape) + 4.0 * tokens**2 * shape.hidden)

    def _decode(self, tokens: int) -> float:
        pixels = self._variant.pixels_per_token**2 * tokens
        # An upsampler's convolution runs on the level above.
        levels = zip(self._up, self._upsamplers, strict=True)
        work = sum((level + 3 * sampler) * pixels / 4**i for i, (level, sampler) in enumerate(levels))
        return 2.0 * (work + self._up_rest * pixels / 4 ** (len(self._up) - 1))

    def _encode(self, tokens: int) -> float:
        pixels = self._variant.pixels_per_token**2 * tokens
        levels = sum(level * pixels / 4**i for i, level in enumerate(self._down))
        return 2.0 * (levels + self._down_rest * pixels / 4 ** (len(self._down) - 1))


def _block_weights(shape: TransformerShape) -> int:
    """Return the weights that a token meets in a block."""
    return 4 * shape.hidden**2 + 3 * shape.hidden * shape.mlp


def _matrices(encoder: TextEncoder) -> float:
    shape = encoder.shape
    attention = 2 * shape.hidden * (shape.heads + shape.kv_heads) * shape.head_dim
    return len(encoder.model.layers) * (attention + 3 * shape.hidden * shape.mlp)


def _upsampler(level: nn.Module) -> nn.Module:
    return level["upsample"] if isinstance(level, nn.ModuleDict) and "upsample" in level else nn.Identity()


def _by_level(network: nn.Module, levels: nn.ModuleList) -> tuple[tuple[int, ...], int]:
    """Return the convolutions' weights in each level, and those outside."""
    counts = tuple(map(_convolutions, levels))
    return counts, _convolutions(network) - sum(counts)


def _convolutions(module: nn.Module) -> int:
    return sum(conv.weight.numel() for conv in module.modules() if isinstance(conv, nn.Conv2d))


@dataclass(slots=True)
class ImageEstimate:
    """Work of one image and the seconds left of it.

    speeds: of the stages of earlier images. trial: speed where there is none. spared: stages that the cache held.
    """

    work: Work
    speeds: dict[str, float]
    trial: float
    spared: set[str] = field(default_factory=set)

    def left(self, stage: str, share: float, ms: Mapping[str, float]) -> float | None:
        """Return the seconds left when `share` of a stage is done.

        ms: milliseconds spent in each stage so far. None where no speed is known.
        """
        order = list(self.work)
        before, after = order[: order.index(stage)], order[order.index(stage) + 1 :]
        done = {each: self.work[each] for each in before if each not in self.spared} | {stage: share * self.work[stage]}
        spent = sum(ms.get(each, 0.0) for each in done) / 1000
        # What this image has shown so far beats the trial: on a slow machine the trial is the less exact.
        shown = sum(done.values()) / spent if spent > _MIN_MEASURED and sum(done.values()) else self.trial
        if not shown and not self.speeds:
            return None
        own = share * self.work[stage] / (ms.get(stage, 0.0) / 1000) if ms.get(stage, 0.0) > 1000 * _MIN_MEASURED else 0
        left = [(stage, (1 - share) * self.work[stage], own)] + [(each, self.work[each], 0.0) for each in after]
        total = 0.0
        for name, work, speed in left:
            speed = speed or self.speeds.get(name, 0.0) or shown or max(self.speeds.values())
            total += work / speed
        return round(total, 2)
