"""Two real engine processes on the embedded model behind one daemon."""

import json
import os
import signal
from contextlib import ExitStack
from pathlib import Path

import anyio
import pytest
from mcp import Client

from klein_mcp.daemon.endpoint import BuildInfo
from tests.klein_mcp.machines import LIES, liar, listening
from tests.real_server import PATIENCE, RealServer, engine_process, real_server
from tests.soak.test_soak import resident
from tests.tool_calls import call

pytestmark = pytest.mark.anyio

MOST = 120_000_000 // 1024
"""KiB, as Linux counts them."""


@pytest.mark.slow
async def test_two_engines_behind_one_daemon(tmp_path: Path, server: RealServer):
    token = tmp_path / "token"
    token.write_text("a-token-of-this-test\n")
    with ExitStack() as stack:
        engines = dict(stack.enter_context(engine_process(tmp_path / name, token)) for name in ("one", "two"))
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

            words = ("paint", "an apple on a yellow background", "--seed", "7", "--device", "cuda", "-o", "apple.png")
            elsewhere = {"KLEIN_ENGINE": ",".join(engines), "KLEIN_ENGINE_TOKEN_FILE": str(token)}
            painted = place.run("-m", "klein_mcp", *words, cwd=tmp_path, **elsewhere)
            assert "--device has no effect" in painted.stderr, "there is no such device here, and none was needed"
            assert pixels_of({"path": tmp_path / "apple.png"}) == pixels_of(first)

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


@pytest.mark.crash
async def test_engine_killed_mid_job_costs_nothing_and_comes_back(tmp_path: Path, server: RealServer):
    token = tmp_path / "token"
    token.write_text("a-token-of-this-test\n")
    with ExitStack() as stack:
        engines = dict(stack.enter_context(engine_process(tmp_path / name, token)) for name in ("one", "two"))
        place = stack.enter_context(real_server(tmp_path / "home"))
        remote = place.stdio(KLEIN_ENGINE=",".join(engines), KLEIN_ENGINE_TOKEN_FILE=str(token))
        async with Client(remote) as client, Client(server.stdio()) as local:
            first = await call(client, "generate_image", prompt="an apple on a yellow background", seed=7)
            edit = {"image": first["image"], "prompt": "make the background pink", "seed": 7}
            await call(client, "edit_image", **edit)
            (owner,) = await used_by(client, "edit_image", **{**edit, "seed": 9})

            # Large enough to be met in the middle: seconds instead of a tenth of one.
            large = {"prompt": "an apple on a yellow background", "seed": 8, "width": 1024, "height": 1024}
            answers = []
            victim = ""
            async with anyio.create_task_group() as tasks:

                async def paint() -> None:
                    answers.append(await call(client, "generate_image", **large))

                tasks.start_soon(paint)
                victim = await running_engine(client)
                engines[victim].kill()
            assert engines[victim].wait() == -signal.SIGKILL
            assert victim in (place.home / "daemon.log").read_text(), "the daemon noticed"
            expected = await call(local, "generate_image", **large)
            assert pixels_of(answers[0]) == pixels_of(expected), "the retry makes the same bytes"

            stack.enter_context(engine_process(tmp_path / "back", token, int(victim.rpartition(":")[2])))
            if victim != owner:  # the other one's turn, so that the lineage has to move, and to return
                engines[owner].kill()
                stack.enter_context(engine_process(tmp_path / "owner", token, int(owner.rpartition(":")[2])))
            with anyio.fail_after(PATIENCE):
                seed = 20
                while await used_by(client, "edit_image", **{**edit, "seed": seed}) != [owner]:
                    seed += 1


@pytest.mark.crash
async def test_liar_and_intruder_among_engines_do_no_harm(tmp_path: Path, server: RealServer):
    token, other = tmp_path / "token", tmp_path / "other"
    token.write_text("a-token-of-this-test\n")
    other.write_text("a-token-of-somebody-else\n")
    with ExitStack() as stack:
        honest, _ = stack.enter_context(engine_process(tmp_path / "honest", token))
        intruder, _ = stack.enter_context(engine_process(tmp_path / "intruder", other))
        build = BuildInfo.read()
        liars = [stack.enter_context(listening(liar(lie, token.read_text().strip(), build))) for lie in LIES.values()]
        place = stack.enter_context(real_server(tmp_path / "home"))
        urls = ",".join([honest, intruder, *liars])
        remote = place.stdio(KLEIN_ENGINE=urls, KLEIN_ENGINE_TOKEN_FILE=str(token))
        async with Client(remote) as client, Client(server.stdio()) as local:
            request = {"prompt": "an apple on a yellow background", "seed": 7}
            expected = pixels_of(await call(local, "generate_image", **request))
            for _ in range(6):
                assert pixels_of(await call(client, "generate_image", **request)) == expected
            status = await call(client, "engine_status")
    words = {node["url"]: node["error"] for node in status["engine"]["nodes"]}
    assert words[honest] == ""
    assert "another token" in words[intruder]


async def running_engine(client: Client) -> str:
    """Wait until an engine runs a job of the daemon. Return its address."""
    with anyio.fail_after(PATIENCE):
        while True:
            status = await call(client, "engine_status")
            for node in status["engine"]["nodes"]:
                if node["running"]:
                    return node["url"]
    raise AssertionError("unreachable: fail_after raises")


async def used_by(client: Client, tool: str, **arguments: object) -> list[str]:
    """Call a tool. Return the engines whose cache it hit."""

    async def hits() -> dict[str, int]:
        status = await call(client, "engine_status")
        return {node["url"]: node["hits"] for node in status["engine"]["nodes"]}

    before = await hits()
    await call(client, tool, **arguments)
    return [url for url, count in (await hits()).items() if count > before[url]]


def pixels_of(payload: dict[str, object]) -> bytes:
    from tests.images import pixels

    return pixels(Path(str(payload["path"])).read_bytes()).tobytes()
