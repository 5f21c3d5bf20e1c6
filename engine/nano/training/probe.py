"""Tries compiled training in a process of its own.

`python -m engine.nano.training.probe FOLDER FILE` writes FILE once loss and gradients of compiled pieces equal those of
the plain ones and a step is faster. A kernel that fails ends only this process, and what it compiled stays on disk for
the training beside it.
"""

import os
import sys
import time
from pathlib import Path

import torch

from engine.nano.training.data_loader import Batch, BatchKind, draw_batch
from engine.nano.training.folder import load_extras
from engine.nano.training.frames import canvases
from engine.nano.training.model import Nano, Tokenize
from engine.nano.training.prompts import PromptSampler
from engine.nano.training.train import Trainer

EXAMPLES = 64
"""In a batch. Chosen, not measured."""
TOLERANCE = 0.15
"""Relative difference of all gradients together. With two examples on a CPU the plain pieces were 5.4 % off fp32, the
compiled ones 4.5 %, and either 5.0 % off the other: all of it is bf16's."""


def _gradient(trainer: Trainer, batch: Batch, compiled: bool) -> torch.Tensor:
    trainer.velocity.compiled = compiled
    trainer.generator.manual_seed(1)
    torch.manual_seed(1)
    for parameter in trainer.learned.parameters():
        parameter.grad = None
    trainer.loss(batch).backward()
    return torch.cat([p.grad.flatten() for p in trainer.learned.parameters() if p.grad is not None])


def _seconds(trainer: Trainer, batch: Batch, compiled: bool) -> float:
    _gradient(trainer, batch, compiled)
    torch.cuda.synchronize()
    start = time.monotonic()
    for _ in range(4):
        _gradient(trainer, batch, compiled)
    torch.cuda.synchronize()
    return (time.monotonic() - start) / 4


def probe(folder: Path, file: Path) -> str:
    """Return why compiling cannot be used, or "" with the file written."""
    own = load_extras(folder)
    square, shapes = canvases(own["native_size"])
    trainer = Trainer(Nano(folder).to("cuda"), True, 0.0, Path("/tmp"), (square, *shapes))
    tokenize = Tokenize(folder)
    for frame, task, references in ((square, "generate", 0), (shapes[0], "edit", 1), (square, "compose", 2)):
        kind = BatchKind(frame, task, references, own["text_length"], EXAMPLES)
        raw = draw_batch({frame: PromptSampler(1, frame)}, kind, tokenize)
        batch = trainer.encoder(raw)
        compiled, plain = (_gradient(trainer, batch, way) for way in (True, False))
        off = ((compiled - plain).norm() / plain.norm()).item()
        if not off < TOLERANCE:
            return f"gradients of {task} are off by {off:.3f}"
    fast, slow = (_seconds(trainer, batch, way) for way in (True, False))
    if fast > 0.9 * slow:
        return f"a step takes {fast:.3f} s, plain {slow:.3f} s"
    part = file.with_suffix(".part")
    part.write_text(f"{fast:.3f} s a step, plain {slow:.3f} s; gradients within {off:.3f}")
    os.replace(part, file)
    return ""


if __name__ == "__main__":
    print("probe:", probe(Path(sys.argv[1]), Path(sys.argv[2])) or "compiled", flush=True)
