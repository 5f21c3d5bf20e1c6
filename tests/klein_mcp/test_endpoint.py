"""Tests of how front ends find the engine's process, and nobody else does."""

import asyncio
import json
import os
import socket
import stat
import tomllib
from pathlib import Path

import httpx2
import pytest

from klein_mcp.daemon import endpoint as endpoints
from klein_mcp.daemon import launch
from klein_mcp.jobs.events import Done, Submitted
from klein_mcp.jobs.status import DaemonStatus
from tests.klein_mcp.daemons import connection, gone, run

pytestmark = pytest.mark.anyio


async def test_endpoint_file_is_for_its_owner_alone(front_end, tmp_path):
    await run(front_end)
    assert stat.S_IMODE((tmp_path / "daemon.json").stat().st_mode) == 0o600


async def test_without_the_token_only_the_greeting_is_answered(front_end, tmp_path):
    await run(front_end)
    address = endpoints.read(tmp_path)
    assert address
    async with httpx2.AsyncClient(base_url=address.url) as anybody:
        assert (await anybody.get("/hello?nonce=1")).status_code == 200
        for method, path in [
            ("GET", "/status"),
            ("GET", "/jobs"),
            ("POST", "/jobs"),
            ("GET", "/jobs/j"),
            ("GET", "/jobs/j/events"),
            ("POST", "/jobs/j/detach"),
            ("POST", "/jobs/j/cancel"),
            ("POST", "/drain"),
            ("POST", "/stop"),
        ]:
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": address.token[:-1]}):
                answer = await anybody.request(method, path, headers=headers)
                assert answer.status_code == 401, (method, path, headers)
    assert (await front_end.status()).queue.done == 1


async def test_bytes_that_are_no_request_are_refused(front_end, tmp_path):
    await run(front_end)
    address = endpoints.read(tmp_path)
    assert address
    async with httpx2.AsyncClient(base_url=address.url, headers={"authorization": f"Bearer {address.token}"}) as client:
        for body in (b"", b"noise", b"{}", b'{"request": {}, "client": "a", "listen": null, "saved": []}'):
            assert (await client.post("/jobs", content=body)).status_code == 400
        assert (await client.get("/jobs/nothing")).status_code == 404
    assert isinstance((await run(front_end))[-1], Done)


async def test_known_daemon_is_not_greeted_again(front_end, monkeypatch):
    await run(front_end)
    monkeypatch.setattr(launch.Launcher, "find", None)
    assert isinstance((await run(front_end))[0], Submitted)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"port": "x"}', b'{"port": 1, "pid": 1, "token": "t"}'])
async def test_endpoint_file_that_leads_nowhere_is_written_anew(content, tmp_path):
    path = tmp_path / "daemon.json"
    path.write_bytes(content)
    path.chmod(0o600)
    async with connection(tmp_path) as front_end:
        assert await front_end.status() == DaemonStatus(False)
        assert isinstance((await run(front_end))[-1], Done)
        await front_end.stop()
        await gone(tmp_path)


async def test_other_process_on_a_stale_port_gets_neither_token_nor_prompt(tmp_path):
    heard = []

    async def other(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.readuntil(b"\r\n\r\n"))
        body = json.dumps(
            {"proof": "0" * 64, "draining": False, "build": {"version": "9", "fingerprint": "", "changed": 0}}
        )
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(other, "127.0.0.1", 0)
    endpoints.write(tmp_path, endpoints.Endpoint(server.sockets[0].getsockname()[1], os.getpid(), "our secret"))
    async with server, connection(tmp_path) as front_end:
        assert isinstance((await run(front_end, "nobody else shall read this"))[-1], Done)
        await front_end.stop()
        await gone(tmp_path)
    assert heard
    assert not any(b"our secret" in words or b"nobody else" in words for words in heard)


async def test_endpoint_file_that_others_can_read_is_ignored(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoints.write(tmp_path, endpoints.Endpoint(listener.getsockname()[1], 1, "planted"))
        (tmp_path / "daemon.json").chmod(0o644)
        assert endpoints.read(tmp_path) is None


def tree(root: Path, *, ending: str = "\n", makers: bool = False) -> Path:
    """Write the code of a commit, as a checkout or a wheel has it."""
    files = ["engine/__init__.py", "engine/nano/words.py", "klein_mcp/cli/main.py", "klein_mcp/cli_notes.py"]
    files += ["engine/nano/training/train.py", "engine/nano/evaluate.py", "klein_mcp/studio/build.py"] if makers else []
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(f"name = {name!r}{ending}".encode())
    weights = root / endpoints.WEIGHTS
    weights.mkdir(parents=True)
    (weights / "config.json").write_bytes(f"{{}}{ending}".encode())
    (weights / "model.safetensors").write_bytes(b"\r\n" * 500_000)
    return root


def test_same_commit_is_the_same_build_wherever_it_came_from(tmp_path):
    print_of = endpoints._fingerprint
    wheel, _ = print_of(tree(tmp_path / "wheel"))
    assert print_of(tree(tmp_path / "checkout", makers=True))[0] == wheel
    assert print_of(tree(tmp_path / "windows", ending="\r\n", makers=True))[0] == wheel
    changed = tree(tmp_path / "changed")
    (changed / "engine/nano/words.py").write_text("name = 'another'\n")
    assert print_of(changed)[0] != wheel


@pytest.mark.parametrize("change", ["other numbers", "another size", "another configuration"])
def test_other_weights_are_another_build(change: str, tmp_path: Path):
    """Trained once more, the embedded model has weights of the same names, shapes and sizes."""
    root = tree(tmp_path)
    before, _ = endpoints._fingerprint(root)
    weights = root / endpoints.WEIGHTS / "model.safetensors"
    match change:
        case "other numbers":
            weights.write_bytes(b"\r\n" * 4 + b"\n\r" * 499_996)
        case "another size":
            weights.write_bytes(b"\r\n" * 500_001)
        case _:
            (weights.parent / "config.json").write_text('{"layers": 3}')
    assert endpoints._fingerprint(root)[0] != before


def test_build_leaves_out_what_the_wheel_leaves_out():
    configuration = tomllib.loads((Path(endpoints.INSTALLED) / "pyproject.toml").read_text())
    assert list(endpoints.NOT_IN_THE_WHEEL) == configuration["tool"]["hatch"]["build"]["targets"]["wheel"]["exclude"]
