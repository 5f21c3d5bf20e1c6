"""Output in a terminal, and for scripts without one."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mcp import Client
from PIL import Image

from examples import configurations
from klein_mcp.cli import terminal
from tests.embedded import SIDE
from tests.real_server import PATIENCE, RealServer
from tests.tool_calls import call

clients = {client.title: client.read for client in configurations.CLIENTS}
pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")


def in_terminal(server: RealServer, *words: str, cwd: Path, typed: bytes = b"", **more: str) -> tuple[int, str, str]:
    """Return exit code, text on a terminal at stderr and stdin, and piped stdout."""
    terminal_end, child_end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "klein_mcp", *words],
        cwd=cwd,
        env=server.environment(TERM="xterm", COLUMNS="120", **more),
        stdin=child_end,
        stdout=subprocess.PIPE,
        stderr=child_end,
    )
    os.close(child_end)
    shown = b""
    while True:
        try:
            chunk = os.read(terminal_end, 65536)
        except OSError:  # on Linux, the other end is closed
            chunk = b""
        if not chunk:
            break
        shown += chunk
        if typed and b"Ctrl-D" in shown:
            os.write(terminal_end, typed)
            typed = b""
    os.close(terminal_end)
    out = process.stdout.read().decode() if process.stdout else ""
    return process.wait(PATIENCE), shown.decode(errors="replace"), out


def test_paint_shows_a_bar_on_stderr_and_the_result_on_stdout(server: RealServer, tmp_path: Path) -> None:
    code, shown, out = in_terminal(
        server, "paint", "a red circle", "--seed", "1", "--json", "-o", "a.png", cwd=tmp_path
    )
    assert code == 0, shown
    assert "loading nano" in shown
    assert "━" in shown
    assert json.loads(out)["seed"] == "1"


def test_paint_prints_how_it_read_prompt_and_reference(server: RealServer, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (96, 64), colour) for colour in ("yellow", "red")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    words = ("paint", "please add a kitten in the centre", "--ref", "moving.gif", "--seed", "1", "-o", "out.png")
    ran = server.run("-m", "klein_mcp", *words, "--json", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    facts, warning = json.loads(ran.stdout), "moving.gif has several frames; only the first one is used."
    assert (facts["width"], facts["height"]) == (96, 64)
    assert warning in facts["warnings"]
    assert {f"klein-mcp: {warning}", f"klein-mcp: read as: {facts['read_as']}"} <= set(ran.stderr.splitlines())


@pytest.mark.parametrize("words", [("--help",), ("list", "--json")])
def test_command_whose_reader_left_ends_quietly(tmp_path: Path, words: tuple[str, ...]) -> None:
    server = RealServer(tmp_path / "home")
    read, write = os.pipe()
    os.close(read)  # as `head` does once it has its lines
    command = [sys.executable, "-m", "klein_mcp", *words]
    ran = subprocess.run(
        command, stdout=write, stderr=subprocess.PIPE, env=server.environment(PYTHONUNBUFFERED=""), check=False
    )
    os.close(write)
    assert ran.returncode in (0, 141)  # argparse hides that its help was not written
    assert not ran.stderr


def test_painted_file_does_not_tell_where_its_reference_lies(server: RealServer, tmp_path: Path) -> None:
    folder = tmp_path / "of somebody whose name is nobody's business"
    folder.mkdir()
    Image.new("RGB", (128, 128), "yellow").save(folder / "mine.png")
    words = ("paint", "make the background green", "--ref", str(folder / "mine.png"), "--seed", "1", "-o", "out.png")
    ran = server.run("-m", "klein_mcp", *words, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    data = (tmp_path / "out.png").read_bytes()
    with Image.open(tmp_path / "out.png") as image:
        assert "klein-mcp" in image.info, "its recipe is in it"
        assert "nobody" not in str(image.info)
    assert b"nobody" not in data


def test_demo_shows_what_it_waits_for_and_honours_no_color(server: RealServer, tmp_path: Path) -> None:
    code, shown, out = in_terminal(server, "demo", "--out", "images", cwd=tmp_path, NO_COLOR="1")
    assert code == 0, shown
    assert "generate_image: " in shown
    assert "\x1b[32m" not in shown
    assert "\x1b[91m" not in shown
    assert "\x1b" not in out
    assert out.count(" s  images/") == 4


def test_without_a_terminal_there_are_no_bars_or_escapes(server: RealServer, tmp_path: Path) -> None:
    ran = server.run("-m", "klein_mcp", "demo", "--out", "images", cwd=tmp_path)
    assert ran.returncode == 0
    assert "\x1b" not in ran.stdout + ran.stderr
    assert ran.stderr == ""


@pytest.mark.slow
def test_demo_mentions_loading_only_if_the_model_was_loaded(server: RealServer, tmp_path: Path) -> None:
    server.run("-m", "klein_mcp", "stop")
    cold, warm = (server.run("-m", "klein_mcp", "demo", cwd=tmp_path).stdout for _ in range(2))
    assert "generated by nano; the first call loaded it\n" in cold
    assert "generated by nano\n" in warm


def test_server_in_a_terminal_explains_how_to_add_it(server: RealServer, tmp_path: Path) -> None:
    code, shown, out = in_terminal(server, cwd=tmp_path, typed=b"\x04")
    assert code == 0
    assert "is an MCP server" in shown
    (line,) = re.findall(r"claude mcp add .*", shown)
    launch = configurations.COMMANDS["Claude Code"][1](line)
    assert (launch.command, *launch.args) == (sys.executable, "-m", "klein_mcp"), "as it was started, by absolute path"
    (line,) = re.findall(r'\{"mcpServers".*', shown)
    assert clients["Claude Desktop"](line) == launch
    assert out == ""


@pytest.mark.parametrize(
    ("started", "command"),
    [
        ("/home/me/.cache/uv/archive-v0/a1B2/bin/klein-mcp", ["/usr/bin/uvx", "klein-mcp"]),
        ("/home/me/.local/bin/klein-mcp", ["/home/me/.local/bin/klein-mcp"]),
    ],
)
def test_command_in_a_temporary_cache_is_replaced_by_uvx(
    monkeypatch: pytest.MonkeyPatch, started: str, command: list[str]
) -> None:
    """`uvx klein-mcp` without an installation runs from uv's cache."""
    monkeypatch.setattr(sys, "argv", [started])
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert terminal.stable_command() == command


