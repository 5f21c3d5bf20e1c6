#!/usr/bin/env python3
"""Run the project from a bare checkout, in its own virtual environment.

    python3 dev.py demo [ARGS]     the main job: a real MCP client generates, edits and composes images
    python3 dev.py test [ARGS]     the tests; ARGS go to pytest
    python3 dev.py lint            ruff, pyright, the reference pages with all their links, and the studio as built
    python3 dev.py run COMMAND …   anything else in that environment

Needs Python 3.11 or newer and nothing else: standard library only.
"""

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
HOME = Path(os.environ.get("KLEIN_DEV_VENV", ROOT / ".venv"))
BIN = HOME / ("Scripts" if os.name == "nt" else "bin")


def installed(extra: str) -> None:
    """Install klein-mcp with `extra` at the versions of constraints.txt, once."""
    wanted = hashlib.sha256()
    for name in ("pyproject.toml", "constraints.txt"):
        wanted.update((ROOT / name).read_bytes())
    stamp = HOME / f"klein-{extra or 'run'}-{wanted.hexdigest()[:16]}"
    if stamp.exists():
        return
    if not any((BIN / name).exists() for name in ("pip", "pip.exe")):  # none yet, or an interrupted one
        print(f"making {HOME}", file=sys.stderr)
        try:
            # As `python -m venv` does: the copy of a uv-managed Python does not find its library.
            venv.create(HOME, with_pip=True, symlinks=os.name != "nt")
        except subprocess.CalledProcessError:
            # Debian and Ubuntu ship ensurepip as a separate package.
            sys.exit(
                "dev.py: this Python cannot make virtual environments; on Debian or Ubuntu: apt install python3-venv"
            )
    what = f"{ROOT}[{extra}]" if extra else str(ROOT)
    print(f"installing {what} (torch is large: minutes, the first time)", file=sys.stderr)
    pip = [BIN / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    code = subprocess.call([*pip, "--constraint", ROOT / "constraints.txt", "--editable", what])
    if code:
        sys.exit(f"dev.py: the installation failed (pip ended with {code}); its last lines above say why.")
    for old in HOME.glob(f"klein-{extra or 'run'}-*"):
        old.unlink()
    stamp.touch()


def run(*command: str | Path) -> int:
    """Run a command in the environment, its programs first on PATH."""
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}", "VIRTUAL_ENV": str(HOME)}
    return subprocess.call(list(map(str, command)), cwd=ROOT, env=environment)


def main(argv: list[str]) -> int:
    """Dispatch on the first argument."""
    match argv:
        case ["demo", *rest]:
            installed("")
            return run(BIN / "klein-mcp", "demo", *rest)
        case ["test", *rest]:
            installed("test")
            return run(BIN / "python", "-m", "pytest", *rest)
        case ["lint"]:
            installed("test")
            installed("lint")
            studio = ["python", "-m", "klein_mcp.studio.build", "--check"]
            checks = (["ruff", "check"], ["ruff", "format", "--check"], ["pyright"], ["mkdocs", "build"], studio)
            return max(run(BIN / tool, *rest) for tool, *rest in checks)
        case ["run", command, *rest]:
            installed("")
            return run(BIN / command, *rest)
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    if sys.version_info < (3, 11):  # noqa: UP036 - older Pythons must get this message too
        sys.exit("dev.py: Python 3.11 or newer is needed; this is " + sys.version.split()[0])
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
