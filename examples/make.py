"""Write all generated files, and on request the images.

The files are configurations, manifests, README's tables and the guide's word lists.

    python -m examples.make             everything but the images
    python -m examples.make pictures    also the images, by `klein-mcp demo` on the embedded model, and the icon

A generated part of a Markdown file is between `<!-- made: NAME -->` and `<!-- end -->`; tests/test_readme.py compares.
"""

import html
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from engine.families.klein.variants import EMBEDDED, VARIANTS, Variant
from engine.nano import words
from examples import configurations as clients
from examples import plugin, reference
from klein_mcp import __version__, settings
from klein_mcp.images.provenance import read
from klein_mcp.mcp_server import prompts
from klein_mcp.mcp_server.tools import TOOLS
from tests import architecture

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
GUIDE = ROOT / "klein_mcp" / "mcp_server" / "guide.md"
PICTURES = ROOT / "examples" / "pictures"
BUNDLE = ROOT / "packaging" / "mcpb"
ICON = BUNDLE / "icon.png"
DOCS = ROOT / "docs"
SPEED = ROOT / "engine" / "SPEED.md"
WEIGHTS = ROOT / "engine" / "nano" / "weights"

REPOSITORY = "klein-mcp/klein-mcp"
"""Owner and name. Every address in the project that names the repository is built from it."""


def table(*rows: tuple[str, ...]) -> str:
    """Return a Markdown table, whose first row is the head."""
    head, *body = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join((head, "|" + " --- |" * len(rows[0]), *body))


def pictures() -> str:
    """Return the demo's images with their recipes, read from the files."""
    cells = []
    for path in sorted(PICTURES.glob("*.png")):
        with Image.open(path) as picture:
            recipe = read(picture) or {}
        order = recipe.get("request") or recipe["order"]  # the key before 0.2
        says = html.escape(order["prompt"])
        caption = f"`{order['tool']}`<br>“{says}”<br>seed {order['seed']}"
        cells.append((f'<img src="{path.relative_to(ROOT).as_posix()}" width="192" alt="{says}">', caption))
    return table(tuple(image for image, _ in cells), tuple(caption for _, caption in cells))


def links() -> str:
    """Return the install links, which need one click each."""
    made = {"VS Code": clients.vscode_link(clients.LAUNCH), "Cursor": clients.cursor_link(clients.LAUNCH)}
    return " · ".join(f"[**Install in {client}**]({link})" for client, link in made.items())


def configurations() -> str:
    """Return one collapsible block per client."""
    return "\n".join(map(_configuration, clients.CLIENTS))


def _configuration(client: clients.Client) -> str:
    terminal = ""
    if client.title in clients.COMMANDS:
        write, _ = clients.COMMANDS[client.title]
        terminal = f"```sh\n{write(clients.LAUNCH)}\n```\n\nor in "
    where = f"{terminal}{client.where}:" if terminal else f"In {client.where}:"
    kind = client.file.rsplit(".", 1)[1]
    block = f"```{kind}\n{client.write(clients.LAUNCH).rstrip()}\n```"
    return f"<details><summary><b>{client.title}</b></summary>\n\n{where}\n\n{block}\n\n</details>"


def tools() -> str:
    """Return the table of tools/list."""
    rows = []
    for tool in TOOLS.values():
        schema = tool.schema()
        required = schema.get("required", ())
        named = [f"**`{name}`**" if name in required else f"`{name}`" for name in schema.get("properties", {})]
        rows.append((f"`{tool.name}`", tool.description, ", ".join(named) or "none"))
    return table(("Tool", "What it does", "Arguments (**required**)"), *rows)


def recipes() -> str:
    """Return the table of prompts/."""
    rows = [(f"[`{one.name}`](prompts/{one.name}.md)", one.description) for one in prompts.prompt_files()]
    return table(("Prompt", "What it does"), *rows)


