"""Engines on other machines: the same bytes, sticky lineages, and retries."""

import shutil
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from engine.contract import (
    BadWeights,
    Busy,
    CacheStats,
    ChangeMask,
    EngineError,
    EngineFailed,
    EngineStatus,
    Event,
    Job,
    KeepSource,
    KnownModel,
    ModelNotFound,
    Native,
    NodeStatus,
    OutOfMemory,
    Rgb8,
    Step,
)
from klein_mcp.cli.status import format_status
from klein_mcp.daemon import wire
from klein_mcp.daemon.endpoint import BuildInfo, proof
from klein_mcp.daemon.executors import remote as remotes
from klein_mcp.daemon.executors.node import combined
from klein_mcp.daemon.executors.remote import RemoteExecutor
from klein_mcp.jobs.status import DaemonStatus
from klein_mcp.settings import Settings
from tests.fakes import painted
from tests.klein_mcp.machines import (
    BUILD,
    EDIT,
    RESULT,
    TOKEN,
    Machine,
    known,
    listening,
    machines,
    run,
)
from tests.klein_mcp.test_engine_command import make_certificate
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("patient")


def test_remote_result_is_the_local_one_with_every_step():
    with machines(Machine()) as remote:
        *events, result = remote.run(known(EDIT))
    assert result.image.tobytes() == painted(EDIT).tobytes()  # type: ignore
    assert [event.done for event in events if isinstance(event, Step)] == [1, 2, 3, 4]


def test_lineage_stays_on_one_machine_and_lineages_spread():
    one, two = Machine(), Machine()
    with machines(one, two) as remote:
        for lineage in range(12):
            for seed in range(3):
                run(remote, replace(known(EDIT), affinity=f"auto {lineage}", prompt=str(lineage), seed=seed))
    by_machine = [{job.prompt for job in machine.jobs} for machine in (one, two)]
    assert not by_machine[0] & by_machine[1]
    assert all(by_machine)


def test_reference_that_a_machine_holds_is_not_sent_again(monkeypatch):
    sent, encode = [], wire.encode
    monkeypatch.setattr(wire, "encode", lambda message: sent.append(message) or encode(message))
    with machines(machine := Machine()) as remote:
        first = run(remote, known(EDIT))
        run(remote, replace(known(EDIT), references=(first.image, *EDIT.references), size=Native()))
        run(remote, known(EDIT))
    frames = [len(message.references) for message in sent if isinstance(message, Job)]
    assert frames == [1, 2, 0], "hashes of the second job did not match its references, so all were sent"
    assert machine.jobs[-1].references[0].tobytes() == EDIT.references[0].tobytes()


def test_machine_that_forgot_a_reference_gets_it_again():
    machine = Machine()
    with machines(machine) as remote:
        run(remote, known(EDIT))
        machine.server._held._images.clear()
        assert run(remote, known(EDIT)).image.tobytes() == painted(EDIT).tobytes()


def test_machine_that_dies_mid_job_costs_a_retry():
    one, two = Machine(), Machine()
    with machines(one, two) as remote:
        run(remote, known(EDIT))
        owner, other = (one, two) if one.jobs else (two, one)

        def die(job: Job) -> Rgb8:
            raise RuntimeError("the device is gone")

        owner.executor.paint = die
        assert run(remote, known(EDIT)).image.tobytes() == painted(EDIT).tobytes()
        assert len(other.jobs) == 1
        run(remote, known(EDIT))
        assert len(other.jobs) == 2, "it rests for a while"
        assert next(node for node in remote.status().nodes if node.url == owner.url)


def test_closing_cancels_the_remote_job():
    machine = Machine()
    machine.executor.seconds_per_step = 0.05
    with machines(machine) as remote:
        with closing(remote.run(known(EDIT))) as events:  # type: ignore
            next(event for event in events if isinstance(event, Step))
        wait_until(lambda: machine.executor.cancelled == 1)