def test_commands_are_quoted_for_the_shell_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    assert terminal.shell_line(["/home/a b/klein-mcp", "stop"]) == "'/home/a b/klein-mcp' stop"
    monkeypatch.setattr(os, "name", "nt")
    line = terminal.shell_line([r"C:\Program Files\klein-mcp.exe", "stop"])
    monkeypatch.undo()
    assert line == r'"C:\Program Files\klein-mcp.exe" stop', "' is no quotation mark to Windows"


def test_server_started_by_a_client_prints_nothing(server: RealServer) -> None:
    ran = server.run("-m", "klein_mcp")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


@pytest.mark.skipif(os.name != "posix", reason="a shell's redirections")
@pytest.mark.parametrize(
    ("closed", "words", "code"),
    [
        ("<&-", "", 0),
        (">&-", "--version", 0),
        ("2>&-", "info nofile.png", 1),
        ("2>&-", "nonsense", 2),
        ("<&- >&- 2>&-", "list", 0),
    ],
)
def test_closed_streams_are_as_good_as_the_null_device(tmp_path: Path, closed: str, words: str, code: int) -> None:
    ran = subprocess.run(
        ["sh", "-c", f'exec "$0" -m klein_mcp {words} {closed}', sys.executable],
        env=RealServer(tmp_path).environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (code, "", "")


def test_misspelled_variable_is_one_log_line(server: RealServer) -> None:
    ran = server.run("-m", "klein_mcp", KLEIN_MODLE="nano")
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (0, "", 1)
    assert "KLEIN_MODLE is no setting and has no effect. Did you mean KLEIN_MODEL?" in ran.stderr


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["paint"], 2, "the following arguments are required: PROMPT"),
        (["piant"], 2, 'There is no command "piant". Did you mean paint?'),
        (["generate", "a cat"], 2, 'There is no command "generate". Did you mean paint?'),
        (["xyzzy"], 2, 'There is no command "xyzzy". The commands are serve, studio'),
        (["paint", " "], 1, "The prompt is empty."),
        (["paint", "a cat", "--size", "big"], 2, "'big' is not a size like 1024x768"),
        (["paint", "a cat", "--size", "63x64"], 2, "'63x64' has a side that is not 64 to 2048 pixels"),
        (["paint", "a cat", "--size", "64x2049"], 2, "'64x2049' has a side that is not 64 to 2048 pixels"),
        (["paint", "a cat", "-o", "cat.gif"], 2, "'cat.gif' does not end in .png"),
        (["paint", "a cat", "-o", "full.png/cat.png"], 1, "full.png/cat.png cannot be written: File exists."),
        (["paint", "a cat", "-o", "folder.png"], 1, "folder.png cannot be written: it is a folder."),
        (["paint", "a cat", "--ref", "full.png"], 1, "full.png is not an image that can be read."),
        (["paint", "a cat", "--guidance", "nan"], 1, "guidance is nan; it must lie in 0 … 100."),
        (["paint", "a cat", "--device", "cpu:one"], 1, "device is 'cpu:one'; this machine has: cpu"),
        (["paint", "a cat", "--model", "klein-4d"], 1, "Did you mean klein-4b?"),
        (["paint", "a cat", "--ref", "no.png"], 1, "The reference no.png cannot be read: No such file or directory."),
        (["info", "zzzzzz"], 1, 'There is no image "zzzzzz". klein-mcp list shows all.'),
        (["replay", "zzzzzz"], 1, 'There is no image "zzzzzz". klein-mcp list shows all.'),
        (["info", "no.png"], 1, 'There is no file or handle "no.png". klein-mcp list shows handles.'),
        (["replay", "last"], 1, "last is for MCP clients. klein-mcp list shows handles."),
        (["info", "folder.png"], 1, "folder.png cannot be read: it is a folder. Name an image's file or handle."),
        (["info", "a" * 300], 1, 'There is no file or handle "aaaa'),
        (["engine", "--token-file", "nope"], 1, "klein-mcp engine: --token-file nope: No such file or directory"),
        (
            ["paint", "a cat", "-o", "a" * 300 + ".png"],
            1,
            "cannot be written: File name too long. Name another with -o",
        ),
        (["paint", "a cat", "--model", "./folders"], 1, "folders has no model_index.json, nor is one klein file"),
        (["prune"], 2, "say --older-than 30d"),
        (["list", "--limit", "0"], 2, "'0' is not 1 or more"),
        (["list", "--limit", "-1"], 2, "'-1' is not 1 or more"),
        (["list", "--nope"], 2, "usage: klein-mcp list"),
        (["--nope"], 2, "usage: klein-mcp [-h]"),
        (["demo", "--out", "full.png"], 1, "full.png cannot be a folder for the images: File exists. Name another"),
        (["serve", "--token-file", "no"], 1, "The token file no cannot be used: No such file or directory. Without"),
    ],
)
def test_exit_codes_are_as_documented(
    server: RealServer, tmp_path: Path, words: list[str], code: int, message: str
) -> None:
    (tmp_path / "full.png").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "folders" / "klein-mcp-0").mkdir(parents=True)
    ran = server.run("-m", "klein_mcp", *words, cwd=tmp_path)
    assert ran.returncode == code, ran.stderr
    assert message.lower() in ran.stderr.lower()
    assert ran.stdout == ""
    if code == 1:
        assert ran.stderr.count("\n") == 1


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder that nobody can write, as on Linux")
def test_image_that_cannot_be_written_is_refused_before_work(server: RealServer) -> None:
    ran = server.run("-m", "klein_mcp", "paint", "a cat", "-o", "/proc/x.png")
    assert ran.returncode == 1
    assert ran.stderr.startswith("klein-mcp: /proc/x.png cannot be written: ")
    assert ran.stderr.count("\n") == 1