def models() -> str:
    """Return the models with licence and memory."""
    rows = [
        (f"`{row.name}`", row.licence + (", gated" if row.gated else ""), str(row.steps), f"{row.memory_gb:g} GB")
        for row in VARIANTS.values()
    ]
    return table(("Model", "Licence", "Steps", "Memory, all of it in bf16"), *rows)


def models_in_full() -> str:
    """Return every column of VARIANTS."""
    return table(
        ("Model", "What it is", "Licence", "Steps", "Size", "References", "Memory", "Single files", "Get it"),
        *map(_model, VARIANTS.values()),
    )


def _model(row: Variant) -> tuple[str, ...]:
    get = "is in the package" if row.name == EMBEDDED else f"`klein-mcp pull {row.name}`"
    return (
        f"`{row.name}`",
        row.title,
        row.licence + (", gated" if row.gated else ""),
        str(row.steps),
        f"{row.native_size}²",
        f"up to {row.max_references}",
        f"{row.memory_gb:g} GB",
        ", ".join(f"{file.format} {file.bytes / 1e9:.1f} GB" if file.bytes else file.format for file in row.files),
        get,
    )


def speed() -> str:
    """Return the table of engine/SPEED.md that has diffusers beside us."""
    found = re.search(r"<!-- speed -->\n(.*?)\n<!-- end -->", SPEED.read_text(encoding="utf-8"), re.DOTALL)
    if found is None:
        raise SystemExit(f"{SPEED} has no table between <!-- speed --> and <!-- end -->.")
    return found[1].strip()


def vocabulary() -> str:
    """Return nano's word lists, as far as the shipped weights know them."""
    own = json.loads((WEIGHTS / "klein.json").read_text(encoding="utf-8"))
    scenes = ["sky" if scene == "clouds" else scene for scene in words.SCENES]
    lists = {
        "things": sorted(own["nouns"]),
        "shapes, each in every colour": list(words.SHAPES),
        "colours, of shapes and backgrounds": own["colours"],
        "painted backgrounds": [scene for scene in scenes if scene in own["words"]],
    }
    return "\n".join(f"- {kind}: {', '.join(known)}" for kind, known in lists.items())


def package_graph() -> str:
    """Return which package imports which, without the prefix klein_mcp."""
    return f"```text\n{architecture.drawing()}\n```"


PARTS: dict[Path, dict[str, Callable[[], str]]] = {
    README: {
        "pictures": pictures,
        "links": links,
        "configurations": configurations,
        "tools": tools,
        "prompts": recipes,
        "models": models,
        "speed": speed,
    },
    DOCS / "models.md": {"models": models_in_full},
    GUIDE: {"words": vocabulary},
    ROOT / "AGENTS.md": {"graph": package_graph},
}


NAMESPACE = f"io.github.{REPOSITORY}"
"""The name in the MCP registry, which verifies it by the mcp-name line of README.md."""
DESCRIPTION = "Generate, edit and compose images with FLUX.2 [klein] on your machine; one engine for all agents."
SHOWN_SETTINGS = ("model", "write_roots", "allow_urls")
"""Settings that the registry and the desktop bundle ask a user about. The others have good defaults."""


def registry() -> dict[str, Any]:
    """Return server.json, for the MCP registry."""
    meanings = {name: meaning for name, _, meaning in settings.table()}
    variables = [settings.variable(name) for name in SHOWN_SETTINGS]
    return {
        "$schema": "https://static.modelcontextprotocol.io/schemas/2025-12-11/server.schema.json",
        "name": NAMESPACE,
        "title": "klein-mcp",
        "description": DESCRIPTION,
        "repository": {"url": f"https://github.com/{REPOSITORY}", "source": "github"},
        "version": __version__,
        "packages": [
            {
                "registryType": "pypi",
                "identifier": "klein-mcp",
                "version": __version__,
                "runtimeHint": clients.LAUNCH.command,
                "transport": {"type": "stdio"},
                "environmentVariables": [{"name": name, "description": meanings[name]} for name in variables],
            }
        ],
    }


