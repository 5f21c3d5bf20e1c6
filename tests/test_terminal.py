"""What a person sees in a terminal, and what a script sees where there is none."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mcp import Client

from examples import configurations
from klein_mcp.cli import terminal
from tests.real_server import Living
from tests.tool_calls import call

clients = {client.title: client.read for client in configurations.CLIENTS}
pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")


def in_terminal(living: Living, *words: str, cwd: Path, typed: bytes = b"", **more: str) -> tuple[int, str, str]:
    """Exit code, what a terminal on stderr and stdin showed, and stdout, which goes into a pipe."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "klein_mcp", *words],
        cwd=cwd,
        env=living.environment(TERM="xterm", COLUMNS="120", **more),
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # Linux says so when the other end is closed
            chunk = b""
        if not chunk:
            break
        shown += chunk
        if typed and b"Ctrl-D" in shown:
            os.write(ours, typed)
            typed = b""
    os.close(ours)
    out = process.stdout.read().decode() if process.stdout else ""
    return process.wait(60), shown.decode(errors="replace"), out


def test_paint_shows_a_bar_on_a_terminal_and_leaves_stdout_to_the_result(living: Living, tmp_path: Path) -> None:
    code, shown, out = in_terminal(
        living, "paint", "a red circle", "--seed", "1", "--json", "-o", "a.png", cwd=tmp_path
    )
    assert code == 0, shown
    assert "loading nano" in shown
    assert "━" in shown
    assert json.loads(out)["seed"] == "1"


def test_demo_says_what_it_waits_for_and_keeps_to_no_color(living: Living, tmp_path: Path) -> None:
    code, shown, out = in_terminal(living, "demo", "--out", "pictures", cwd=tmp_path, NO_COLOR="1")
    assert code == 0, shown
    assert "generate_image: " in shown
    assert "\x1b[32m" not in shown
    assert "\x1b[91m" not in shown
    assert "\x1b" not in out
    assert out.count(" s  pictures/") == 4


def test_without_a_terminal_there_are_no_bars_and_no_escapes(living: Living, tmp_path: Path) -> None:
    ran = living.run("-m", "klein_mcp", "demo", "--out", "pictures", cwd=tmp_path)
    assert ran.returncode == 0
    assert "\x1b" not in ran.stdout + ran.stderr
    assert ran.stderr == ""


def test_demo_says_that_the_model_was_loaded_only_when_it_was(living: Living, tmp_path: Path) -> None:
    living.run("-m", "klein_mcp", "stop")
    cold, warm = (living.run("-m", "klein_mcp", "demo", cwd=tmp_path).stdout for _ in range(2))
    assert "painted by nano; the first call loaded it\n" in cold
    assert "painted by nano\n" in warm


def test_the_server_typed_by_hand_says_what_it_is_and_how_to_add_it(living: Living, tmp_path: Path) -> None:
    code, shown, out = in_terminal(living, cwd=tmp_path, typed=b"\x04")
    assert code == 0
    assert "is an MCP server" in shown
    (line,) = re.findall(r"claude mcp add .*", shown)
    told = configurations.COMMANDS["Claude Code"][1](line)
    assert (told.command, *told.args) == (sys.executable, "-m", "klein_mcp"), "as it was started, by its whole path"
    (line,) = re.findall(r'\{"mcpServers".*', shown)
    assert clients["Claude Desktop"](line) == told
    assert out == ""


@pytest.mark.parametrize(
    ("started", "told"),
    [
        ("/home/me/.cache/uv/archive-v0/a1B2/bin/klein-mcp", ["/usr/bin/uvx", "klein-mcp"]),
        ("/home/me/.local/bin/klein-mcp", ["/home/me/.local/bin/klein-mcp"]),
    ],
)
def test_a_place_that_will_not_last_is_not_told(monkeypatch: pytest.MonkeyPatch, started: str, told: list[str]) -> None:
    """`uvx klein-mcp` without an installation runs out of uv's cache."""
    monkeypatch.setattr(sys, "argv", [started])
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert terminal.lasting() == told


