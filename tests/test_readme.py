"""The README cannot lie: its tables are made from code, its images by the program, its commands run here."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples import configurations, make
from klein_mcp import settings
from klein_mcp.cli import main
from klein_mcp.images.provenance import read
from tests.real_server import PATIENCE, RealServer, wait_until_listening

ROOT = Path(__file__).parents[1]
README = make.README.read_text(encoding="utf-8")
UNTESTED = ("needs a GPU", "needs Docker", "downloads some gigabytes")
"""What a command's comment says when no test can run it."""


@pytest.mark.parametrize("path", make.PARTS, ids=lambda path: path.name)
def test_each_table_is_as_code_makes_it(path: Path) -> None:
    """If not: python -m examples.make."""
    assert path.read_text(encoding="utf-8") == make.made(path)


DOCS = {path.name: path.read_text(encoding="utf-8") for path in sorted(make.DOCS.glob("*.md"))}
PAGES = "\n".join((README, *DOCS.values()))
"""Everything a user reads, the front page first."""


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGES, re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """Every line of every ```sh block."""
    return [line for block in blocks("sh") for line in block.splitlines() if line.strip()]


def test_readme_names_the_two_commands_that_the_check_runs() -> None:
    section = README.split("## Try it without installing")[1].split("\n## ")[0]
    lines = [line.split("#")[0].strip() for line in section.splitlines() if line.startswith("python3 dev.py")]
    assert lines == ["python3 dev.py demo", "python3 dev.py test"]
    check = (ROOT / ".ci" / "run").read_text()
    assert re.search(r"^python3 dev\.py demo\b", check, re.MULTILINE)
    assert re.search(r"^python3 dev\.py test$", check, re.MULTILINE)


def test_readme_says_what_it_is_in_few_words() -> None:
    visible = re.sub(r"<details>.*?</details>|<!--.*?-->|<[^>]+>", "", README, flags=re.DOTALL)
    assert len(visible.split()) <= 900
    assert "MCP server" in visible[:200], "the first sentence says what it is"


def test_install_works_from_a_checkout_and_says_why() -> None:
    """Until a registry has the package, `uvx klein-mcp` finds nothing."""
    section = README.split("## Install")[1].split("<!-- made: links -->")[0]
    assert section.index("not published yet") < section.index("```"), "it stands before the first command"
    installs, *_ = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    for line in installs.splitlines():
        assert shlex.split(line, comments=True)[-1] == ".", "installs the checkout, not a registry's package"
    assert not re.search(r"^pip\b", installs, re.MULTILINE), "Debian's Python refuses: it is managed externally"
    (block,) = re.findall(r"```json\n(.*?)```", section, re.DOTALL)
    (launch,) = json.loads(block)["mcpServers"].values()
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert launch["command"] in scripts
    assert f"command from `{configurations.LAUNCH.command}` to `{launch['command']}`" in section.replace("\n", " ")


def test_images_come_before_everything_else() -> None:
    assert README.index("<img") < README.index("##")
    shown = re.findall(r'<img src="([^"]+)"', README)
    assert len(shown) == 5, "four images, and the studio further down"
    assert sum((ROOT / path).stat().st_size for path in shown) < 300_000


