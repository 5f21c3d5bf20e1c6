"""Benchmark of our engine and diffusers on the embedded weights, alternating.

    python -m tests.bench.cpu [--rounds 6]

Prints the tables of engine/SPEED.md. Under 3 minutes on 2 cores. Not a test: it gates nothing.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Read once, when torch comes in; the daemon does the same.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import anyio
import numpy as np
import torch
from PIL import Image

from engine.contract import EngineConfig, Exact, Job, Result, Rgb8
from engine.engine import Engine
from engine.families.klein.variants import EMBEDDED, VARIANTS
from engine.registry import NANO
from tests.bench.comparisons import HEAD, Row, compare
from tests.real_server import RealServer, real_server

SIDE = VARIANTS[EMBEDDED].native_size
THREADS = 1


def main(rounds: int) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(THREADS)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        print(f"{_machine()}, {THREADS} thread, torch {torch.__version__}, fp32, {SIDE}×{SIDE}, 4 steps\n\n{HEAD}")
        for kv in (False, True):
            for row in engine_rows(_model(Path(folder), kv=kv), kv=kv, rounds=rounds):
                print(row.markdown(), flush=True)
        with real_server(Path(folder) / "home") as place:
            print()
            for line in server_lines(place):
                print(line, flush=True)
    print(f"\ntook {time.perf_counter() - start:.0f} s")


def engine_rows(model: Path, *, kv: bool, rounds: int) -> Iterator[Row]:
    """Compare the engine with diffusers' pipeline.

    Each call has a new prompt, unless its row says otherwise.
    """
    engine, theirs = Engine(EngineConfig(device="cpu", dtype="float32", threads=THREADS)), _pipeline(model)
    fresh = itertools.count()
    known = [_picture(-1 - i) for i in range(4)]

    def ours(count: int, *, new: bool) -> Callable[[int], object]:
        def paint(i: int) -> Rgb8:
            references = tuple(_picture(next(fresh)) if new else known[k] for k in range(count))
            return _last(
                engine, Job(f"a dog {i}", references, size=Exact(SIDE, SIDE), seed=i & 0xFF, model=str(model))
            ).image

        return paint

    def pipeline(count: int) -> Callable[[int], object]:
        return lambda i: theirs(f"a dog {i}", [_picture(next(fresh)) for _ in range(count)], i & 0xFF)

    kind = "KV pipeline" if kv else "plain pipeline"
    _same(engine, theirs, model, known[:2])
    # Only a KV model can cache keys and values. On others a known reference only saves its encoding.
    known_one, known_four = (0.9, 0.65) if kv else (None, None)
    for name, count, new, target in (
        ("generate", 0, True, 0.9),
        ("edit, new reference", 1, True, None),
        ("edit, known reference", 1, False, known_one),
        ("four new references", 4, True, None),
        ("four known references", 4, False, known_four),
    ):
        yield compare(f"{kind}: {name}", ours(count, new=new), pipeline(count), target=target, rounds=rounds)
    if kv:
        plain = _pipeline(_model(model.parent, kv=False))
        for name, count, target in (("edit, known reference", 1, 0.65), ("four known references", 4, 0.35)):

            def against(i: int, count: int = count) -> Rgb8:
                return plain(f"a dog {i}", known[:count], i & 0xFF)

            yield compare(f"KV engine : plain pipeline: {name}", ours(count, new=False), against,
                          target=target, rounds=rounds)  # fmt: skip


def server_lines(place: RealServer) -> Iterator[str]:
    """Measure the waiting times of a client of the real stdio server."""
    yield f"exec to tools/list: {_doors(place)}"
    yield from anyio.run(_server_lines, place)


async def _server_lines(place: RealServer) -> list[str]:
    from mcp.client import Client

    start, rows = time.perf_counter(), []
    async with Client(place.stdio()) as client:

        async def call(tool: str, **arguments: Any) -> tuple[dict[str, Any], float]:
            began = time.perf_counter()
            result = await client.call_tool(tool, arguments)
            return json.loads(result.content[0].text), 1000 * (time.perf_counter() - began)  # type: ignore[union-attr] - it is text

        first, _ = await call("generate_image", prompt="a dog on a yellow background", seed=1)
        rows.append(f"cold start, exec to first image: {time.perf_counter() - start:.1f} s")
        for name, tool, more in (
            ("generate", "generate_image", {}),
            ("generate at 256×256", "generate_image", {"width": 256, "height": 256}),
            ("edit", "edit_image", {"image": first["image"]}),
        ):
            walls, overheads = [], []
            for seed in range(20):
                facts, wall = await call(tool, prompt=f"a cat {seed}", seed=seed, **more)
                recipe = await client.read_resource(f"klein://images/{facts['image']}/recipe")
                spent = json.loads(recipe.contents[0].text)["ms"]  # type: ignore[union-attr] - it is text
                inside = sum(spent[stage] for stage in spent.keys() - {"load"})
                walls.append(wall)
                overheads.append(wall - inside)
            rows.append(
                f"{name} through stdio, warm: {statistics.median(walls):.0f} ms, "
                f"of which outside the engine {statistics.median(overheads):.0f} ms"
            )
    pid = json.loads(place.run("-m", "klein_mcp", "status", "--json").stdout)["pid"]
    peak = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return [*rows, f"peak memory of the engine's process: {int(peak.split()[1]) / 1024:.0f} MB"]


MINIMAL = """
from mcp.server import MCPServer
server = MCPServer("minimal")
@server.tool()
def echo(text: str) -> str:
    return text