def test_full_machines_are_busy_with_the_least_seconds_to_retry():
    with machines(Machine(size=0), Machine(size=0)) as remote, pytest.raises(Busy) as full:
        run(remote, known(EDIT))
    assert full.value.retry_after >= 1


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        (Machine(token="another token of theirs"), "another token"),
        (Machine(build=BuildInfo("1.0", "other", 0)), r"another build, 1\.0 \(other\), than .*, 1\.0 \(same\)"),
    ],
)
def test_wrong_token_or_build_is_refused_in_words(machine, words):
    with machines(machine) as remote, pytest.raises(EngineFailed, match=words):
        run(remote, known(EDIT))
    assert not machine.jobs


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"token": "another token of theirs"}, "another token"),
        ({"build": BuildInfo("1.0", "other", 0)}, r"another build, 1\.0 \(other\), than .*, 1\.0 \(same\)"),
    ],
)
def test_machine_proves_itself_before_each_job(change: dict[str, Any], words: str):
    """Another build, or another server, may be at an address that proved itself before."""
    with proxied(engines=0) as (proxy, remote):
        run(remote, known(EDIT))
        vars(proxy).update(change)
        with pytest.raises(EngineFailed, match=words):
            run(remote, known(EDIT))
    assert len(proxy.sessions) == 1, "the second job was not sent"


def test_engine_runs_no_job_of_another_build():
    """Between the proof and the job, an engine may be replaced."""
    with proxied() as (proxy, remote):
        proxy.engine.server._build = BuildInfo("1.0", "other", 0)
        with pytest.raises(EngineFailed, match=r"412.*another build, 1\.0 \(other\)"):
            run(remote, known(EDIT))
    assert not proxy.engine.jobs


def test_jobs_at_once_take_one_engine_each():
    one, two = Machine(), Machine()
    both = threading.Barrier(2, timeout=60)

    def paint(job: Job) -> Rgb8:
        both.wait()
        return painted(job)

    one.executor.paint = two.executor.paint = paint
    jobs = [replace(known(EDIT), seed=seed) for seed in (3, 4)]  # of one lineage
    with machines(one, two) as remote, ThreadPoolExecutor(2) as threads:
        for _ in range(3):
            list(threads.map(lambda job: run(remote, job), jobs))
    assert [len(one.jobs), len(two.jobs)] == [3, 3]


@pytest.mark.parametrize("refusal", [ModelNotFound, BadWeights, OutOfMemory])
def test_refusal_of_one_engine_is_asked_of_the_next(refusal: type[EngineError]):
    one, two = Machine(), Machine()
    with machines(one, two) as remote:
        run(remote, known(EDIT))
        owner, other = (one, two) if one.jobs else (two, one)
        owner.executor.error = refusal("not on the first one")
        for _ in range(2):
            assert run(remote, known(EDIT)).image.tobytes() == painted(EDIT).tobytes()
        assert len(owner.jobs) == 3, "it does not rest"
        other.executor.error = ModelNotFound("nor on the second one")
        with pytest.raises(refusal, match="not on the first one"):
            run(remote, known(EDIT))


def test_job_waits_for_an_engine_that_is_started_again(monkeypatch: pytest.MonkeyPatch):
    machine, pauses = Machine(), []
    with socket.socket() as bound, ExitStack() as stack, closing(machine.queue):
        # It refuses connections until it listens, and nobody else gets its port.
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"

        def pause(seconds: float) -> None:
            pauses.append(seconds)
            if seconds == 3:
                stack.enter_context(listening(machine.app, bound))

        monkeypatch.setattr(remotes, "PAUSES", (0, 1, 3))
        monkeypatch.setattr(remotes, "time", SimpleNamespace(monotonic=time.monotonic, sleep=pause))
        assert run(RemoteExecutor([url], TOKEN, BUILD), known(EDIT)).image.tobytes() == painted(EDIT).tobytes()
    assert pauses == [0, 1, 3]


@pytest.mark.parametrize("url", ["http://10.0.0.7:8000", "http://example.com", "ftp://127.0.0.1", "host:8000"])
def test_address_in_the_clear_over_a_network_is_refused(url):
    with pytest.raises(EngineFailed, match=r"in the clear|no address"):
        RemoteExecutor([url], TOKEN, BUILD)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://me:secret@gpu.example.org:8000", "Leave them out"),
        ("https://me:secret@gpu.example.org:99999", "no address"),
        ("gpu://me:secret@gpu.example.org", "no address"),
    ],
)
def test_password_in_an_address_is_refused_and_not_repeated(url: str, words: str):
    with pytest.raises(EngineFailed, match=words) as caught:
        RemoteExecutor([url], TOKEN, BUILD)
    assert "secret" not in str(caught.value)


