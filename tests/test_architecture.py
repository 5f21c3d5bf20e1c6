"""The architecture and the wording, held by tests."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.architecture import FILES, ROOT, graph, imports, package_of

MAY_IMPORT: dict[str, set[str]] = {
    # The engine: no package of klein_mcp anywhere.
    "engine.engine": {
        "engine.auto", "engine.contract", "engine.registry", "engine.families", "engine.checkpoints", "engine.memory",
    },
    "engine.auto": {"engine.contract", "engine.registry", "engine.families"},
    "engine.registry": {"engine.contract", "engine.search", "engine.diagnose", "engine.families", "engine.checkpoints"},
    "engine.search": {"engine.contract", "engine.diagnose", "engine.families", "engine.checkpoints"},
    "engine.diagnose": {"engine.contract", "engine.families", "engine.checkpoints"},
    "engine.families": {"engine.contract", "engine.checkpoints", "engine.memory", "engine.nn", "engine.diffusion"},
    "engine.checkpoints": {"engine.contract", "engine.memory"},
    "engine.nano": {"engine.contract", "engine.families", "engine.nn", "engine.diffusion"},
    "engine.nn": {"engine.diffusion", "engine.memory"},
    "engine.memory": {"engine.contract"},
    "engine.diffusion": {"engine.contract"},
    "engine.contract": set(),
    # Front ends.
    "klein_mcp.__main__": {"klein_mcp.cli"},
    "klein_mcp.cli": {
        "klein_mcp.http", "klein_mcp.mcp_server", "klein_mcp.studio", "klein_mcp.cluster", "klein_mcp.daemon",
        "klein_mcp.jobs", "klein_mcp.images", "klein_mcp.settings",
        "klein_mcp.private", "klein_mcp.foreign", "klein_mcp.errors", "klein_mcp.limits",
        "klein_mcp.atomic", "klein_mcp.exit", "klein_mcp.loopback", "klein_mcp.web_server", "prompts",
        "engine.contract", "engine.families",
    },
    "klein_mcp.http": {
        "klein_mcp.mcp_server", "klein_mcp.studio", "klein_mcp.daemon", "klein_mcp.jobs", "klein_mcp.images",
        "klein_mcp.settings",
        "klein_mcp.private", "klein_mcp.foreign", "klein_mcp.errors", "klein_mcp.limits", "klein_mcp.atomic",
        "klein_mcp.exit", "klein_mcp.loopback", "klein_mcp.web_server",
        "engine.contract", "engine.families",
    },
    "klein_mcp.mcp_server": {
        "klein_mcp.studio", "klein_mcp.daemon", "klein_mcp.jobs", "klein_mcp.images", "klein_mcp.settings",
        "klein_mcp.errors", "klein_mcp.limits", "klein_mcp.exit", "prompts", "engine.contract", "engine.families",
    },
    "klein_mcp.studio": {
        "klein_mcp.jobs", "klein_mcp.images", "klein_mcp.settings",
        "klein_mcp.private", "klein_mcp.foreign", "klein_mcp.errors", "klein_mcp.limits",
        "engine.contract", "engine.families",
    },
    # Jobs and those who run them.
    "klein_mcp.cluster": {
        "klein_mcp.daemon", "klein_mcp.jobs", "klein_mcp.settings",
        "klein_mcp.private", "klein_mcp.foreign", "klein_mcp.errors", "klein_mcp.atomic", "engine.contract",
    },
    "klein_mcp.daemon": {
        "klein_mcp.jobs", "klein_mcp.images", "klein_mcp.settings",
        "klein_mcp.private", "klein_mcp.foreign", "klein_mcp.errors", "klein_mcp.atomic", "klein_mcp.limits",
        "klein_mcp.loopback", "klein_mcp.web_server", "engine.contract", "engine.engine",
    },
    "klein_mcp.jobs": {
        "klein_mcp.images", "klein_mcp.settings",
        "klein_mcp.private", "klein_mcp.foreign", "klein_mcp.errors", "klein_mcp.limits", "klein_mcp.atomic",
        "engine.contract", "engine.families", "engine.search",
    },
    "klein_mcp.images": {
        "klein_mcp.settings",
        "klein_mcp.private", "klein_mcp.foreign", "klein_mcp.errors", "klein_mcp.limits", "klein_mcp.atomic",
        "engine.contract",
    },
    "klein_mcp.settings": {"klein_mcp.private", "engine.contract"},
    "klein_mcp.errors": {"engine.contract"},
    "klein_mcp.limits": set(),
    "klein_mcp.foreign": set(),
    "klein_mcp.private": set(),
    "klein_mcp.atomic": set(),
    "klein_mcp.exit": set(),
    "klein_mcp.loopback": set(),
    "klein_mcp.web_server": set(),
    "klein_mcp._own_packages": set(),
    "klein_mcp": {"klein_mcp._own_packages"},
    "engine": set(),
    "prompts": set(),
}  # fmt: skip
"""Package -> packages it may import. Of engine.families, klein_mcp may import the variants alone, see below."""

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
PUBLIC = {"engine.contract", "engine.families.klein.variants", "engine.search"}
MAY_LOAD_THE_ENGINE = {"klein_mcp.daemon.executors.local"}
HEAVY = ("torch", "transformers", "diffusers", "safetensors", "ray")


def ours(module: str) -> set[str]:
    """The project's own modules among them."""
    return {name for name in imports(module) if name in FILES} - {module}


