"""A real cluster on one machine: two Rays, the embedded model, a daemon in front of the proxy.

The tests run in the order of the file, on one cluster: the later ones end machines of it.
"""

import importlib.util
import itertools
import json
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from mcp import Client

from engine.contract import Busy, EngineFailed, Event, Exact, Job, KeepSource, Result, Step, image_hash
from klein_mcp.daemon import wire
from klein_mcp.daemon.endpoint import BuildInfo
from klein_mcp.daemon.executors.local import LocalExecutor, make_local
from klein_mcp.daemon.executors.remote import RemoteExecutor
from klein_mcp.settings import Settings
from tests.images import pixels
from tests.real_cluster import TOKEN, Cluster, family, real_cluster, until
from tests.real_server import RealServer, real_server
from tests.tool_calls import call

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.anyio,
    pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="needs klein-mcp[ray]"),
]

QUEUE = 3
LONG = 50
"""Steps of a job that is to be met in the middle: nano takes 20 ms a step here."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with real_cluster(tmp_path_factory.mktemp("cluster") / "machines", "--most", "2", queue=QUEUE) as made:
        yield made


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> LocalExecutor:
    return make_local(Settings(home=tmp_path_factory.mktemp("local"), threads=1, variant="nano"))


def run(executor: RemoteExecutor | LocalExecutor, job: Job) -> Result:
    *_, result = executor.run(job)
    assert isinstance(result, Result)
    return result


def lineage(name: str, **more: Any) -> Job:
    return Job("a red apple on a yellow background", size=Exact(128, 128), seed=5, affinity=name, **more)


def edit_of(result: Result, prompt: str = "make the background pink") -> Job:
    image = result.image
    return Job(prompt, (image,), size=KeepSource(), seed=6, hashes=(image_hash(image),), affinity="nano root")


async def test_front_end_gets_the_bytes_of_this_machine(cluster: Cluster, server: RealServer, tmp_path: Path):
    with real_server(tmp_path / "home") as place:
        remote = place.stdio(KLEIN_ENGINE=cluster.url, KLEIN_ENGINE_TOKEN_FILE=str(cluster.token))
        async with Client(remote) as client, Client(server.stdio()) as local:
            request = {"prompt": "an apple on a yellow background", "seed": 7}
            steps: list[float] = []

            async def note(progress: float, total: float | None, message: str | None) -> None:
                steps.append(progress)

            answer = await client.call_tool("generate_image", request, progress_callback=note)
            first = json.loads(answer.content[0].text)  # type: ignore[union-attr]
            here = await call(local, "generate_image", **request)
            assert shown(first) == shown(here)
            assert len(set(steps)) >= 4, "progress comes through step by step"

            edit = {"prompt": "make the background pink", "seed": 7}
            assert shown(await call(client, "edit_image", image=first["image"], **edit)) == shown(
                await call(local, "edit_image", image=here["image"], **edit)
            )
            status = await call(client, "engine_status")
            (node,) = status["engine"]["nodes"]
            assert node["url"].startswith(cluster.url)
            assert node["loaded"] == "nano"
            assert node["free_bytes"] > 0
            pid = int(status["pid"])
            maps = Path(f"/proc/{pid}/maps").read_text()
            assert "libtorch" not in maps
            assert "_raylet" not in maps


def shown(payload: dict[str, Any]) -> bytes:
    return pixels(Path(payload["path"]).read_bytes()).tobytes()


def test_second_edit_finds_its_reference_cached(cluster: Cluster):
    executor = cluster.executor()
    first = run(executor, lineage("nano root"))
    run(executor, edit_of(first))  # a hit already if there was idle time to encode it
    assert run(executor, edit_of(first, "make the apple green")).cache["references"] == "hit"


def test_cancel_reaches_the_engine_within_one_step(cluster: Cluster):
    executor = cluster.executor()
    run(executor, lineage("nano root"))
    job = lineage("nano root", steps=LONG)
    times = [time.monotonic() for event in executor.run(job) if isinstance(event, Step)]
    step = (times[-1] - times[0]) / (LONG - 1)
    with closing(executor.run(job)) as events:  # type: ignore[type-var]
        next(event for event in events if isinstance(event, Step))
    left = time.monotonic()
    until(lambda: not any(node.running for node in cluster.engines()))
    idle = time.monotonic() - left
    # Leaving before the end is what counts; the proxy's own delay of some ms is in it.
    assert idle < step * LONG / 2
    print(f"a step {1000 * step:.0f} ms, idle {1000 * idle:.0f} ms after the cancel")


def test_wrong_token_and_other_build_are_refused_in_words(cluster: Cluster):
    with pytest.raises(EngineFailed, match="another token"):
        run(RemoteExecutor([cluster.url], "a-token-of-somebody-else", BuildInfo.read()), lineage("nano"))
    with pytest.raises(EngineFailed, match="another build"):
        run(RemoteExecutor([cluster.url], TOKEN, BuildInfo("0.1.0", "older", 0)), lineage("nano"))
    assert httpx2.post(f"{cluster.url}/run", content=wire.encode(lineage("nano"))).status_code == 401


def test_ray_of_the_cluster_refuses_a_machine_with_another_token(cluster: Cluster, tmp_path: Path):
    other = tmp_path / "token"
    other.write_text("a-token-of-somebody-else")
    other.chmod(0o600)
    joined = cluster.second.cluster("join", cluster.ray, "--host", "127.0.0.1", "--token-file", str(other))
    assert joined.returncode == 1
    assert joined.stderr == (
        "klein-mcp: The cluster has another token. Its --token-file has to be the same everywhere.\n"
    )
    assert not (cluster.second.place.home / "cluster.json").exists()


def test_clients_take_turns_at_one_engine(cluster: Cluster):
    many, one = cluster.executor(), cluster.executor()
    finished: list[str] = []

    def paint(executor: RemoteExecutor, name: str) -> None:
        run(executor, lineage("nano root", steps=4 * LONG))
        finished.append(name)

    with ThreadPoolExecutor(4) as pool:
        flood = [pool.submit(paint, many, "many") for _ in range(QUEUE)]
        until(lambda: sum(node.running + node.waiting for node in cluster.engines()) == QUEUE or any_done(flood))
        pool.submit(run_patiently, one, lineage("nano root")).result()
        before = len(finished)
        for each in flood:
            each.result()
    assert before < QUEUE, "the lone client did not wait for all jobs of the other"


def any_done(futures: list[Future[None]]) -> bool:
    return any(each.done() for each in futures)


def run_patiently(executor: RemoteExecutor, job: Job) -> Result:
    """Run `job` as the daemon's clients do: again while the queue is full."""
    while True:
        try:
            return run(executor, job)
        except Busy:
            time.sleep(0.1)


