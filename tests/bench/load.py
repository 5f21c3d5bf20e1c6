"""Speed of our weight reader against a plain `readinto`, in one run.

    python -m tests.bench.load [--gigabytes 2] [--rounds 5]

The page cache is warm, the buffers are fresh, and the two alternate. The goal is 0.8 of the plain reading's speed, and
no second copy of the weights at the peak.
"""

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from engine.checkpoints.key_map import identity_map
from engine.checkpoints.loading import load_into
from engine.checkpoints.tensors import Tensors
from engine.memory.device import Device

GOAL = 0.8
WIDTHS = ((9216, 3072), (3072, 3072), (18432, 3072), (3072, 9216), (27648, 3072), (3072, 12288))
"""Rows and columns of the layers of a 4B block. The test file is divided like the real one."""


def write(folder: Path, size: int) -> tuple[Path, list[tuple[int, int]]]:
    """Write a bf16 file of about `size` bytes, layer by layer."""
    shapes: list[tuple[int, int]] = []
    while sum(2 * rows * columns for rows, columns in shapes) < size:
        shapes.append(WIDTHS[len(shapes) % len(WIDTHS)])
    entries, at = {}, 0
    for i, (rows, columns) in enumerate(shapes):
        end = at + 2 * rows * columns
        entries[f"{i}.weight"] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [at, end]}
        at = end
    header = json.dumps(entries).encode()
    file = folder / "weights.safetensors"
    with file.open("wb") as stream:
        # A piece at a time, so that writing does not raise the peak that is measured.
        stream.write(len(header).to_bytes(8, "little") + header)
        for begin in range(0, at, _PIECE):
            stream.write(b"\x80\x3f" * (min(_PIECE, at - begin) // 2))
    return file, shapes


_PIECE = 1 << 20


def plainly(file: Path) -> None:
    """Read the whole file into one new buffer."""
    buffer = torch.empty(file.stat().st_size, dtype=torch.uint8)
    view = memoryview(buffer.numpy())  # type: ignore[arg-type]
    with file.open("rb", buffering=0) as stream:
        while view.nbytes:
            view = view[stream.readinto(view) :]


def ours(file: Path, shapes: list[tuple[int, int]], dtype: torch.dtype) -> None:
    """Read into the parameters of modules, as when a model is loaded."""
    with torch.device("meta"):
        net = nn.Sequential(*(nn.Linear(columns, rows, bias=False) for rows, columns in shapes))
    tensors = Tensors.open([file])
    for _ in load_into(
        net, tensors, identity_map(tensors.shapes), Device(torch.device("cpu"), dtype), what="benchmark"
    ):
        pass


def timed(read: Callable[[], None]) -> float:
    start = time.perf_counter()
    read()
    return time.perf_counter() - start


def peak() -> int:
    """Return the peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file, shapes = write(Path(folder), round(asked.gigabytes * 1e9))
        size, before = file.stat().st_size, peak()
        ours(file, shapes, torch.bfloat16)
        extra = peak() - before - size
        turns = {"plain": [], "ours": []}
        for _ in range(asked.rounds):
            turns["plain"].append(timed(lambda: plainly(file)))
            turns["ours"].append(timed(lambda: ours(file, shapes, torch.bfloat16)))
        widened = timed(lambda: ours(file, shapes, torch.float32))
    ratios = [one / other for one, other in zip(turns["plain"], turns["ours"], strict=True)]
    result = {
        "bytes": size,
        "plain_gb_s": round(size / statistics.median(turns["plain"]) / 1e9, 2),
        "ours_gb_s": round(size / statistics.median(turns["ours"]) / 1e9, 2),
        "bf16_to_fp32_gb_s": round(size / widened / 1e9, 2),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_of_the_fastest": round(min(turns["plain"]) / min(turns["ours"]), 3),
        "peak_above_the_weights_mb": round(extra / 1e6, 1),
        "goal": GOAL,
    }
    print(json.dumps(result, indent=1))
    return 0 if result["ratio_of_the_fastest"] >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