def test_replaced_image_is_named(server: RealServer, tmp_path: Path) -> None:
    words = ("-m", "klein_mcp", "paint", "a red circle", "--seed", "1", "-o", "a.png")
    first, second = (server.run(*words, cwd=tmp_path) for _ in range(2))
    assert "replaced" not in first.stdout
    assert second.stdout.endswith("(replaced the file that was there)\n")
    assert json.loads(server.run(*words, "--json", cwd=tmp_path).stdout)["replaced"] is True


@pytest.mark.parametrize("moment", ["starting the engine", "step"])
def test_paint_interrupted_ends_with_130(server: RealServer, tmp_path: Path, moment: str) -> None:
    """SIGINT while the libraries are imported, and between two steps."""
    terminal_end, child_end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "klein_mcp", "paint", "a cat", "--steps", "200", "-o", str(tmp_path / "cat.png")],
        env=server.environment(TERM="xterm", COLUMNS="120"),
        stderr=child_end,
        stdout=subprocess.PIPE,
    )
    os.close(child_end)
    shown = read_until(terminal_end, moment.encode())
    process.send_signal(signal.SIGINT)
    shown += read_until(terminal_end, None)
    os.close(terminal_end)
    assert process.wait(PATIENCE) == 130, shown.decode(errors="replace")
    assert b"Traceback" not in shown
    assert not (tmp_path / "cat.png").exists()


