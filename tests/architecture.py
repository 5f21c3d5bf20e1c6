"""The import graph of our packages, as AGENTS.md has it: `python -m tests.architecture`.

A package is a folder of `engine` or `klein_mcp` with all below it; a module beside those folders counts as a package of
its own. Imports inside functions and for types only count, too.
"""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for top in ("engine", "klein_mcp", "prompts")
    for path in (ROOT / top).rglob("*.py")
}


@cache
def imports(module: str) -> frozenset[str]:
    """Return every module that a file imports: at the top, inside functions, for types only."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{module} imports relatively; use the full name"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names if f"{node.module}.{alias.name}" in FILES}
    return frozenset(found)


def package_of(module: str) -> str:
    """Return the package a module belongs to."""
    return ".".join(module.split(".")[:2])


@cache
def graph() -> dict[str, set[str]]:
    """Return package -> packages of ours that it imports."""
    found: dict[str, set[str]] = {package_of(module): set() for module in FILES}
    for module in FILES:
        for name in imports(module) & FILES.keys():
            found[package_of(module)].add(package_of(name))
    # The top __init__ files hold a version and nothing else of ours.
    return {package: others - {package, "engine", "klein_mcp"} for package, others in found.items()}


def layers(edges: dict[str, set[str]]) -> list[list[str]]:
    """Return packages from the top to the bottom.

    Each imports only from layers below its own.
    """
    height: dict[str, int] = {}

    def measure(package: str) -> int:
        if package not in height:
            height[package] = 1 + max((measure(other) for other in edges[package]), default=0)
        return height[package]

    for package in edges:
        measure(package)
    return [sorted(p for p in edges if height[p] == level) for level in range(max(height.values()), 0, -1)]


def drawing() -> str:
    """Draw the graph as text, a line a package, the top layer first.

    An arrow to a package of a line above would be one upward; packages that import none of ours end it.
    """
    edges = graph()
    lines, leaves = [], []
    for layer in layers(edges):
        for package in layer:
            names = sorted(name.removeprefix("klein_mcp.") for name in edges[package])
            if names:
                lines.append(f"{package.removeprefix('klein_mcp.'):<18} -> {', '.join(names)}")
            else:
                leaves.append(package.removeprefix("klein_mcp."))
    return "\n".join([*lines, f"nothing of ours: {', '.join(leaves)}"])


if __name__ == "__main__":
    print(drawing())
