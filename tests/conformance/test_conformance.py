"""The protocol as others read it: the official conformance suite, the Inspector, and clients in other hands.

Needs Node 22 and the npm registry, and installs what it pins into a temporary folder.
"""

import base64
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.klein_mcp.front_ends import serving
from tests.real_server import RealServer

pytestmark = pytest.mark.conformance

HERE = Path(__file__).parent
PACKAGES = (
    "node@22",
    "@modelcontextprotocol/conformance@0.2.0-alpha.12",
    "@modelcontextprotocol/inspector@2.12.0",
    "@modelcontextprotocol/client@2.4.0",
    "openai@6.49.0",
)
SERVER = (sys.executable, "-m", "klein_mcp")
REVISIONS = ("2025-11-25", "2026-07-28")


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Node 22 and the packages in it. KLEIN_TEST_NODE names one that is kept between runs."""
    kept = os.environ.get("KLEIN_TEST_NODE")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("node")
    if (
        not (folder / "node_modules" / ".bin" / "conformance").exists()
        or not (folder / "node_modules" / "openai").exists()
    ):
        install = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder), *PACKAGES]
        try:
            subprocess.run(install, check=True, capture_output=True, timeout=400)
        except (OSError, subprocess.SubprocessError) as exc:
            pytest.skip(f"no Node packages: {exc}")
    return folder


def run(node: Path, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **more, "PATH": f"{node / 'node_modules' / '.bin'}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
    )


def suite(node: Path, url: str, revision: str, tmp_path: Path, *more: str) -> None:
    arguments = ["--url", f"{url}/mcp", "--requirements", revision, "-o", str(tmp_path), *more]
    done = run(node, "conformance", "server", *arguments)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


@contextmanager
def fixtures(server: RealServer) -> Iterator[str]:
    """Our application with the fixtures of the suite added."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.conformance.fixtures"],
        env=server.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout
    try:
        url = process.stdout.readline().strip()
        answers(f"{url}/healthz")
        yield url
    finally:
        process.terminate()
        process.wait(120)
        process.stdout.close()


def answers(url: str) -> None:
    for _ in range(300):
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except urllib.error.URLError:
            time.sleep(0.1)
    raise AssertionError(f"{url} never answered")


@pytest.mark.parametrize("revision", REVISIONS)
def test_the_real_server_fails_only_where_fixtures_are_missing(node, server, tmp_path, revision):
    with serving(server) as url:
        suite(node, url, revision, tmp_path, "--expected-failures", str(HERE / f"expected-{revision}.yml"))


@pytest.mark.parametrize("revision", REVISIONS)
def test_with_the_fixtures_everything_that_a_revision_requires_passes(node, server, tmp_path, revision):
    with fixtures(server) as url:
        suite(node, url, revision, tmp_path)


def inspect(
    node: Path, target: list[str], era: str, method: str, *more: str, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    common = ["--protocol-era", era, "--connect-timeout", "120000", "--format", "json", "-q"]
    command = ["mcp-inspector", "--cli", *common, "--method", method, *more]
    return run(node, *command, *target, **environment)


@pytest.fixture(scope="module")
def warm(server: RealServer, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The engine is up, so that an image comes within the call and within the Inspector's patience of a minute."""
    assert server.run("-m", "klein_mcp", "demo", "--out", str(tmp_path_factory.mktemp("demo"))).returncode == 0


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("era", ["legacy", "modern"])
@pytest.mark.parametrize("front_end", ["stdio", "http"])
def test_the_inspector_finds_no_fault_with_the_tools_and_paints(node, server, front_end, era):
    environment = server.environment()
    with serving(server) as url:
        target = ["--server-url", f"{url}/mcp"] if front_end == "http" else [*handed_on(environment), *SERVER]
        listed = inspect(node, target, era, "tools/list", "--strict", environment=environment)
        assert listed.returncode == 0, listed.stdout[-3000:] + listed.stderr[-3000:]
        asked = ["--tool-name", "generate_image", "--tool-args-json", json.dumps({"prompt": "a cat on red", "seed": 1})]
        painted = inspect(node, target, era, "tools/call", *asked, environment=environment)
    assert painted.returncode == 0, painted.stdout[-3000:] + painted.stderr[-3000:]
    assert '"image/jpeg"' in painted.stdout
    assert str(server.home) in painted.stdout


def handed_on(environment: dict[str, str]) -> list[str]:
    """The Inspector starts a server without its own environment: the tests would paint in the user's own home."""
    return [word for name, value in environment.items() if "KLEIN" in name for word in ("-e", f"{name}={value}")]


def test_the_typescript_client_paints_edits_and_composes(node, server):
    script = node / "paint.mjs"
    script.write_text((HERE / "paint.mjs").read_text())  # modules are looked for beside the script
    done = run(node, "node", str(script), sys.executable, **server.environment())
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    check([(result["payload"], result["preview"]) for result in results])


def test_the_fastmcp_client_paints_edits_and_composes(server, tmp_path):
    """In an environment of its own: its pins are not ours."""
    folder = tmp_path / "fastmcp"
    try:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, capture_output=True, timeout=120)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "fastmcp==4.1.2"]
        subprocess.run(pip, check=True, capture_output=True, timeout=300)
    except (OSError, subprocess.SubprocessError) as exc:
        pytest.skip(f"no fastmcp: {exc}")
    done = subprocess.run(
        [str(folder / "bin" / "python"), str(HERE / "paint_fastmcp.py"), sys.executable],
        env=server.environment(),
        capture_output=True,
        text=True,
        timeout=200,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    check([(result["payload"], result["preview"]) for result in results])


def check(results: list[tuple[dict, str]]) -> None:
    generated, edited, composed = (payload for payload, _ in results)
    assert len({generated["image"], edited["image"], composed["image"]}) == 3
    assert edited["changed"]["share"] > 0
    for payload, preview in results:
        assert Path(payload["path"]).read_bytes().startswith(b"\x89PNG")
        assert base64.b64decode(preview).startswith(b"\xff\xd8")