def bundle() -> dict[str, Any]:
    """Return manifest.json of the desktop bundle.

    uv installs the package when the user clicks.
    """
    return {
        "manifest_version": "0.4",
        "name": "klein-mcp",
        "display_name": "klein-mcp",
        "version": __version__,
        "description": DESCRIPTION,
        "author": {"name": "klein-mcp maintainers"},
        "repository": {"type": "git", "url": f"https://github.com/{REPOSITORY}"},
        "license": "Apache-2.0",
        "icon": ICON.name,
        "server": {
            "type": "uv",
            "entry_point": "server.py",
            "mcp_config": {
                "command": "uv",
                "args": ["run", "--directory", "${__dirname}", "server.py"],
                "env": {"KLEIN_MODEL": "${user_config.model}", "KLEIN_WRITE_ROOTS": "${user_config.folder}"},
            },
        },
        "user_config": {
            "folder": {
                "type": "directory",
                "title": "Folder for saved images",
                "description": "save_image may write here and below, and nowhere else.",
                "default": "${HOME}/Pictures",
            },
            "model": {
                "type": "string",
                "title": "Model",
                "description": f"auto, or one of {', '.join(VARIANTS)}.",
                "default": "auto",
            },
        },
        "tools": [{"name": tool.name, "description": tool.description} for tool in TOOLS.values()],
        "prompts_generated": True,
        "compatibility": {"platforms": ["darwin", "linux", "win32"], "runtimes": {"python": ">=3.11"}},
    }


def project_of_bundle() -> str:
    """Return pyproject.toml of the desktop bundle."""
    return (
        "[project]\n"
        'name = "klein-mcp-bundle"\n'
        f'version = "{__version__}"\n'
        'requires-python = ">=3.11"\n'
        f'dependencies = ["klein-mcp=={__version__}"]\n'
    )


def files() -> dict[Path, str]:
    """Return every file that is generated as a whole."""
    return {
        **clients.files(),
        ROOT / "server.json": json.dumps(registry(), indent=2, ensure_ascii=False) + "\n",
        BUNDLE / "manifest.json": json.dumps(bundle(), indent=2, ensure_ascii=False) + "\n",
        BUNDLE / "pyproject.toml": project_of_bundle(),
        **{DOCS / name: page() for name, page in reference.PAGES.items()},
        **plugin.files(),
    }


def made(path: Path) -> str:
    """Return a Markdown file's text with each generated part updated."""
    text = path.read_text(encoding="utf-8")
    for name, make in PARTS[path].items():
        part = re.compile(rf"(<!-- made: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, found = part.subn(lambda match, make=make: f"{match[1]}{make()}\n{match[2]}", text)
        if found != 1:
            raise SystemExit(f"{path} has {found} parts named {name}; one is needed.")
    return text


def paint() -> None:
    """Generate the images of README and the icon again."""
    with tempfile.TemporaryDirectory() as home:
        # fp32 is used, as on most CPUs; hardware that multiplies bf16 would use bf16 by default.
        ours = {"KLEIN_HOME": home, "KLEIN_MODEL": EMBEDDED, "KLEIN_DTYPE": "float32"}
        program = [sys.executable, "-m", "klein_mcp"]
        subprocess.run([*program, "demo", "--out", str(PICTURES)], check=True, env={**os.environ, **ours})
        subprocess.run([*program, "stop"], check=True, env={**os.environ, **ours})
    with Image.open(sorted(PICTURES.glob("*.png"))[0]) as first:
        icon = first.convert("RGB").resize((512, 512), Image.Resampling.LANCZOS)
        icon.quantize(64).save(ICON, optimize=True)


def main(asked: list[str]) -> None:
    """Write everything that is generated."""
    if "pictures" in asked:
        paint()
    for path, text in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for path in PARTS:
        path.write_text(made(path), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