def read_until(terminal_end: int, marker: bytes | None) -> bytes:
    """Read a terminal until `marker` appears, or to its end."""
    shown = b""
    while marker is None or marker not in shown:
        try:
            chunk = os.read(terminal_end, 65536)
        except OSError:  # on Linux, the other end is closed
            chunk = b""
        if not chunk:
            assert marker is None, f"ended without {marker!r}: {shown.decode(errors='replace')}"
            break
        shown += chunk
    return shown


@pytest.mark.anyio
async def test_status_prints_a_few_lines(server: RealServer) -> None:
    assert server.run("-m", "klein_mcp", "stop").returncode == 0
    idle = server.run("-m", "klein_mcp", "status")
    assert (idle.returncode, idle.stdout) == (0, "not running; the first call that needs an image starts it\n")
    async with Client(server.stdio()) as client:
        await call(client, "generate_image", prompt="a red circle", seed=1, width=128, height=128)
    lines = server.run("-m", "klein_mcp", "status").stdout.splitlines()
    facts = dict(line.split(": ", 1) for line in lines)
    assert list(facts) == [
        "running", "queue", "device", "model", "speed", "installed", "cache", "seconds per image, nano", "log"
    ]  # fmt: skip
    assert re.fullmatch(r"version \S+, pid \d+, since \d{4}-\d\d-\d\d \d\d:\d\d", facts["running"])
    assert facts["queue"] == "idle, 0 of 32 waiting; 1 done, 0 failed"
    assert "nano (Apache-2.0)" in facts["installed"]
    assert facts["model"].startswith("nano, all on the device")
    assert re.match(rf"{SIDE}×{SIDE} (0\.0*)?[1-9][\d.]*$", facts["seconds per image, nano"])
    # An engine that runs can be ended whatever has become of the settings since.
    (server.home / "config.toml").write_text("model = \n")
    try:
        assert server.run("-m", "klein_mcp", "status").returncode == 1
        stopped = server.run("-m", "klein_mcp", "stop", KLEIN_MEMORY="plenty")
    finally:
        (server.home / "config.toml").unlink()
    assert (stopped.returncode, stopped.stdout) == (0, "stopped\n"), stopped.stderr
