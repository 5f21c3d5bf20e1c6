"""The stdio front end as a process: quick to answer, quick to end, and a whole session through it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from mcp import Client
from mcp_types import CallToolResult

from tests.images import file, pixels, scene
from tests.klein_mcp.test_codec import HOSTILE
from tests.real_server import PATIENCE, RealServer
from tests.tool_calls import complaint, kinds, line, preview

# -- coming and going --------------------------------------------------------------------------------------------


class FrontEnd:
    """The process itself, spoken to by hand."""

    def __init__(self, server: RealServer) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "klein_mcp"],
            env=server.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        hello = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "hand", "version": "1"}}
        self.ask(1, "initialize", hello)
        self.hear()
        self.tell("notifications/initialized")

    def tell(self, method: str, params: Any = None) -> None:
        self._write({"jsonrpc": "2.0", "method": method, **({"params": params} if params else {})})

    def ask(self, number: int, method: str, params: Any) -> None:
        self._write({"jsonrpc": "2.0", "id": number, "method": method, "params": params})

    def send_line(self, line: bytes) -> None:
        assert self._process.stdin
        self._process.stdin.flush()
        self._process.stdin.buffer.write(line + b"\n")  # type: ignore[attr-defined]
        self._process.stdin.buffer.flush()  # type: ignore[attr-defined]

    def hear(self) -> Any:
        assert self._process.stdout
        return json.loads(self._process.stdout.readline())

    def start_painting(self) -> None:
        arguments = {"prompt": "a red circle", "count": 4, "model": "nano"}
        params = {"name": "generate_image", "arguments": arguments, "_meta": {"progressToken": 1}}
        self.ask(2, "tools/call", params)
        while "step 1 of" not in self.hear()["params"]["message"]:
            pass

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def left(self) -> int:
        """Return the exit code, once the process has ended."""
        try:
            return self._process.wait(PATIENCE)
        finally:
            self._process.kill()
            for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
                if stream:
                    stream.close()

    def _write(self, message: Any) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(message) + "\n")


LEAVING = [("end of file", 0), (signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, 128 + signal.SIGINT)]


def leave(front_end: FrontEnd, how: Any) -> int:
    front_end.close() if how == "end of file" else front_end.send(how)
    return front_end.left()


@pytest.mark.parametrize(("how", "code"), LEAVING, ids=["end of file", "SIGTERM", "SIGINT"])
def test_idle_front_end_ends(server: RealServer, how: Any, code: int):
    assert leave(FrontEnd(server), how) == code


@pytest.mark.parametrize(("how", "code"), LEAVING, ids=["end of file", "SIGTERM", "SIGINT"])
def test_busy_front_end_ends_and_its_job_is_cancelled(server: RealServer, studio: "Studio", how: Any, code: int):
    before = studio.status()["queue"]["done"]
    front_end = FrontEnd(server)
    front_end.start_painting()
    assert leave(front_end, how) == code
    deadline = time.monotonic() + PATIENCE
    while studio.status()["queue"]["running"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert studio.status()["queue"]["done"] - before < 4  # of four images


def test_nothing_heavy_is_imported_before_the_first_image():
    code = """
import sys, anyio
from mcp import Client
from klein_mcp.mcp_server import stdio
from klein_mcp.daemon.client import DaemonClient
from klein_mcp.mcp_server.server import create_server
from klein_mcp.jobs.service import Service
from klein_mcp.settings import Settings
async def main():
    settings = Settings.load({"KLEIN_HOME": "/nonexistent"})
    async with Client(create_server(Service(settings, DaemonClient(settings)))) as client:
        assert (await client.list_tools()).tools