def test_full_queue_says_busy_with_seconds_to_retry(cluster: Cluster):
    def attempt(_: int) -> Event | Busy:
        try:
            return run(cluster.executor(), lineage("nano root", steps=LONG))
        except Busy as exc:
            return exc

    with ThreadPoolExecutor(12) as pool:
        outcomes = list(pool.map(attempt, range(12)))
    busy = [each for each in outcomes if isinstance(each, Busy)]
    assert busy, "12 jobs, and one engine with 3 places"
    assert len(busy) < 12
    assert all("queue is full" in str(each) and each.retry_after >= 1 for each in busy), "our words, not a 503"


def test_machine_that_joins_takes_work_and_is_listed(cluster: Cluster):
    cluster.second.join(cluster.ray, cluster.token)
    report = json.loads(cluster.first.cluster("status", "--json").stdout)
    assert [each["places"] for each in report["machines"]] == [1, 1]
    executor = cluster.executor()
    began = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        # More jobs than engines: Serve starts one more, on the machine with room.
        stop = threading.Event()
        load = [pool.submit(keep_busy, executor, f"nano {i}", stop) for i in range(4)]
        until(lambda: len([node for node in cluster.engines() if node.loaded and not node.error]) == 2)
        print(f"the second engine took work {time.monotonic() - began:.1f} s after there was too much")
        # A job that starts some seconds after the last count counts the engines: one more place than there are.
        until(lambda: executor.slots == 3)
        stop.set()
        assert all(each.result() for each in load)


