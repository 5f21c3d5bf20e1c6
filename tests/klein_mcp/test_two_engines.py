"""Two real engine processes on the embedded model behind one daemon."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from mcp import Client

from tests.real_server import RealServer, real_server
from tests.soak.test_soak import resident
from tests.tool_calls import call

pytestmark = pytest.mark.anyio

MOST = 120_000_000 // 1024
"""KiB, as Linux counts them."""


@contextmanager
def engine(home: Path, token: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`klein-mcp engine` on a free port: its address and process."""
    place = RealServer(home)
    home.mkdir()
    command = [sys.executable, "-m", "klein_mcp", "engine", "--listen", "127.0.0.1:0", "--token-file", str(token)]
    process = subprocess.Popen(command, env=place.environment(), stderr=subprocess.PIPE, text=True)
    assert process.stderr
    try:
        yield f"http://{process.stderr.readline().split()[-1]}", process
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


async def test_two_engines_behind_one_daemon(tmp_path: Path, server: RealServer):
    token = tmp_path / "token"
    token.write_text("a token of this test\n")
    with ExitStack() as stack:
        engines = dict(stack.enter_context(engine(tmp_path / name, token)) for name in ("one", "two"))
        place = stack.enter_context(real_server(tmp_path / "home"))
        remote = place.stdio(KLEIN_ENGINE=",".join(engines), KLEIN_ENGINE_TOKEN_FILE=str(token))
        async with Client(remote) as client, Client(server.stdio()) as local:
            first = await call(client, "generate_image", prompt="an apple on a yellow background", seed=7)
            here = await call(local, "generate_image", prompt="an apple on a yellow background", seed=7)
            assert pixels_of(first) == pixels_of(here), "the same bytes as on this machine"

            edit = {"image": first["image"], "prompt": "make the background pink", "seed": 7}
            edited = await call(client, "edit_image", **edit)
            status = await call(client, "engine_status")
            assert [node["error"] for node in status["engine"]["nodes"]] == ["", ""]
            hits = {node["url"]: node["hits"] for node in status["engine"]["nodes"]}
            again = await call(client, "edit_image", **{**edit, "seed": 8})
            status = await call(client, "engine_status")
            used = [node["url"] for node in status["engine"]["nodes"] if node["hits"] > hits[node["url"]]]
            assert len(used) == 1, "the second edit found its reference where the first one was"

            pid = int(status["pid"])
            assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()
            assert resident(pid) < MOST

            os.kill(engines[used[0]].pid, signal.SIGKILL)
            engines[used[0]].wait()
            after = await call(client, "edit_image", **edit)
            assert pixels_of(after) == pixels_of(edited), "another engine, the same bytes"
            assert again["seed"] == "8"
            dead = next(node for node in (await call(client, "engine_status"))["engine"]["nodes"] if node["error"])
            assert dead["url"] == used[0]
        words = place.run("-m", "klein_mcp", "status").stdout
        assert used[0] in words
        assert json.loads(place.run("-m", "klein_mcp", "status", "--json").stdout)["engine"]["nodes"]


def pixels_of(payload: dict[str, object]) -> bytes:
    from tests.images import pixels

    return pixels(Path(str(payload["path"])).read_bytes()).tobytes()
