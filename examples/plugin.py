"""The Claude Code plugin folder: the server's configuration, and every prompt as a skill.

Written by `python -m examples.make` into packaging/claude-plugin. In Claude Code:
`/plugin marketplace add klein-mcp/klein-mcp`, then `/plugin install klein-mcp`.
"""

import json
from pathlib import Path
from typing import Any

from examples import configurations as clients
from klein_mcp import __version__
from klein_mcp.mcp_server import prompts
from klein_mcp.mcp_server.prompts import IMAGES, Argument, PromptFile

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "packaging" / "claude-plugin"
MARKETPLACE = ROOT / ".claude-plugin" / "marketplace.json"

DESCRIPTION = "Generate, edit and compose images with FLUX.2 [klein] on your own machine."


def files() -> dict[Path, str]:
    """Return every file of the plugin with its text."""
    launch = {"command": clients.LAUNCH.command, "args": list(clients.LAUNCH.args)}
    skills = {FOLDER / "skills" / _skill_name(prompt) / "SKILL.md": skill(prompt) for prompt in prompts.prompt_files()}
    return {
        MARKETPLACE: _json(
            {
                "name": "klein-mcp",
                "owner": {"name": "klein-mcp maintainers"},
                "plugins": [
                    {
                        "name": "klein-mcp",
                        "source": f"./{FOLDER.relative_to(ROOT).as_posix()}",
                        "description": DESCRIPTION,
                        "version": __version__,
                    }
                ],
            }
        ),
        FOLDER / ".claude-plugin" / "plugin.json": _json(
            {
                "name": "klein-mcp",
                "version": __version__,
                "description": DESCRIPTION,
                "author": {"name": "klein-mcp maintainers"},
                "license": "Apache-2.0",
                "keywords": ["images", "flux", "klein", "mcp"],
            }
        ),
        FOLDER / ".mcp.json": _json({"mcpServers": {"klein": launch}}),
        **skills,
    }


def skill(prompt: PromptFile) -> str:
    """Return a prompt as SKILL.md: what it takes, then its steps with example values filled in."""
    example = {name: _example(argument) for name, argument in prompt.arguments.items() if argument.default is None}
    takes = "\n".join(f"- `{name}`: {argument.description}" for name, argument in prompt.arguments.items())
    return (
        f"---\nname: {_skill_name(prompt)}\ndescription: {json.dumps(prompt.description, ensure_ascii=False)}\n---\n\n"
        f"# {prompt.title}\n\nAsk for what is missing, and fill in the user's own values:\n\n{takes}\n\n"
        f"The steps below show them with example values.\n\n{prompt.render(example).rstrip()}\n"
    )


def _skill_name(prompt: PromptFile) -> str:
    return prompt.name.replace("_", "-")


def _example(argument: Argument) -> str:
    return "k7f3q2" if argument.complete == IMAGES else argument.complete[0]


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
