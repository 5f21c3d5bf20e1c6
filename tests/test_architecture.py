"""The house rules: who may import whom, and that no door ever reaches torch."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for room in ("engine", "klein_mcp", "prompts")
    for path in (ROOT / room).rglob("*.py")
}

FORBIDDEN_TO_ENGINE = {
    "klein_mcp",
    "prompts",
    "mcp",
    "mcp_types",
    "starlette",
    "uvicorn",
    "httpx",
    "httpx2",
    "pydantic",
}
OPEN_ROOMS = {"engine.contract", "engine.families.klein.variants"}
MAY_LOAD_THE_ENGINE = {"klein_mcp.daemon.__main__", "klein_mcp.cli.paint"}
HEAVY = ("torch", "transformers", "diffusers", "safetensors")


def imports(module: str) -> set[str]:
    """Every module imported anywhere in the file: at the top, inside functions, for types only."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{module} imports relatively; say where from"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names if f"{node.module}.{alias.name}" in FILES}
    return found


def ours(module: str) -> set[str]:
    """The project's own modules among them; a package's __init__ counts only where something is taken from it."""
    return {name for name in imports(module) if name in FILES} - {module}


@pytest.mark.parametrize("module", [name for name in FILES if name.split(".")[0] == "engine"])
def test_the_engine_knows_nothing_of_those_who_use_it(module: str) -> None:
    reached = {name.split(".")[0] for name in imports(module)} & FORBIDDEN_TO_ENGINE
    assert not reached, f"{module} imports {reached}"


@pytest.mark.parametrize("module", [name for name in FILES if name.split(".")[0] in ("klein_mcp", "prompts")])
def test_of_the_engine_the_rest_sees_the_contract_and_the_variants(module: str) -> None:
    allowed = OPEN_ROOMS | ({"engine.engine"} if module in MAY_LOAD_THE_ENGINE else set())
    reached = {name for name in ours(module) if name.split(".")[0] == "engine" and name != "engine"} - allowed
    assert not reached, f"{module} imports {reached}"


@pytest.mark.parametrize("module", ["engine.contract", "engine.families.klein.variants", "engine.diffusion.schedule"])
def test_the_open_rooms_need_no_torch(module: str) -> None:
    assert not {name.split(".")[0] for name in imports(module)} & set(HEAVY)


def test_there_is_no_import_circle() -> None:
    packages = {name for name, path in FILES.items() if path.name == "__init__.py"}
    graph = {module: ours(module) - (packages if module not in packages else set()) for module in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as circle:
        pytest.fail(f"import circle: {' -> '.join(circle.args[1])}")


@pytest.mark.parametrize(
    "door", ["klein_mcp.mcp_server.stdio", "klein_mcp.http.app", "klein_mcp.cli.main", "klein_mcp.daemon.app"]
)
def test_no_door_reaches_torch(door: str) -> None:
    heard = f"import sys, {door}; print([name for name in {HEAVY} if name in sys.modules])"
    reached = subprocess.run([sys.executable, "-c", heard], cwd=ROOT, capture_output=True, text=True, check=True)
    assert reached.stdout.strip() == "[]"


def test_the_stdio_door_leaves_numpy_and_pillow_to_the_first_picture() -> None:
    heard = (
        "import sys, klein_mcp.cli.main, klein_mcp.mcp_server.stdio, klein_mcp.mcp_server.server;"
        "print('numpy' in sys.modules, 'PIL' in sys.modules)"
    )
    reached = subprocess.run([sys.executable, "-c", heard], cwd=ROOT, capture_output=True, text=True, check=True)
    assert reached.stdout.split() == ["False", "False"]


STORAGE = ("engine.checkpoints.loading", "engine.checkpoints.files.safetensors", "engine.checkpoints.quant")
"""They name the number formats of files; which one to paint with is still decided in one place."""


@pytest.mark.parametrize("module", [name for name in FILES if name.split(".")[0] == "engine"])
def test_only_one_place_names_devices_and_number_formats(module: str) -> None:
    if module == "engine.memory.device" or module.startswith("engine.nano"):
        return
    tree = list(ast.walk(ast.parse(FILES[module].read_text())))
    devices = {node.value for node in tree if isinstance(node, ast.Constant) and node.value in ("cuda", "mps")}
    named = {ast.unparse(node) for node in tree if isinstance(node, ast.Attribute)}
    assert not devices | (named & {"torch.cuda", "torch.mps"})
    if not module.startswith(STORAGE):
        assert not named & {"torch.bfloat16", "torch.float16"}


def test_nothing_but_training_and_evaluation_knows_the_scenes() -> None:
    know = {module for module in FILES if "engine.nano.training.scenes" in imports(module)}
    assert all(module.startswith("engine.nano.") for module in know)
