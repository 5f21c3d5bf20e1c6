"""Engines elsewhere against the engine of this process: added time per image, and images a second.

    python -m tests.bench.nodes [--cluster] [--rounds 12]

Every engine is a process on this machine with one thread, so that two of them need two free cores. `--cluster` adds a
Ray Serve proxy with one and with two engines. Not a test: it gates nothing.
"""

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from engine.contract import EngineError, Exact, Job, KeepSource, image_hash
from klein_mcp.daemon.endpoint import BuildInfo
from klein_mcp.daemon.executors.local import make_local
from klein_mcp.daemon.executors.remote import RemoteExecutor
from klein_mcp.jobs.executor import Executor
from klein_mcp.settings import Settings
from tests.real_cluster import TOKEN, real_cluster, until
from tests.real_server import engine_process

MANY = 12
"""Images of the throughput measurement, of as many lineages."""

SETTLE = 0.5
"""Seconds before each single job: an engine encodes its latest image once it has been idle for a moment."""

PROXY = "ray::ProxyActor"
"""Title of the process of Ray Serve's proxy."""

REFERENCE = np.random.default_rng(1).integers(0, 256, (128, 128, 3), np.uint8)


def generate(number: int) -> Job:
    return Job("a red apple on a yellow background", size=Exact(128, 128), seed=number)


def edit(number: int) -> Job:
    job = Job("make it blue", (REFERENCE,), size=KeepSource(), seed=number, hashes=(image_hash(REFERENCE),))
    return replace(job, affinity="nano bench")


def milliseconds(executor: Executor, make: Callable[[int], Job], number: int) -> float:
    time.sleep(SETTLE)
    began = time.perf_counter()
    list(executor.run(make(number)))
    return 1000 * (time.perf_counter() - began)


def images_a_second(executor: Executor, lanes: int, number: int) -> float:
    """Run MANY jobs of 20 steps, `lanes` at once."""
    jobs = [replace(generate(number + i), steps=20) for i in range(MANY)]
    began = time.perf_counter()
    with ThreadPoolExecutor(lanes) as pool:
        list(pool.map(lambda job: list(executor.run(job)), jobs))
    return MANY / (time.perf_counter() - began)


def report(sides: dict[str, tuple[Executor, int]], rounds: int) -> Iterator[str]:
    """Yield the rows of the table. The sides take turns, as other work on the machine meets all of them."""
    times: dict[str, dict[str, list[float]]] = {name: {"generate": [], "edit": [], "rate": []} for name in sides}
    for executor, lanes in sides.values():  # warm
        images_a_second(executor, lanes, 10**6)
        milliseconds(executor, edit, 10**6)
    for turn in range(rounds):
        for name, (executor, _) in sides.items():
            times[name]["generate"].append(milliseconds(executor, generate, turn))
            times[name]["edit"].append(milliseconds(executor, edit, turn))
    for turn in range(max(2, rounds // 4)):
        for name, (executor, lanes) in sides.items():
            times[name]["rate"].append(images_a_second(executor, lanes, 1000 * turn))
    yield "| | generate, ms (quickest) | edit, ms (quickest) | images a second (best) |"
    yield "|---|---|---|---|"
    for name, taken in times.items():
        cells = [f"{statistics.median(taken[kind]):.0f} ({min(taken[kind]):.0f})" for kind in ("generate", "edit")]
        yield f"| {name} | {' | '.join(cells)} | {statistics.median(taken['rate']):.1f} ({max(taken['rate']):.1f}) |"


def upload(executor: RemoteExecutor, number: int) -> float:
    """Return the milliseconds until a job with a new reference of 1024² is refused."""
    image = np.random.default_rng(number).integers(0, 256, (1024, 1024, 3), np.uint8)
    job = Job("edit", (image,), size=KeepSource(), model="there is no such model", affinity=f"nano {number}")
    began = time.perf_counter()
    try:
        list(executor.run(job))
    except EngineError:
        return 1000 * (time.perf_counter() - began)
    raise AssertionError("it ran")


def cpu_seconds(title: str) -> float:
    """Return the CPU time that processes of this title have taken."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if title in (stat.parent / "cmdline").read_text():
                ticks += sum(map(int, stat.read_text().rpartition(")")[2].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def uploads(sides: dict[str, tuple[Executor, int]], rounds: int) -> Iterator[str]:
    """Yield rows with the cost of sending an image of 1024²."""
    yield "| an image of 1024² to the engine and a refusal back | ms, median (quickest) |"
    yield "|---|---|"
    for name, (executor, _) in sides.items():
        if isinstance(executor, RemoteExecutor):
            taken = [upload(executor, number) for number in range(rounds)]
            yield f"| {name} | {statistics.median(taken):.0f} ({min(taken):.0f}) |"


def proxy_cost(executor: RemoteExecutor, rounds: int) -> str:
    """Return the CPU time that a proxy takes for an image of 1024², beyond what it takes idle."""
    began, before = time.monotonic(), cpu_seconds(PROXY)
    time.sleep(10)
    idle = (cpu_seconds(PROXY) - before) / (time.monotonic() - began)
    began, before = time.monotonic(), cpu_seconds(PROXY)
    for number in range(rounds):
        upload(executor, 1000 + number)
    busy = cpu_seconds(PROXY) - before - idle * (time.monotonic() - began)
    return f"CPU of the proxy for an image of 1024² in: {1000 * busy / rounds:.0f} ms ({rounds} images)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cluster", action="store_true", help="with Ray Serve, too")
    parser.add_argument("--rounds", type=int, default=12)
    arguments = parser.parse_args()
    build = BuildInfo.read()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        token = folder / "token"
        token.write_text(TOKEN)
        urls = [stack.enter_context(engine_process(folder / name, token))[0] for name in ("one", "two")]
        sides: dict[str, tuple[Executor, int]] = {
            "this process": (make_local(Settings(home=folder / "local", threads=1, variant="nano")), 1),
            "one `klein-mcp engine`": (RemoteExecutor(urls[:1], TOKEN, build), 1),
            "two": (RemoteExecutor(urls, TOKEN, build), 2),
        }
        behind_proxy = None
        if arguments.cluster:
            cluster = stack.enter_context(real_cluster(folder / "cluster", "--least", "2", queue=32))
            behind_proxy = cluster.executor()
            cluster.second.join(cluster.ray, cluster.token)
            until(lambda: len(cluster.engines()) == 2)
            sides["Ray Serve, two engines"] = (behind_proxy, 2)
        print("\n".join(report(sides, arguments.rounds)), end="\n\n")
        print("\n".join(uploads(sides, 2 * arguments.rounds)), end="\n\n")
        if behind_proxy:
            print(proxy_cost(behind_proxy, 5 * arguments.rounds))


if __name__ == "__main__":
    main()
