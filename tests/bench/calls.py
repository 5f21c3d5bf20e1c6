"""Time that a call spends outside the engine, here or against another checkout, interleaved.

    python -m tests.bench.calls [--against FOLDER] [--rounds 40]

A scripted engine returns a finished image of a photograph's texture at once, so that everything that is measured is
ours: stdio, daemon, library, PNG, preview. FOLDER: the root of another checkout. Not a test: it gates nothing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import anyio
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters

ROOT = Path(__file__).parents[2]
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "generate 256²": ("generate_image", {"width": 256, "height": 256}),
    "generate 1024²": ("generate_image", {"width": 1024, "height": 1024}),
    "edit 1024², known reference": ("edit_image", {"image": "last"}),
}


async def main(roots: list[Path], rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with AsyncExitStack() as stack:
            servers = []
            for index, root in enumerate(roots):
                home = Path(folder) / str(index)
                stack.enter_context(_daemon(root, home))
                servers.append((root, home, await stack.enter_async_context(_client(root, home))))
            print(f"| ms outside the engine, median of {rounds} | {' | '.join(root.name for root in roots)} |")
            print("|---|" + "---|" * len(roots))
            for name in CALLS:
                walls, cpu = await _overheads(name, servers, rounds)
                print(f"| {name} | {' | '.join(walls)} |")
                print(f"| – its CPU time, front end and daemon | {' | '.join(cpu)} |", flush=True)
            rates = [await _six_clients(root, home) for root, home, _ in servers * 3]
            best = [f"{max(rates[index :: len(servers)]):.1f}" for index in range(len(servers))]
            print(f"| images a second, six clients at 1024² (best of 3 turns) | {' | '.join(best)} |")
            print(f"| idle front end, MB resident | {' | '.join(_resident(home) for _, home, _ in servers)} |")
            await anyio.sleep(2)
            wakes = [_wakes(home) for _, home, _ in servers]
            await anyio.sleep(20)
            rates = [(_wakes(home) - before) / 20 for before, (_, home, _) in zip(wakes, servers, strict=True)]
            print(f"| wake-ups a second, idle daemon | {' | '.join(f'{rate:.2f}' for rate in rates)} |")


async def _overheads(name: str, servers: list[tuple[Path, Path, Client]], rounds: int) -> tuple[list[str], list[str]]:
    tool, arguments = CALLS[name]
    seen: list[list[float]] = [[] for _ in servers]
    spent: list[float] = [0.0 for _ in servers]
    for round in range(rounds + 2):
        for index, (_, home, client) in enumerate(servers):
            before = _cpu(home)
            began = time.perf_counter()
            result = await client.call_tool(tool, {"prompt": f"texture {round}", "seed": round, **arguments})
            wall = 1000 * (time.perf_counter() - began)
            assert not result.is_error, result.content
            if round >= 2:
                seen[index].append(wall)
                spent[index] += _cpu(home) - before
    walls = [f"{statistics.median(walls):.1f} (least {min(walls):.1f})" for walls in seen]
    return walls, [f"{total / rounds:.0f}" for total in spent]


async def _six_clients(root: Path, home: Path, images: int = 8) -> float:
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(_client(root, home)) for _ in range(6)]

        async def work(client: Client) -> None:
            for seed in range(images):
                arguments = {"prompt": "texture", "seed": seed, "width": 1024, "height": 1024}
                assert not (await client.call_tool("generate_image", arguments)).is_error

        for client in clients:
            await client.list_tools()
        began = time.perf_counter()
        async with anyio.create_task_group() as tasks:
            for client in clients:
                tasks.start_soon(work, client)
        return 6 * images / (time.perf_counter() - began)


def _environment(root: Path, home: Path) -> dict[str, str]:
    own = {key: value for key, value in os.environ.items() if not key.startswith("KLEIN_")}
    return {**own, "KLEIN_HOME": str(home), "PYTHONPATH": str(root), "KLEIN_WAIT_BUDGET": "600"}


@contextmanager
def _daemon(root: Path, home: Path) -> Iterator[None]:
    home.mkdir()
    command = [sys.executable, "-m", "tests.klein_mcp.fake_daemon"]
    process = subprocess.Popen(command, cwd=root, env=_environment(root, home))
    try:
        while not (home / "daemon.json").exists():
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(60)


@asynccontextmanager
async def _client(root: Path, home: Path) -> AsyncIterator[Client]:
    server = StdioServerParameters(
        command=sys.executable, args=["-m", "klein_mcp"], env=_environment(root, home), cwd=str(root)
    )
    async with Client(server) as client:
        yield client


def _processes(home: Path, words: bytes) -> list[Path]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            mine = f"KLEIN_HOME={home}".encode() in (folder / "environ").read_bytes().split(b"\0")
            if mine and (folder / "cmdline").read_bytes().rstrip(b"\0").endswith(words):
                found.append(folder)
        except OSError:
            continue
    return found


def _cpu(home: Path) -> float:
    """Milliseconds of CPU time of front end and daemon, which a busy machine does not change."""
    ticks = 0
    for folder in (*_processes(home, b"-m\0klein_mcp"), *_processes(home, b"fake_daemon")):
        ticks += sum(map(int, (folder / "stat").read_text().rpartition(")")[2].split()[11:13]))
    return 1000 * ticks / os.sysconf("SC_CLK_TCK")


def _resident(home: Path) -> str:
    (front_end,) = _processes(home, b"-m\0klein_mcp")
    line = next(line for line in (front_end / "status").read_text().splitlines() if line.startswith("VmRSS"))
    return f"{int(line.split()[1]) / 1000:.0f}"


def _wakes(home: Path) -> int:
    """Voluntary context switches of all threads of the daemon."""
    (daemon,) = _processes(home, b"fake_daemon")
    lines = [line for task in (daemon / "task").iterdir() for line in (task / "status").read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--against", type=Path)
    parser.add_argument("--rounds", type=int, default=40)
    asked = parser.parse_args()
    anyio.run(main, [*([asked.against] if asked.against else []), ROOT], asked.rounds)
    print(json.dumps({"cores": os.cpu_count(), "load": os.getloadavg()}))
