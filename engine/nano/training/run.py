"""Trains, sharpens and measures a nano in one call.

`python -m engine.nano.training.run FOLDER OUT --seconds 380 --decoder-seconds 90 [options of train]`

Three phases: `supervise` trains the transformer from FOLDER, `train_decoder --denoised` the decoder on what that makes,
and `evaluate` asks both held-out lists, a process for each group of parts. OUT gets the logs, the weights as files of
at most 16 MiB (`shards` puts them into a folder), and `tables.txt`. A phase that fails or takes too long is ended,
and the next one starts from the files that are there. Made for minutes on a GPU.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from engine.nano.training.shards import assemble
from engine.nano.training.supervise import supervise

GROUPS = {
    "old": ("one,two", "edit", "compose", "chain"),
    "new": ("one,two", "edit", "compose", "count,inside,four", "shape,shape edit", "chain"),
}
"""Parts of each held-out list that are measured by one process, of about the same length."""
GRACE = 30.0
"""Seconds a phase may take to start and to save, beyond its own."""


def _module(name: str, *arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", f"engine.nano.{name}", *map(str, arguments)]


def _limited(command: Sequence[str], seconds: float) -> str:
    """Run a command within a time limit and return its output."""
    try:
        done = subprocess.run(command, timeout=seconds, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except subprocess.TimeoutExpired as error:
        printed = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        return f"{printed}\nended after {seconds:.0f} s\n"
    return "\n".join(line for line in done.stdout.splitlines() if line and not line.startswith("Loading weights"))


def sharpen(folder: Path, out: Path, seconds: float, device: str, workers: int, batch: int | None) -> str:
    """Train the decoder on what the transformer in `out` makes."""
    options = ["--seconds", str(seconds), "--device", device, "--workers", str(workers), "--rate", "1e-3"]
    options += ["--batch", str(batch)] if batch else []
    return _limited(_module("training.train_decoder", folder, out, "--denoised", *options), seconds + GRACE)


def measure(weights: Path, lists: Sequence[str], seconds: float, device: str, at_once: int, every: int) -> str:
    """Return the tables of the lists, `at_once` groups at a time."""
    asked = [(name, parts) for name in lists for parts in GROUPS[name]]

    def table(group: tuple[str, str]) -> str:
        name, parts = group
        sheet = weights / f"{name} {parts}.png"
        options = ["--weights", weights, "--list", name, "--parts", parts, "--every", str(every), "--montage", sheet]
        return f"== {name}: {parts}\n{_limited(_module('evaluate', *options, '--device', device), seconds)}"

    with ThreadPoolExecutor(at_once) as pool:
        return "\n".join(pool.map(table, asked))


def run(args: argparse.Namespace, options: Sequence[str]) -> None:
    """Do all three phases, printing the tables at the end."""
    args.out.mkdir(parents=True, exist_ok=True)
    shared = ["--device", args.device, "--workers", str(args.workers)]
    with tempfile.TemporaryDirectory() as scratch:
        state = args.state or Path(scratch) / "state.pt"
        # Compiled, a step took 0.105 s instead of 0.170 (H200).
        probe = Path(scratch) / "compiled" if args.device.startswith("cuda") else None
        supervise(args.folder, args.out, args.seconds, state, probe, [*shared, *options])
        if args.decoder_seconds:
            print(sharpen(args.folder, args.out, args.decoder_seconds, args.device, args.workers, args.decoder_batch))
        weights = Path(shutil.copytree(args.folder, Path(scratch) / "weights"))
        assemble(args.out, weights)
        tables = measure(weights, args.lists, args.table_seconds, args.device, args.at_once, args.every)
    (args.out / "tables.txt").write_text(tables)
    print(tables, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a nano in diffusers format to start from")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, required=True, help="of the training, restarts included")
    parser.add_argument("--decoder-seconds", type=float, default=0.0, help="0: leave the decoder as it is")
    parser.add_argument("--decoder-batch", type=int, help="images a step")
    parser.add_argument("--table-seconds", type=float, default=75.0, help="limit of each table")
    parser.add_argument("--lists", nargs="+", choices=tuple(GROUPS), default=tuple(GROUPS))
    parser.add_argument("--every", type=int, default=1, help="of the lists, every n-th question")
    parser.add_argument("--at-once", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="tables at a time")
    parser.add_argument("--state", type=Path, help="where a later run goes on from (default: kept for restarts only)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 3))
    args, options = parser.parse_known_args()
    # Worker processes and tables share the cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run(args, options)


if __name__ == "__main__":
    main()
