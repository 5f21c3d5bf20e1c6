"""Examples and client configurations, run and read as users would."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from mcp import Client
from PIL import Image

from examples import configurations as clients
from examples import http_client
from examples.configurations import Launch
from klein_mcp.jobs.manager import JobManager
from klein_mcp.jobs.service import Service
from tests.embedded import SIDE
from tests.fakes import FakeExecutor
from tests.real_server import RealServer, wait_until_listening

EXAMPLES = Path(__file__).parents[1] / "examples"
LAUNCHES = [
    clients.LAUNCH,
    Launch("/home/me/my tools/klein-mcp"),
    Launch(r"C:\Users\me 😀\.venv\Scripts\klein-mcp.exe", ("--x", 'a "b"'), {"KLEIN_HOME": "my pictures=here"}),
]

SAYS = {"command": "/opt/klein-mcp", "args": ["serve"], "env": {"KLEIN_MODEL": "nano"}}
MANUALS: dict[str, dict[str, object]] = {
    "Claude Desktop": {"mcpServers": {"klein": SAYS}},
    "Claude Code": {"mcpServers": {"klein": {"type": "stdio", **SAYS}}},
    "VS Code": {"servers": {"klein": {"type": "stdio", **SAYS}}},
    "Cursor": {"mcpServers": {"klein": SAYS}},
    "Codex": {"mcp_servers": {"klein": {**SAYS, "startup_timeout_sec": 60, "tool_timeout_sec": 120}}},
    "Gemini CLI": {"mcpServers": {"klein": {**SAYS, "timeout": 120_000}}},
    "Goose": {
        "extensions": {
            "klein": {
                "type": "stdio",
                "name": "klein",
                "enabled": True,
                "cmd": SAYS["command"],
                "args": SAYS["args"],
                "envs": SAYS["env"],
                "timeout": 300,
            }
        }
    },
    "Zed": {"context_servers": {"klein": SAYS}},
    "LM Studio": {"mcpServers": {"klein": SAYS}},
}
"""What each client's manual shows for such a server: a reader that shares a writer's mistake would not see it."""


@pytest.mark.parametrize("client", clients.CLIENTS, ids=lambda client: client.title)
def test_configuration_has_form_of_its_client_s_manual(client: clients.Client) -> None:
    load = {"json": json.loads, "toml": tomllib.loads, "yaml": yaml.safe_load}[client.file.rsplit(".", 1)[1]]
    launch = Launch("/opt/klein-mcp", ("serve",), {"KLEIN_MODEL": "nano"})
    assert load(client.write(launch)) == MANUALS[client.title]


def test_terminal_commands_have_form_of_their_client_s_manual() -> None:
    launch = Launch("/opt/klein-mcp", ("serve",), {"KLEIN_MODEL": "nano"})
    assert {title: write(launch) for title, (write, _) in clients.COMMANDS.items()} == {
        "Claude Code": "claude mcp add klein -e KLEIN_MODEL=nano -- /opt/klein-mcp serve",
        "Codex": "codex mcp add klein --env KLEIN_MODEL=nano -- /opt/klein-mcp serve",
    }


@pytest.mark.parametrize("launch", LAUNCHES, ids=["uvx", "a path with a space", "Windows with an environment"])
@pytest.mark.parametrize("client", clients.CLIENTS, ids=lambda client: client.title)
def test_client_s_configuration_reports_command_it_was_made_for(client: clients.Client, launch: Launch) -> None:
    assert client.read(client.write(launch)) == launch


@pytest.mark.parametrize("launch", LAUNCHES, ids=["uvx", "a path with a space", "Windows with an environment"])
def test_links_and_terminal_commands_say_it_too(launch: Launch) -> None:
    assert clients.read_vscode_link(clients.vscode_link(launch)) == launch
    assert clients.read_cursor_link(clients.cursor_link(launch)) == launch
    for write, read in clients.COMMANDS.values():
        assert read(write(launch)) == launch


def test_configurations_in_folder_all_start_same_command() -> None:
    read = {client.title: client.read((clients.FOLDER / client.file).read_text()) for client in clients.CLIENTS}
    assert set(read) == {
        "Claude Desktop",
        "Claude Code",
        "VS Code",
        "Cursor",
        "Codex",
        "Gemini CLI",
        "Goose",
        "Zed",
        "LM Studio",
    }
    assert set(map(repr, read.values())) == {repr(clients.LAUNCH)}
    assert {path.name for path in clients.FOLDER.iterdir()} == {client.file for client in clients.CLIENTS}


def test_links_have_form_their_programs_expect() -> None:
    assert clients.vscode_link(clients.LAUNCH).startswith(
        "https://vscode.dev/redirect?url=vscode%3Amcp%2Finstall%3F%257B"
    )
    assert re.fullmatch(
        r"https://cursor\.com/en/install-mcp\?name=klein&config=[\w%]+", clients.cursor_link(clients.LAUNCH)
    )


def test_configurations_can_be_printed_for_command_of_one_s_own(server: RealServer) -> None:
    ran = server.run("-m", "examples.configurations", "/opt/klein/bin/klein-mcp", cwd=EXAMPLES.parent)
    assert ran.returncode == 0
    for client in clients.CLIENTS:
        assert f"{client.title}: {client.where}" in ran.stdout
    assert "claude mcp add klein -- /opt/klein/bin/klein-mcp" in ran.stdout
    assert "uvx" not in ran.stdout


def test_command_of_configurations_is_program_of_package() -> None:
    project = tomllib.loads((EXAMPLES.parent / "pyproject.toml").read_text())["project"]
    assert Launch("uvx", (project["name"],)) == clients.LAUNCH
    assert project["name"] in project["scripts"], "uvx runs the program of the package's own name"


def images(folder: Path) -> dict[str, tuple[int, int]]:
    """Every image of a folder, opened."""
    found = {}
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as opened:
            opened.load()
            found[path.name] = opened.size
    return found


def test_iterate_keeps_calmest_draft_and_saves_edited_one(server: RealServer, tmp_path: Path) -> None:
    ran = server.run(str(EXAMPLES / "iterate.py"), str(tmp_path / "out"))
    assert ran.returncode == 0, ran.stderr
    assert re.search(r"kept draft [A-D], seed [1-4]\n", ran.stdout)
    assert images(tmp_path / "out") == {"iterated.png": (SIDE, SIDE)}
    with Image.open(tmp_path / "out" / "iterated.png") as opened:
        red, _, blue = opened.convert("RGB").getpixel((3, SIDE // 2))  # type: ignore[misc] - of RGB
    assert blue > red + 40, "the last background asked for is blue"


def test_library_paints_edits_and_composes_and_paints_what_server_does(server: RealServer, tmp_path: Path) -> None:
    """Same words, same seed: the demo's first image and the library's are one."""
    ran = server.run(str(EXAMPLES / "library.py"), str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    assert images(tmp_path) == dict.fromkeys(("apple.png", "both.png", "green.png"), (SIDE, SIDE))
    assert server.run("-m", "klein_mcp", "demo", "--out", str(tmp_path / "demo")).returncode == 0
    with Image.open(tmp_path / "apple.png") as ours, Image.open(tmp_path / "demo" / "1-apple.png") as expected:
        assert ours.convert("RGB").tobytes() == expected.convert("RGB").tobytes()


def test_timing_prints_row_of_speed_table(server: RealServer) -> None:
    ran = server.run(str(EXAMPLES / "timing.py"), "--calls", "2", "--model", "nano")
    assert ran.returncode == 0, ran.stderr
    assert re.fullmatch(rf"\| nano, {SIDE}×{SIDE} \|( \d+ ms \|){{3}} \d+\.\d s \|\n", ran.stdout)


@pytest.mark.slow
def test_http_client_shows_its_token_hears_progress_and_fetches_image(server: RealServer, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("a-word-that-is-long-enough-to-be-a-token\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/mcp"
    nobody = server.run(str(EXAMPLES / "http_client.py"), url, str(tmp_path))
    assert (nobody.returncode, nobody.stderr.count("\n")) == (1, 1), nobody.stderr
    assert f"no server answers at {url}" in nobody.stderr
    serve = [sys.executable, "-m", "klein_mcp", "serve", "--port", str(port), "--token-file", str(token)]
    with subprocess.Popen(
        serve, env=server.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as serving:
        try:
            wait_until_listening(port, serving)
            refused = server.run(str(EXAMPLES / "http_client.py"), url, str(tmp_path))
            known = "--token-file", str(token)
            lost = server.run(str(EXAMPLES / "http_client.py"), url.replace("mcp", "nothing"), str(tmp_path), *known)
            deep = server.run(str(EXAMPLES / "http_client.py"), url.replace("mcp", "healthz"), str(tmp_path), *known)
            wrong = server.run(str(EXAMPLES / "http_client.py"), url, str(tmp_path), "--token-file", "nowhere")
            ran = server.run(str(EXAMPLES / "http_client.py"), url, str(tmp_path), *known)
        finally:
            serving.terminate()
    assert ran.returncode == 0, ran.stderr
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "refuses calls without a token" in refused.stderr
    assert (wrong.returncode, wrong.stderr.count("\n")) == (1, 1)
    assert "nowhere cannot be read: No such file" in wrong.stderr
    assert (lost.returncode, lost.stderr.count("\n")) == (1, 1), lost.stderr
    assert "is no MCP server's address; klein-mcp serve has its own at /mcp" in lost.stderr
    assert (deep.returncode, deep.stderr.count("\n")) == (1, 1), deep.stderr
    assert "step 4 of 4" in ran.stdout
    (size,) = images(tmp_path).values()
    assert size == (SIDE, SIDE)


@pytest.mark.anyio
async def test_http_client_waits_for_job_and_reports_what_tool_says(
    client: Client, service: Service, jobs: JobManager, painter: FakeExecutor, tmp_path: Path
) -> None:
    service.settings = replace(service.settings, wait_budget=0)
    painter.seconds_per_step = 0.1
    await http_client.paint(client, tmp_path)
    assert list(images(tmp_path).values()) == [(128, 128)]
    assert [job.detached for job in await jobs.list()] == [True]
    with pytest.raises(RuntimeError, match="view_image: There is no image"):
        await http_client.call(client, "view_image", image="zzzzzz")


@pytest.mark.conformance
def test_typescript_example_compiles_and_saves_image(server: RealServer, tmp_path: Path) -> None:
    npm = shutil.which("npm") or pytest.skip("npm is not installed")
    folder = tmp_path / "typescript"
    shutil.copytree(EXAMPLES / "typescript", folder, ignore=shutil.ignore_patterns("node_modules", "build"))
    subprocess.run([npm, "install", "--silent", "--no-audit", "--no-fund"], cwd=folder, check=True, timeout=300)
    start = [npm, "start", "--silent", "--", str(tmp_path / "out"), sys.executable, "-m", "klein_mcp"]
    ran = subprocess.run(
        start, cwd=folder, env=server.environment(PATH=os.environ["PATH"]), capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "8 tools: generate_image, edit_image" in ran.stdout
    assert images(tmp_path / "out") == {"together.png": (SIDE, SIDE)}


def test_typescript_example_names_released_versions_only() -> None:
    package = json.loads((EXAMPLES / "typescript" / "package.json").read_text())
    for version in {**package["dependencies"], **package["devDependencies"]}.values():
        assert re.fullmatch(r"\d+\.\d+\.\d+", version)