def test_machine_that_comes_back_gets_its_lineages_again(monkeypatch):
    now = time.monotonic()
    monkeypatch.setattr(remotes, "time", SimpleNamespace(monotonic=lambda: now, sleep=time.sleep))
    one, two = Machine(), Machine()
    with machines(one, two) as remote:
        run(remote, known(EDIT))
        owner, other = (one, two) if one.jobs else (two, one)
        paint, owner.executor.paint = owner.executor.paint, lambda job: 1 / 0  # type: ignore
        run(remote, known(EDIT))
        owner.executor.paint = paint
        now += remotes.REST + 1
        before = len(owner.jobs)
        run(remote, known(EDIT))
        assert len(owner.jobs) == before + 1
        assert len(other.jobs) == 1


NANO = KnownModel("nano", "Apache-2.0", "/nano")


class FakeProxy:
    """The address of a cluster: answers as its engines do, after those answers to /run that a test gives it."""

    def __init__(self, *answers: Response, engines: int = 2) -> None:
        self.answers = list(answers)
        self.engines = engines
        self.token, self.build = TOKEN, BUILD
        self.sessions: list[str] = []
        self.engine = Machine()

    async def hello(self, request: Request) -> Response:
        answer = {"proof": proof(self.token, request.query_params["nonce"]), "build": asdict(self.build)}
        return JSONResponse({**answer, "engines": self.engines})

    async def run(self, request: Request) -> Response:
        self.sessions.append(request.headers.get("x-session-id", ""))
        await request.body()
        return self.answers.pop(0) if self.answers else await self.engine.server._run(request)

    async def status(self, request: Request) -> Response:
        nodes = [NodeStatus("a on one", loaded="nano", hits=3), NodeStatus("b on two", error="silent")]
        engine = EngineStatus("cpu", "float32", 1, 10**9, cache=CacheStats(2, 20, 0, 3, 1), models=(NANO,)).to_json()
        return JSONResponse({"queue": {}, "engine": engine, "nodes": [asdict(node) for node in nodes]})

    def app(self) -> Starlette:
        run = Route("/run", self.run, methods=["POST"])
        return Starlette(routes=[Route("/hello", self.hello), Route("/status", self.status), run])


@contextmanager
def proxied(*answers: Response, engines: int = 2) -> Iterator[tuple[FakeProxy, RemoteExecutor]]:
    proxy = FakeProxy(*answers, engines=engines)
    with listening(proxy.app()) as url, closing(proxy.engine.queue):
        yield proxy, RemoteExecutor([url], TOKEN, BUILD)


def test_cluster_is_sent_one_job_more_than_it_has_engines():
    with proxied() as (_, remote):
        assert remote.slots == 1, "not asked yet"
        run(remote, known(EDIT))
        assert remote.slots == 3
        one, two = remote.status().nodes
    assert one.url.endswith(" a on one")
    assert (one.loaded, one.hits, two.error) == ("nano", 3, "silent")


def test_status_sums_caches_and_names_models_of_all_engines():
    models = (NANO, KnownModel("klein-4b", "Apache-2.0", None))
    far = (KnownModel("klein-4b", "Apache-2.0", "/far/klein-4b"),)
    one = EngineStatus("cpu", "float32", 1, 10**9, cache=CacheStats(2, 20, 0, 3, 1), models=models)
    two = EngineStatus("cuda:0", "bfloat16", 1, 2 * 10**9, cache=CacheStats(3, 30, 0, 4, 2), models=far)
    status = combined((NodeStatus("a").with_engine(one), NodeStatus("b").with_engine(two)), [one, two])
    assert status.cache == CacheStats(5, 50, 0, 7, 3)
    assert {model.name: model.path for model in status.models} == {"nano": "/nano", "klein-4b": "/far/klein-4b"}
    lines = format_status(DaemonStatus(True, started="2026-11-24T05:05:51+0000", engine=status)).splitlines()
    assert "device: 2 engines elsewhere, 3.0 GB free" in lines
    assert "installed: nano (Apache-2.0), klein-4b (Apache-2.0)" in lines
    assert "cache: 5 prompts and references, 0 MB; 7 hits" in lines