def test_started_by_a_client_it_says_nothing_of_the_kind(living: Living) -> None:
    ran = living.run("-m", "klein_mcp")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_a_misspelt_variable_is_a_line_of_its_log(living: Living) -> None:
    ran = living.run("-m", "klein_mcp", KLEIN_MODLE="nano")
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (0, "", 1)
    assert "KLEIN_MODLE is no setting and changes nothing. Did you mean KLEIN_MODEL?" in ran.stderr


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["paint"], 2, "the following arguments are required: PROMPT"),
        (["pain"], 2, "invalid choice: 'pain'"),
        (["paint", " "], 1, "The prompt is empty."),
        (["paint", "a cat", "--size", "big"], 2, "'big' is not a size like 1024x768"),
        (["paint", "a cat", "--size", "63x64"], 2, "'63x64' has a side that is not 64 to 2048 pixels"),
        (["paint", "a cat", "--size", "64x2049"], 2, "'64x2049' has a side that is not 64 to 2048 pixels"),
        (["paint", "a cat", "-o", "cat.gif"], 2, "'cat.gif' does not end in .png"),
        (["paint", "a cat", "-o", "full.png/cat.png"], 1, "full.png/cat.png cannot be written: File exists."),
        (["paint", "a cat", "-o", "folder.png"], 1, "folder.png cannot be written: it is a folder."),
        (["paint", "a cat", "--ref", "full.png"], 1, "full.png is not a picture that can be read."),
        (["paint", "a cat", "--guidance", "nan"], 1, "guidance is nan; it must lie in 0 … 100."),
        (["paint", "a cat", "--device", "cpu:one"], 1, "device is 'cpu:one'; this machine has: cpu"),
        (["paint", "a cat", "--model", "klein-4d"], 1, "Did you mean klein-4b?"),
        (["paint", "a cat", "--ref", "no.png"], 1, "The reference no.png cannot be read: No such file or directory."),
        (["info", "zzzzzz"], 1, 'There is no picture "zzzzzz". klein-mcp list shows all.'),
        (["replay", "zzzzzz"], 1, 'There is no picture "zzzzzz". klein-mcp list shows all.'),
        (["info", "no.png"], 1, 'There is no file or handle "no.png". klein-mcp list shows handles.'),
        (["replay", "last"], 1, "last is for MCP clients. klein-mcp list shows handles."),
        (["prune"], 2, "say --older-than 30d"),
        (["list", "--limit", "0"], 2, "'0' is not 1 or more"),
        (["list", "--limit", "-1"], 2, "'-1' is not 1 or more"),
        (["list", "--nope"], 2, "usage: klein-mcp list"),
        (["--nope"], 2, "usage: klein-mcp [-h]"),
        (["demo", "--out", "full.png"], 1, "full.png cannot be a folder for the pictures: File exists. Name another"),
        (["serve", "--token-file", "no"], 1, "The token file no cannot be read: No such file or directory. Without"),
    ],
)
def test_exit_codes_are_as_the_readme_says(
    living: Living, tmp_path: Path, words: list[str], code: int, said: str
) -> None:
    (tmp_path / "full.png").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    ran = living.run("-m", "klein_mcp", *words, cwd=tmp_path)
    assert ran.returncode == code, ran.stderr
    assert said.lower() in ran.stderr.lower()
    assert ran.stdout == ""
    if code == 1:
        assert ran.stderr.count("\n") == 1


@pytest.mark.parametrize("seconds", [1.0, 2.0])
def test_interrupted_it_ends_with_130(living: Living, tmp_path: Path, seconds: float) -> None:
    command = [sys.executable, "-m", "klein_mcp", "paint", "a cat", "--steps", "200", "-o", str(tmp_path / "cat.png")]
    process = subprocess.Popen(command, env=living.environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert b"Traceback" not in (process.stderr.read() if process.stderr else b"")
    assert not (tmp_path / "cat.png").exists()


@pytest.mark.anyio
async def test_status_is_a_few_lines_for_a_person(living: Living) -> None:
    assert living.run("-m", "klein_mcp", "stop").returncode == 0
    said = living.run("-m", "klein_mcp", "status")
    assert (said.returncode, said.stdout) == (0, "not running; the first call that needs a picture starts it\n")
    async with Client(living.stdio()) as client:
        await call(client, "generate_image", prompt="a red circle", seed=1, width=128, height=128)
    lines = living.run("-m", "klein_mcp", "status").stdout.splitlines()
    told = dict(line.split(": ", 1) for line in lines)
    assert list(told) == [
        "running", "queue", "device", "model", "installed", "remembered", "seconds per picture, nano", "log"
    ]  # fmt: skip
    assert re.fullmatch(r"version \S+, pid \d+, since \d{4}-\d\d-\d\d \d\d:\d\d", told["running"])
    assert told["queue"] == "idle, 0 of 32 waiting; 1 done, 0 failed"
    assert "nano (Apache-2.0)" in told["installed"]
    assert told["model"].startswith("nano, all on the device")
    assert re.match(r"128×128 (0\.0*)?[1-9][\d.]*$", told["seconds per picture, nano"])