@pytest.mark.parametrize("package", sorted(graph()))
def test_package_imports_what_the_table_allows(package: str) -> None:
    assert package in MAY_IMPORT, f"{package} has no row in the table"
    assert not graph()[package] - MAY_IMPORT[package]


def test_table_of_packages_has_no_cycle() -> None:
    TopologicalSorter(MAY_IMPORT).prepare()


@pytest.mark.parametrize("module", [name for name in FILES if name.split(".")[0] == "engine"])
def test_the_engine_knows_nothing_of_those_who_use_it(module: str) -> None:
    reached = {name.split(".")[0] for name in imports(module)} & FORBIDDEN_TO_ENGINE
    assert not reached, f"{module} imports {reached}"


@pytest.mark.parametrize("module", [name for name in FILES if name.split(".")[0] in ("klein_mcp", "prompts")])
def test_outside_the_engine_only_contract_and_variants_are_seen(module: str) -> None:
    allowed = PUBLIC | ({"engine.engine"} if module in MAY_LOAD_THE_ENGINE else set())
    reached = {name for name in ours(module) if name.split(".")[0] == "engine" and name != "engine"} - allowed
    assert not reached, f"{module} imports {reached}"


def test_only_the_cluster_names_ray() -> None:
    named = {name for name, path in FILES.items() if re.search(r"(import|module\(\W)\s*ray\b", path.read_text())}
    assert named == {"klein_mcp.cluster.extra"}


@pytest.mark.parametrize(
    "module", ["engine.contract", "engine.families.klein.variants", "engine.search", "engine.diffusion.schedule"]
)
def test_public_modules_need_no_torch(module: str) -> None:
    assert not {name.split(".")[0] for name in imports(module)} & set(HEAVY)


