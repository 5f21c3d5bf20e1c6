"""`klein-mcp studio` beside a `serve` of the same data folder opens a new link to it."""

import json
import signal
import stat
from pathlib import Path
from typing import Any

import httpx2
import pytest

from klein_mcp.http import app as http_app
from klein_mcp.http import invitations
from klein_mcp.http.studio import ENTRY
from klein_mcp.jobs.service import Service
from tests.disks import fill, small_disk
from tests.klein_mcp.front_ends import serving_process
from tests.real_server import RealServer

pytestmark = pytest.mark.anyio


async def test_running_serve_gives_a_new_link_each_time(tmp_path: Path) -> None:
    server = RealServer(tmp_path / "home")
    with serving_process(server) as (url, process):
        links = []
        for _ in range(2):
            done = server.run("-m", "klein_mcp", "studio", "--no-browser")
            assert done.returncode == 0, done.stderr
            assert "klein-mcp serve" in done.stderr
            links.append(done.stdout.strip())
        assert links[0] != links[1]
        async with httpx2.AsyncClient() as client:
            for link in links:
                assert link.startswith(f"{url}{ENTRY}")
                assert (await client.get(link)).status_code == 200
                assert (await client.get(link)).status_code == 403
            assert (await client.get(f"{url}/studio")).status_code == 200
        (file,) = server.home.glob(invitations.FILES)
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        process.terminate()
        process.wait(60)
    assert not file.exists()


async def test_only_the_key_gets_a_link(service: Service) -> None:
    context = http_app.make_context(service)
    transport = httpx2.ASGITransport(app=http_app.application(context))
    async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1:8765") as client:
        for headers in ({}, {"authorization": "Bearer x"}, {"authorization": "Bearer "}):
            assert (await client.post(invitations.PATH, headers=headers)).status_code == 401
        right = {"authorization": f"Bearer {context.sessions.invite_key}"}
        assert (await client.get(invitations.PATH, headers=right)).status_code == 405
        assert (await client.post(invitations.PATH, headers={**right, "host": "evil.example"})).status_code == 421
        code = (await client.post(invitations.PATH, headers=right)).json()["code"]
    assert context.sessions.redeem(code)


def test_second_server_takes_nothing_from_the_first(tmp_path: Path, service: Service, monkeypatch: Any) -> None:
    monkeypatch.setattr(invitations, "_link", lambda found, entry: found["public"])
    first, second = http_app.make_context(service), http_app.make_context(service)
    with invitations.announced(tmp_path, first, "http://127.0.0.1:8765", "first"):
        with invitations.announced(tmp_path, second, "http://127.0.0.1:8766", "second"):
            assert len([*tmp_path.glob(invitations.FILES)]) == 2
        assert invitations.fresh_link(tmp_path, ENTRY) == "first"
    assert invitations.fresh_link(tmp_path, ENTRY) is None


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder that nobody can make, as on Linux")
async def test_serve_starts_without_a_data_folder(tmp_path: Path) -> None:
    with serving_process(RealServer(Path("/proc/klein-mcp"))) as (url, process):
        async with httpx2.AsyncClient() as client:
            assert (await client.get(f"{url}/healthz")).status_code == 200
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
        assert process.stderr
        assert "Traceback" not in process.stderr.read()


def test_full_disk_costs_a_line_and_no_server(
    tmp_path: Path, service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    context = http_app.make_context(service)
    with small_disk(tmp_path / "disk", "64k") as disk:
        fill(disk)
        with invitations.announced(disk, context, "http://127.0.0.1:8765", "first"):
            assert invitations.fresh_link(disk, ENTRY) is None
    (record,) = caplog.records
    assert record.getMessage() == f"klein-mcp studio will not find this server: {disk}: No space left on device"


@pytest.mark.parametrize(
    "left", ["", "[]", "{}", '{"url": 1}', json.dumps({"url": "http://127.0.0.1:9", "public": "x", "key": "y"})]
)
def test_file_of_a_server_that_ended_is_no_server(tmp_path: Path, left: str) -> None:
    (tmp_path / invitations.FILES.replace("*", "")).write_text(left)
    assert invitations.fresh_link(tmp_path, ENTRY) is None
    assert invitations.fresh_link(tmp_path / "nothing", ENTRY) is None
