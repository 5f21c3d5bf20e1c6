"""Engines elsewhere that lie, or never end."""

import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from engine.contract import (
    EngineFailed,
    EngineStatus,
    KnownModel,
    Step,
)
from klein_mcp.cli.status import format_status
from klein_mcp.daemon import wire
from klein_mcp.daemon.executors import answers
from klein_mcp.daemon.executors import remote as remotes
from klein_mcp.daemon.executors.remote import RemoteExecutor
from klein_mcp.jobs.status import DaemonStatus
from tests.fakes import painted
from tests.klein_mcp.machines import (
    BUILD,
    EDIT,
    LIES,
    RESULT,
    TOKEN,
    Machine,
    known,
    liar,
    listening,
    machines,
    nested,
    run,
)

pytestmark = pytest.mark.usefixtures("patient")

STATUS = EngineStatus("cpu", "float32", 1, 10**9, models=(KnownModel("nano", "Apache-2.0", "/nano"),)).to_json()
STATUS_LIES: dict[str, dict[str, Any]] = {
    "a word for a number": {"engine": {**STATUS, "free_bytes": "many"}},
    "a number for a word": {"engine": {**STATUS, "loaded": 7}},
    "a number beyond all memory": {"engine": {**STATUS, "free_bytes": 10**400}},
    "no models": {"engine": {**STATUS, "models": 5}},
    "a word for a number of a cluster": {"engine": None, "nodes": [{"url": "a on one", "hits": "many"}]},
}


@pytest.mark.parametrize("lie", STATUS_LIES)
def test_lie_about_a_status_is_the_error_of_its_machine(lie: str):
    honest = Machine()
    with listening(liar(LIES["nothing"], TOKEN, BUILD, STATUS_LIES[lie])) as url, machines(honest):
        run(remote := RemoteExecutor([honest.url, url], TOKEN, BUILD), known(EDIT))
        status = remote.status()
    honest_one, lying = status.nodes
    assert "does not answer as klein-mcp engine does" in lying.error
    assert not honest_one.error
    words = format_status(DaemonStatus(True, started="2026-11-24T05:05:51+0000", engine=status))
    assert "1 of 2 engines answer" in words


@pytest.mark.parametrize("lie", LIES)
def test_lying_machine_does_no_harm(lie, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(answers, "MOST_EVENTS", 2000)  # or the endless one takes seconds
    honest = Machine()
    with listening(liar(LIES[lie], TOKEN, BUILD)) as url, machines(honest):
        remote = RemoteExecutor([url, honest.url], TOKEN, BUILD)
        for lineage in range(8):  # some of them belong to the liar
            job = replace(known(EDIT), affinity=f"auto {lineage}")
            assert run(remote, job).image.tobytes() == painted(job).tobytes()
    assert len(honest.jobs) == 8


@pytest.mark.parametrize("code", [200, 500])
def test_other_server_that_sends_without_end_is_passed_over(code: int):
    """A port may be anybody's: a download there had filled the memory, and no other engine was asked."""

    async def anything(request: Request) -> Response:
        return StreamingResponse(nested(), status_code=code)

    honest = Machine()
    other = Starlette(routes=[Route("/{path:path}", anything, methods=["GET", "POST"])])
    with listening(other) as url, machines(honest):
        remote = RemoteExecutor([url, honest.url], TOKEN, BUILD)
        for lineage in range(4):  # one of them belongs to it, but for one run in sixteen
            run(remote, replace(known(EDIT), affinity=f"auto {lineage}"))
        strange, _ = remote.status().nodes
    assert len(honest.jobs) == 4
    assert "it sends without end" in strange.error


def test_event_that_never_ends_counts_as_silence(monkeypatch: pytest.MonkeyPatch):
    """A byte now and then kept the connection, and so the job, for ever."""

    def drops() -> Iterator[bytes]:
        for byte in wire.encode(replace(RESULT, image=np.zeros((64, 48, 3), np.uint8))):
            time.sleep(0.05)
            yield bytes([byte])

    words = r"it has completed no event for 0\.2 s"
    with listening(liar(drops, TOKEN, BUILD)) as url:
        remote = RemoteExecutor([url], TOKEN, BUILD)
        monkeypatch.setattr(remotes, "SILENCE", 0.2)  # now, or the connection would also count a pause of 0.2 s
        with pytest.raises(EngineFailed, match=words):
            run(remote, known(EDIT))


def test_time_of_whoever_takes_the_events_is_no_silence(monkeypatch: pytest.MonkeyPatch):
    now = 0.0
    monkeypatch.setattr(answers, "time", SimpleNamespace(monotonic=lambda: now))
    chunks = [wire.encode(Step(step, 4)) for step in (1, 2)]
    response: Any = SimpleNamespace(iter_raw=lambda: iter(chunks))
    for _ in answers.read_events(EDIT, response, 10):
        now += 100