anyio.run(main)
print([name for name in ("numpy", "PIL", "torch", "transformers", "jinja2") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[]", done.stderr


# -- a whole session --------------------------------------------------------------------------------------------


class Studio:
    """One client of one real front end, for as long as these tests last."""

    def __init__(self, portal: BlockingPortal, client: Client, project: Path, server: RealServer) -> None:
        self._portal = portal
        self._client = client
        self.project = project
        self.server = server

    def result(self, tool: str, **arguments: Any) -> CallToolResult:
        return self._portal.call(lambda: self._client.call_tool(tool, arguments))

    def call(self, tool: str, **arguments: Any) -> dict[str, Any]:
        return line(self.result(tool, **arguments))

    def refused(self, tool: str, **arguments: Any) -> str:
        result = self.result(tool, **arguments)
        assert result.is_error
        return complaint(result)

    def read(self, uri: str) -> Any:
        return self._portal.call(lambda: self._client.read_resource(uri)).contents

    def status(self) -> dict[str, Any]:
        return self.call("engine_status")

    def terminal(self, *command: str) -> Any:
        """A command of `klein-mcp` in the same home, as JSON."""
        done = self.server.run("-m", "klein_mcp", *command, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


def image(payload: dict[str, Any]) -> Any:
    return pixels(Path(payload["path"]).read_bytes())


@pytest.fixture(scope="module")
def studio(server: RealServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    project = tmp_path_factory.mktemp("project")
    roots = {"KLEIN_WRITE_ROOTS": str(project), "KLEIN_READ_ROOTS": str(project), "KLEIN_ALLOW_URLS": "1"}
    with start_blocking_portal() as portal:
        front_end: AbstractContextManager[Client] = portal.wrap_async_context_manager(Client(server.stdio(**roots)))
        with front_end as client:
            studio = Studio(portal, client, project, server)
            studio.call("generate_image", prompt="a red circle on a blue background")  # the engine is up from here on
            yield studio


def test_result_is_a_line_a_preview_and_a_link(studio: Studio):
    result = studio.result("generate_image", prompt="a red circle on a blue background", seed=3)
    assert kinds(result) == ["text", "image", "resource_link"]
    payload = line(result)
    assert payload["seed"] == "3"
    assert len(result.content[0].text) <= 180  # type: ignore[union-attr]
    assert preview(result).shape == image(payload).shape


def test_each_image_of_a_sheet_equals_the_one_generated_alone(studio: Studio):
    result = studio.result("generate_image", prompt="a green square", count=4, seed=20)
    assert kinds(result) == ["text", "image", *["resource_link"] * 4]
    payload = line(result)["images"]
    assert [one["seed"] for one in payload] == ["20", "21", "22", "23"]
    alone = studio.call("generate_image", prompt="a green square", seed=22)
    assert (image(payload[2]) == image(alone)).all()


def test_aspect_ratio_and_show_are_honoured(studio: Studio):
    wide = studio.result("generate_image", prompt="a red circle", aspect_ratio="16:9", show="link")
    assert kinds(wide) == ["text", "resource_link"]
    width, height = line(wide)["size"]
    assert width / height == pytest.approx(16 / 9, rel=0.15)
    assert kinds(studio.result("generate_image", prompt="a red circle", show="none")) == ["text"]


def test_edit_keeps_size_and_every_byte_outside_the_region(studio: Studio):
    photo = studio.project / "photo.png"
    photo.write_bytes(file(scene(301, 187)))
    whole = studio.call("edit_image", image=str(photo), prompt="make the background green")
    assert whole["size"] == [301, 187]
    part = studio.call("edit_image", image=str(photo), prompt="a yellow circle", region=[120, 60, 90, 80])
    different = np.any(image(part) != scene(301, 187), axis=2)
    assert part["changed"]["share"] > 0
    assert part["changed"]["kept"]
    different[60:140, 120:210] = False
    assert not different.any()
    mask = np.zeros((187, 301, 3), np.uint8)
    mask[20:60, 20:90] = 255
    (studio.project / "mask.png").write_bytes(file(mask))
    masked = studio.call("edit_image", image=str(photo), prompt="x", mask=str(studio.project / "mask.png"))
    different = np.any(image(masked) != scene(301, 187), axis=2)
    assert not different[mask[..., 0] == 0].any()
    message = studio.refused("edit_image", image=masked["image"], prompt="x", mask="last~9", region=[0, 0, 9, 9])
    assert "mask" in message


def test_images_are_found_by_words_handle_resource_and_last(studio: Studio):
    payload = studio.call("generate_image", prompt="a purple triangle, the one I look for")
    edited = studio.call("edit_image", image="last", prompt="make it yellow")
    found = studio.call("list_images", search="the one I look for")["images"]
    assert [one["image"] for one in found] == [payload["image"]]
    assert studio.call("view_image", image="last~1")["image"] == payload["image"]
    (content,) = studio.read(f"klein://images/{edited['image']}/recipe")
    assert json.loads(content.text)["parents"] == [payload["image"]]


@pytest.mark.anyio
@pytest.mark.parametrize("mode", ["legacy", "auto"])
async def test_client_is_notified_of_a_new_image(studio: Studio, mode: str):
    heard: list[str] = []

    async def hear(message: Any) -> None:
        heard.append(type(message).__name__)

    async with Client(studio.server.stdio(), mode=mode, message_handler=hear) as client:
        if mode == "legacy":
            await client.call_tool("generate_image", {"prompt": "a red circle"})
        else:
            async with client.listen(resources_list_changed=True) as events:
                await client.call_tool("generate_image", {"prompt": "a red circle"})
                heard.append(type(await anext(events)).__name__)
    assert ("ResourceListChangedNotification" if mode == "legacy" else "ResourcesListChanged") in heard


def test_saved_images_keep_their_recipe_in_every_format(studio: Studio):
    payload = studio.call("generate_image", prompt="a red circle", seed=8)
    for name in ("out/hero.png", "out/hero.jpg", "out/hero.webp"):
        saved = studio.call("save_image", image=payload["image"], path=name)
        info = studio.terminal("info", saved["saved"])
        assert (info["in_library"], info["recipe"]["seed"]) == (payload["image"], "8")
        assert "exists" in studio.refused("save_image", image=payload["image"], path=name)
    bare = studio.call("save_image", image=payload["image"], path="out/bare.webp", strip_metadata=True)
    assert studio.terminal("info", bare["saved"])["made_by_klein_mcp"] is False
    assert "outside the folders" in studio.refused("save_image", image=payload["image"], path="/tmp/escape.png")


def test_replayed_chain_gives_the_same_pixels(studio: Studio):
    first = studio.call("generate_image", prompt="a red circle on a blue background", seed=1)
    second = studio.call("edit_image", image="last", prompt="make the background green", seed=2)
    third = studio.call("edit_image", image="last", prompt="make the circle yellow", seed=3, region=[32, 32, 64, 64])
    again = studio.terminal("replay", third["image"])
    assert len(again) == 3
    for old, new in zip((first, second, third), again, strict=True):
        assert (image(old) == image(new)).all()
    base = studio.call("generate_image", prompt="a white square on black", seed=9)
    onto = studio.terminal("replay", third["image"], "--onto", base["image"], "--seed", "5")
    assert [one["recipe"]["seed"] for one in onto] == ["5", "5"]
    assert onto[0]["parents"] == [base["image"]]


def test_terminal_lists_images_made_by_tools(studio: Studio):
    payload = studio.call("generate_image", prompt="a star for the list")
    assert studio.terminal("list", "--search", "star for the list")[0]["image"] == payload["image"]


def test_hostile_files_are_one_line_each_and_the_server_survives(studio: Studio):
    for name, (data, message) in HOSTILE.items():
        path = studio.project / f"hostile {name}.png"
        path.write_bytes(data)
        payload = studio.refused("edit_image", image=str(path), prompt="x")
        assert path.name in payload
        assert message in payload
    os.mkfifo(studio.project / "fifo.png")
    (studio.project / "out.png").symlink_to("/etc/hostname")
    for path in (studio.project / "fifo.png", studio.project / "out.png", "/dev/zero", "/etc/hostname"):
        studio.refused("view_image", image=str(path))
    assert studio.status()["running"]
    assert studio.call("generate_image", prompt="a red circle")["image"]


def test_private_addresses_are_refused_with_one_line(studio: Studio):
    for url in (
        "http://example.com/x.png",
        "https://localhost/x.png",
        "https://127.0.0.1:1/x.png",
        "https://2130706433/x.png",
        "https://0x7f.1/x.png",
        "https://[::1]/x.png",
        "https://[::ffff:10.0.0.1]/x.png",
        "https://169.254.169.254/latest/meta-data",
    ):
        payload = studio.refused("view_image", image=url)
        assert "not https" in payload or "not on the public internet" in payload or "is not known" in payload


@pytest.mark.bench
def test_warm_edit_takes_less_than_a_second(studio: Studio):
    """Measures the median of twenty edits, observed 0.3 s on two cores."""
    studio.call("generate_image", prompt="a red circle")
    seconds = []
    for _ in range(20):
        began = time.monotonic()
        studio.call("edit_image", image="last", prompt="make the background green")
        seconds.append(time.monotonic() - began)
    assert sorted(seconds)[10] < 1.0


def test_lines_that_cannot_be_parsed_are_answered(server: RealServer):
    front_end = FrontEnd(server)
    try:
        for raw, number, code in (
            (b"hello", None, -32700),
            (b"[]", None, -32600),
            (b'{"id": 5, "method": 1}', 5, -32600),
        ):
            front_end.send_line(raw)
            answer = front_end.hear()
            assert (answer["id"], answer["error"]["code"]) == (number, code)
        front_end.send_line(b'\xef\xbb\xbf{"jsonrpc": "2.0", "id": 6, "method": "ping"}')
        assert front_end.hear() == {"jsonrpc": "2.0", "id": 6, "result": {}}
        arguments = b'{"reference": "a cat \\ud83d"}'
        call = b'{"jsonrpc": "2.0", "id": 8, "method": "tools/call", "params": {"name": "view_image", "arguments": %s}}'
        front_end.send_line(call % arguments)
        assert front_end.hear()["id"] == 8
    finally:
        front_end.close()
        front_end.left()