@pytest.fixture(scope="module")
def checkout(server: RealServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to run README's commands in, from the first to the last."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


@pytest.mark.slow
def test_every_command_works_or_reports_what_it_needs(server: RealServer, checkout: Path) -> None:
    """In the order of the README, in one folder, as somebody would who tries them all."""
    elsewhere = {"python3 dev.py demo", "python3 dev.py test"}  # by .ci/run, on a bare checkout
    elsewhere |= {f"python examples/{name}.py pictures" for name in ("library", "iterate")}  # test_examples.py
    elsewhere |= {write(configurations.LAUNCH) for write, _ in configurations.COMMANDS.values()}  # test_examples.py
    servers = []
    try:
        for line in commands():
            command = line.split(" #")[0].strip()
            if command in elsewhere or any(need in line for need in UNTESTED):
                continue
            words = _translated(server, command, checkout)
            if {"serve", "studio"} & set(words):
                servers.append(_serving(server, words, checkout))
            else:
                ran = server.run(*words, cwd=checkout)
                assert ran.returncode == 0, f"{command}: {ran.stderr or ran.stdout}"
    finally:
        for process in servers:
            process.terminate()
            process.wait(PATIENCE)
    assert (checkout / "apple.png").exists()
    assert list((checkout / "images").glob("*.png"))


def _translated(server: RealServer, command: str, checkout: Path) -> list[str]:
    """Translate a command into arguments of this Python."""
    command = command.removeprefix("python3 dev.py run ").replace("$PWD", str(checkout))
    program, *words = shlex.split(command)
    if "HANDLE" in words:
        listed = json.loads(server.run("-m", "klein_mcp", "list", "--json").stdout)
        words = [listed[0]["image"] if word == "HANDLE" else word for word in words]
    return {"klein-mcp": ["-m", "klein_mcp"], "python": []}[program] + words


def _serving(server: RealServer, words: list[str], folder: Path) -> "subprocess.Popen[bytes]":
    """Start a command that serves, and wait until it names its address."""
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        env=server.environment(BROWSER="true"),  # the program of that name: no window opens on a developer's desktop
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stderr
    line = process.stderr.readline().decode()
    assert "http://" in line or "studio" in line, f"{words}: {line or process.wait(PATIENCE)}"
    if "--port" in words:
        wait_until_listening(int(words[words.index("--port") + 1]), process)
    # Nothing more is read, and a full pipe would stop the server: it writes a few lines in all.
    return process


def test_images_are_those_that_command_beside_them_paints(server: RealServer, tmp_path: Path) -> None:
    """If the embedded model has changed: python -m examples.make images."""
    assert "`python3 dev.py demo --out pictures`" in README
    painted = server.run("-m", "klein_mcp", "demo", "--out", str(tmp_path))
    assert painted.returncode == 0, painted.stderr
    shown = sorted(make.PICTURES.glob("*.png"))
    assert [path.name for path in shown] == sorted(path.name for path in tmp_path.glob("*.png"))
    for path in shown:
        with Image.open(path) as ours, Image.open(tmp_path / path.name) as fresh:
            before, after = read(ours) or {}, read(fresh) or {}
            assert before["fingerprint"] == after["fingerprint"], "other weights: python -m examples.make pictures"
            difference = np.abs(np.asarray(ours.convert("RGB"), int) - np.asarray(fresh.convert("RGB"), int))
        # Another CPU may round otherwise: one step of 255 in a few pixels; here it is 0.
        assert difference.mean() < 0.5


def test_every_file_that_is_linked_is_there() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r'src="([^"]+)"', README)
    for target in targets:
        if not target.startswith("https://"):
            assert (ROOT / target).exists(), target


def test_every_setting_command_and_client_it_speaks_of_exists() -> None:
    known = {name for name, _, _ in settings.table()}
    assert set(re.findall(r"\bKLEIN_[A-Z_]*[A-Z]\b", PAGES)) <= known
    subcommands = set(re.findall(r"`klein-mcp (\w+)", PAGES)) | {
        line.split()[1] for line in commands() if line.startswith("klein-mcp ")
    }
    (parsers,) = (action for action in main.build_parser()._actions if action.dest == "command" or action.choices)
    assert subcommands <= set(parsers.choices or ())
    for client in configurations.CLIENTS:
        assert f"<b>{client.title}</b>" in README


def test_every_configuration_in_it_starts_same_command() -> None:
    links = dict(re.findall(r"\[\*\*Install in (VS Code|Cursor)\*\*\]\(([^)]+)\)", README))
    assert configurations.read_vscode_link(links["VS Code"]) == configurations.LAUNCH
    assert configurations.read_cursor_link(links["Cursor"]) == configurations.LAUNCH
    shown = re.findall(r"<summary><b>([^<]+)</b></summary>.*?```(?:json|toml|yaml)\n(.*?)```", README, re.DOTALL)
    readers = {client.title: client.read for client in configurations.CLIENTS}
    assert [title for title, _ in shown] == list(readers)
    for title, text in shown:
        assert readers[title](text) == configurations.LAUNCH
    for title, (write, read_back) in configurations.COMMANDS.items():
        assert read_back(write(configurations.LAUNCH)) == configurations.LAUNCH, title


def test_every_address_of_repository_is_one_constant() -> None:
    for path in ("README.md", "server.json", "packaging/mcpb/manifest.json", "Dockerfile", "pyproject.toml"):
        for name in re.findall(r"github\.com/([\w-]+/[\w-]+)", (ROOT / path).read_text()):
            if "klein" in name and not name.startswith("black-forest-labs"):
                assert name == make.REPOSITORY