def keep_busy(executor: RemoteExecutor, name: str, stop: threading.Event) -> int:
    """Run jobs until `stop` and return how many."""
    count = 0  # a lineage each: some of them belong to the newest engine
    while not stop.is_set():
        run_patiently(executor, lineage(f"{name} {count}", steps=LONG))
        count += 1
    return count


def test_lineages_spread_and_each_stays_on_one_engine(cluster: Cluster):
    executor = cluster.executor()
    first = run(executor, lineage("nano root"))
    for i in range(12):
        job = replace(edit_of(first), affinity=f"nano {i}")
        run(executor, job)
        assert run(executor, replace(job, seed=9)).cache["references"] == "hit"
    assert all(node.hits for node in cluster.engines()), "both engines have lineages"


def test_machine_that_dies_in_the_middle_costs_a_retry(
    cluster: Cluster, local: LocalExecutor, caplog: pytest.LogCaptureFixture
):
    executor = cluster.executor()
    jobs = [lineage(f"nano {i}", steps=4 * LONG) for i in range(12)]
    with ThreadPoolExecutor(len(jobs)) as pool:
        painted = []
        for job in jobs:  # until each engine has one
            painted.append(pool.submit(run_patiently, executor, job))
            time.sleep(0.5)
            if all(node.running for node in cluster.engines()):
                break
        else:
            pytest.fail("one engine got all lineages")
        cluster.second.cut_power()
        began = time.monotonic()
        results = [each.result() for each in painted]
        print(f"{len(results)} jobs done {time.monotonic() - began:.1f} s after one of two machines was killed")
    assert "try 1" in caplog.text, "a job was on the machine that died"
    expected = run(local, jobs[0]).image.tobytes()
    assert [result.image.tobytes() for result in results] == [expected] * len(results)


def test_machine_that_comes_back_takes_work_again(cluster: Cluster):
    cluster.second.join(cluster.ray, cluster.token)
    began = time.monotonic()
    until(lambda: len([node for node in cluster.engines() if not node.error]) == 2)
    print(f"its engine was there {time.monotonic() - began:.1f} s after the machine")
    executor = cluster.executor()
    roots = itertools.count()
    until(lambda: run(executor, lineage(f"nano {next(roots)}")) and all_loaded(cluster))
    report = cluster.first.cluster("status")
    assert report.stdout.count("engine ") == 2, report.stdout
    assert report.stdout.count("machine ") == 2, report.stdout


def all_loaded(cluster: Cluster) -> bool:
    engines = cluster.engines()
    return len(engines) == 2 and all(node.loaded for node in engines)


def test_ray_keeps_its_files_where_nobody_else_can_go(cluster: Cluster):
    (folder,) = (word for word in command_of(cluster.first.pid).split() if word.startswith("--temp-dir="))
    private = Path(folder.partition("=")[2]).parent
    assert stat.S_IMODE(private.stat().st_mode) == 0o700


def command_of(pid: int) -> str:
    return subprocess.run(["ps", "-ww", "-o", "command=", "-p", str(pid)], capture_output=True, text=True).stdout


def test_down_leaves_no_process_behind(cluster: Cluster):
    processes = [*family(cluster.second.pid), *family(cluster.first.pid)]
    for machine in (cluster.second, cluster.first):
        assert machine.cluster("down").stdout == "left\n"
    until(lambda: not [pid for pid in processes if is_running(pid)])
    with pytest.raises(EngineFailed, match="No engine could run it"):
        run(cluster.executor(), lineage("nano root"))
    assert "in no cluster" in cluster.first.cluster("status").stderr


def is_running(pid: int) -> bool:
    listed = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(listed) and not listed.startswith("Z")