server.run("stdio")
"""


def _doors(place: RealServer, rounds: int = 5) -> str:
    """Compare our stdio server with a one-tool server on the same SDK."""
    asked = [
        {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {
            "protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "bench", "version": "0"}}},
        {"jsonrpc": "2.0", "method": "notifications/initialized"},
        {"jsonrpc": "2.0", "id": 2, "method": "tools/list", "params": {}},
    ]  # fmt: skip

    def answer(command: list[str]) -> Callable[[int], object]:
        def ask(_: int) -> None:
            with subprocess.Popen(
                [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                env=place.environment(), text=True,
            ) as server:  # fmt: skip
                assert server.stdin is not None
                assert server.stdout is not None
                for message in asked:
                    server.stdin.write(json.dumps(message) + "\n")
                server.stdin.flush()
                while json.loads(server.stdout.readline()).get("id") != 2:
                    pass
                server.kill()

        return ask

    row = compare("", answer(["-m", "klein_mcp"]), answer(["-c", MINIMAL]), target=1.25, rounds=rounds)
    return (
        f"{row.ours:.0f} ms; a server of one tool on the same SDK {row.theirs:.0f} ms; ratio {row.ratio:.2f} (≤ 1.25)"
    )


def _model(home: Path, *, kv: bool) -> Path:
    """Create a model folder with the embedded weights and four references.

    kv: declare it a KV model. Speed does not depend on what the model was trained for.
    """
    folder = home / ("kv" if kv else "plain")
    if not folder.exists():
        shutil.copytree(NANO, folder)
        _change(folder / "klein.json", max_references=4)
        _change(folder / "model_index.json", _class_name="Flux2KleinKVPipeline" if kv else "Flux2KleinPipeline")
    return folder


def _change(file: Path, **keys: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def _pipeline(model: Path) -> Callable[[str, list[Rgb8], int], Rgb8]:
    """Load diffusers' pipeline with the settings of klein.json."""
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = json.loads((model / "klein.json").read_text())
    pipe: Any = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def paint(prompt: str, references: list[Rgb8], seed: int) -> Rgb8:
        picture = pipe(
            prompt=prompt,
            image=[Image.fromarray(reference) for reference in references] or None,
            width=SIDE,
            height=SIDE,
            num_inference_steps=4,
            text_encoder_out_layers=tuple(config["text_layers"]),
            max_sequence_length=config["text_length"],
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        return np.asarray(picture)

    return paint


def _same(engine: Engine, theirs: Callable[..., Rgb8], model: Path, references: list[Rgb8]) -> None:
    """Check that both sides compute the same image before they are timed."""
    ours = _last(engine, Job("a dog", tuple(references), size=Exact(SIDE, SIDE), seed=1, model=str(model))).image
    difference = np.abs(ours.astype(int) - theirs("a dog", references, 1))
    assert difference.max() <= 1, f"the images differ by {difference.max()}"


def _picture(seed: int) -> Rgb8:
    return np.random.default_rng(seed & 0xFFFF).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def _last(engine: Engine, job: Job) -> Result:
    *_, painting = engine.run(job)
    assert isinstance(painting, Result)
    return painting


def _machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return "an unknown CPU"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=6)
    main(parser.parse_args().rounds)