def test_status_of_a_cluster_has_no_empty_fields():
    with proxied() as (_, remote):
        status = DaemonStatus(True, started="2026-11-24T05:05:51+0000", engine=remote.status())
    words = format_status(status)
    assert "device: 2 engines elsewhere\n" in words
    assert "installed: nano (Apache-2.0)\n" in words
    assert "cache:" not in words, "its engines tell only their hits"
    assert "3 cache hits" in words


@pytest.mark.parametrize("status", [DaemonStatus(False), DaemonStatus(True, started="2026-11-24T05:05:51+0000")])
def test_status_before_the_first_image_names_the_engines(status: DaemonStatus):
    urls = ("https://one:8000", "https://two:8000")
    assert "https://one:8000, https://two:8000" in format_status(status, urls)
    assert "engines" not in format_status(status)


def test_engine_that_does_not_listen_says_what_to_start():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    remote = RemoteExecutor([url], TOKEN, BUILD)
    with pytest.raises(EngineFailed, match="is klein-mcp engine running"):
        run(remote, known(EDIT))
    assert "is klein-mcp engine running" in remote.status().nodes[0].error


def test_self_signed_certificate_works_once_it_is_trusted(tmp_path: Path):
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    certificate, key = make_certificate(tmp_path, "localhost")
    machine = Machine()
    with listening(machine.app, ssl_certfile=certificate, ssl_keyfile=key) as address, closing(machine.queue):
        url = f"https://localhost:{address.rpartition(':')[2]}"
        with pytest.raises(EngineFailed, match=r"self-signed.*KLEIN_ENGINE_CERTIFICATE_FILE"):
            run(RemoteExecutor([url], TOKEN, BUILD), known(EDIT))
        result = run(RemoteExecutor([url], TOKEN, BUILD, certificate), known(EDIT))
    assert result.image.tobytes() == painted(EDIT).tobytes()


def test_certificate_file_that_cannot_be_used_is_named(tmp_path: Path):
    token = tmp_path / "token"
    token.write_text("a-token-of-these-tests")
    settings = Settings(home=tmp_path, engine=("https://one:8000",), engine_token_file=token)
    for name, words in (("none", "No such file"), ("token", "NO_CERTIFICATE")):
        with pytest.raises(EngineFailed, match=rf"certificate file .*{name} cannot be used: .*{words}"):
            RemoteExecutor.from_settings(replace(settings, engine_certificate_file=tmp_path / name))


def test_lineage_has_one_session_and_a_retry_another():
    with proxied(Response(b""), Response(b"")) as (proxy, remote):
        assert run(remote, known(EDIT)).image.tobytes() == painted(EDIT).tobytes()
        run(remote, replace(known(EDIT), seed=8))
        run(remote, Job("nothing to edit"))
    first, second, third, complete, later, without = proxy.sessions
    assert len({first, second, third}) == 3, "each try is made at another place of the ring"
    assert complete == third, "its engine had not seen the reference"
    assert later == first
    assert without == ""


def test_proxy_that_queues_no_more_is_busy():
    full_queue = Response("Request dropped", 503, {"retry-after": "7"})
    with proxied(full_queue) as (_, remote), pytest.raises(Busy) as full:
        run(remote, known(EDIT))
    assert full.value.retry_after == 7


def test_engine_is_broken_once_jobs_keep_breaking_off():
    machine = Machine()
    machine.executor.error = RuntimeError("the device is gone")
    with machines(machine) as remote:
        for _ in range(3):
            assert not machine.queue.is_broken
            with pytest.raises(EngineFailed):
                run(remote, known(EDIT))
        assert machine.queue.is_broken
        machine.executor.error = None
        run(remote, known(EDIT))
        assert not machine.queue.is_broken


def test_result_with_a_change_mask_of_its_size_is_read():
    job = Job("edit", (np.zeros((2400, 2400, 3), np.uint8),), size=KeepSource(), seed=3, find_change=True)
    image = np.random.default_rng(0).integers(0, 256, (2400, 2400, 3), np.uint8)
    machine = Machine()
    change = ChangeMask(np.full((2400, 2400), 9, np.uint8))

    def masked(job: Job, watched: object) -> Iterator[Event]:
        yield replace(RESULT, image=image, change=change)

    machine.executor.run = masked  # type: ignore[method-assign]
    with machines(machine) as remote:
        result = run(remote, known(job))
    assert result.change == change