def test_there_is_no_import_cycle() -> None:
    packages = {name for name, path in FILES.items() if path.name == "__init__.py"}
    graph = {module: ours(module) - (packages if module not in packages else set()) for module in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as circle:
        pytest.fail(f"import circle: {' -> '.join(circle.args[1])}")


@pytest.mark.parametrize(
    "front_end", ["klein_mcp.mcp_server.stdio", "klein_mcp.http.app", "klein_mcp.cli.main", "klein_mcp.daemon.app"]
)
def test_no_front_end_reaches_torch(front_end: str) -> None:
    code = f"import sys, {front_end}; print([name for name in {HEAVY} if name in sys.modules])"
    reached = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert reached.stdout.strip() == "[]"


def test_stdio_imports_neither_numpy_nor_pillow() -> None:
    code = (
        "import sys, klein_mcp.cli.main, klein_mcp.mcp_server.stdio, klein_mcp.mcp_server.server;"
        "print('numpy' in sys.modules, 'PIL' in sys.modules)"
    )
    reached = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert reached.stdout.split() == ["False", "False"]


STORAGE = ("engine.checkpoints.reader", "engine.checkpoints.files", "engine.checkpoints.quant")
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


SCHEME_NAMES = {"fp8", "nvfp4", "mxfp8", "int8", "gguf"}
"""Of `engine.checkpoints.quant`; a test of their own holds that the list is complete."""
MAY_NAME_SCHEMES = ("engine.checkpoints.quant", "engine.families.klein.variants", "engine.checkpoints.files.gguf")
"""Variants say which files are published in which format."""


@pytest.mark.parametrize("module", [name for name in FILES if name.split(".")[0] == "engine"])
def test_no_quantisation_is_named_outside_its_file(module: str) -> None:
    if module.startswith(MAY_NAME_SCHEMES):
        return
    tree = ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8")))
    named = {node.value for node in tree if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert not named & SCHEME_NAMES


FRONT_END_WORDS = re.compile(r"KLEIN_[A-Z]|klein-mcp|(?<![\w-])--[a-z]")


@pytest.mark.parametrize("module", [name for name in FILES if name.split(".")[0] == "engine"])
def test_engine_names_no_setting_option_or_command(module: str) -> None:
    if module.startswith(("engine.nano", "engine.families.klein.reading")):
        return  # `evaluate` and training are commands; a warning, unlike an error, carries no fix
    tree = list(ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))))
    texts = [node.value for node in tree if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert not [text for text in texts if FRONT_END_WORDS.search(text)]


TOOLS = re.compile("|".join(f"\\b{path.stem}\\b" for path in (ROOT / "klein_mcp/mcp_server/tools").glob("*_*.py")))


@pytest.mark.parametrize("module", [name for name in FILES if name.startswith(("klein_mcp.images", "klein_mcp.jobs"))])
def test_no_text_below_the_front_ends_names_a_tool(module: str) -> None:
    """Each front end words the next step after an error itself."""
    if module == "klein_mcp.jobs.installed":
        return  # its sentences are for agents
    documented = {ast.get_docstring(node, clean=False) for node in definitions(FILES[module])}
    nodes = ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8")))
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert not [text for text in texts - documented if " " in text and TOOLS.search(text)]


def test_nothing_but_training_and_evaluation_knows_the_scenes() -> None:
    know = {module for module in FILES if "engine.nano.training.scenes" in imports(module)}
    assert all(module.startswith("engine.nano.") for module in know)


# -- wording -----------------------------------------------------------------------------------------------------------

WORDED = [
    path
    for folder in ("engine", "klein_mcp", "prompts", "examples", "tests", "dev.py")
    for path in ([ROOT / folder] if folder.endswith(".py") else sorted((ROOT / folder).rglob("*.py")))
]
RIDDLE = re.compile(r"(What|Whoever|Where|How|Of|As)\b")
GONE = re.compile(
    r"(?<![A-Za-z])(?i:shel(?:f|ves)|strangers?|couriers?|conveyors?|fores(?:ee|aw)\w*|told|said|lives)(?![a-z])"
    r"|\bKept\b|\bkept\.py\b|(?i:under the brush)|[._](?:asleep|awake)\b"
)
LONGEST_SUMMARY = 12
"""Words in the first line of a docstring, and in the name of a test."""


def definitions(path: Path) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Everything in a file that can have a docstring."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def summaries(path: Path) -> Iterator[str]:
    """First lines of the docstrings of a file."""
    for node in definitions(path):
        if text := ast.get_docstring(node):
            yield text.splitlines()[0]


def check_wording(fault: Callable[[Path], list[str]], paths: Iterable[Path]) -> None:
    found = [f"{path.relative_to(ROOT)}: {each}" for path in paths for each in fault(path)]
    assert not found, "\n".join(found)


def test_no_docstring_opens_with_a_riddle() -> None:
    check_wording(lambda path: [line for line in summaries(path) if RIDDLE.match(line)], WORDED)


def test_no_docstring_summary_has_a_semicolon() -> None:
    check_wording(lambda path: [line for line in summaries(path) if ";" in line], WORDED)


def test_docstring_summaries_are_short() -> None:
    shipped = [path for path in WORDED if path.relative_to(ROOT).parts[0] not in ("tests", "examples")]
    check_wording(lambda path: [line for line in summaries(path) if len(line.split()) > LONGEST_SUMMARY], shipped)


def test_no_docstring_sentence_is_cut_in_two() -> None:
    """A summary of twelve words may not be reached by a second paragraph that goes on in mid-sentence."""

    def fragments(path: Path) -> list[str]:
        texts = [ast.get_docstring(node) or "" for node in definitions(path)]
        return [
            text for text in texts if re.search(r"\A.*\n\n(And|Or|But|Whose|Though|Because|So that|Which|Who)\b", text)
        ]

    check_wording(fragments, [path for path in WORDED if path.relative_to(ROOT).parts[0] != "tests"])


def test_test_names_are_short() -> None:
    def long_names(path: Path) -> list[str]:
        names = [node.name for node in definitions(path) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        return [name for name in names if name.startswith("test_") and name.count("_") > LONGEST_SUMMARY]

    check_wording(long_names, WORDED)


def test_words_of_our_own_are_gone() -> None:
    here = Path(__file__)  # this file names them
    check_wording(
        lambda path: [match[0] for match in GONE.finditer(path.read_text(encoding="utf-8"))],
        [path for path in WORDED if path != here],
    )


def test_no_class_name_stands_for_two_things() -> None:
    places: dict[str, list[str]] = {}
    for module, path in FILES.items():
        for node in definitions(path):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(module)
    twice = {name: where for name, where in places.items() if len(where) > 1}
    assert not twice


TYPES_TWICE = {"engine.nn.Attention"}
"""The autoencoder's layer, and an attention back end."""


def test_no_type_name_stands_for_two_things_in_a_package() -> None:
    """Type aliases count, too: pyright takes one tuple of four numbers for another."""
    places: dict[str, list[str]] = {}
    for module, path in FILES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            name = node.name if isinstance(node, ast.ClassDef) else alias_name(node)
            if name:
                places.setdefault(f"{package_of(module)}.{name}", []).append(module)
    twice = {name for name, where in places.items() if len(where) > 1}
    assert twice == TYPES_TWICE


def alias_name(node: ast.stmt) -> str:
    """Return the name of a type alias, "" for other statements."""
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        name = node.targets[0].id
        return name if re.fullmatch(r"[A-Z]\w*[a-z]\w*", name) else ""
    return ""
