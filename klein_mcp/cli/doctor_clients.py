"""The doctor's search for this server in clients' configurations."""

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from klein_mcp.cli.doctor_files import Check
from klein_mcp.cli.terminal import shell_line, stable_command
from klein_mcp.private import decode_text

PROGRAM_DATA = (".config", "Library/Application Support", "AppData/Roaming")
"""Where desktop programs keep their settings on Linux, macOS and Windows."""

CONFIGURATIONS = {
    "Claude Code": (".claude.json",),
    "Claude Desktop": tuple(f"{folder}/Claude/claude_desktop_config.json" for folder in PROGRAM_DATA),
    "Codex": (".codex/config.toml",),
    "Cursor": (".cursor/mcp.json",),
    "Gemini CLI": (".gemini/settings.json",),
    "Zed": (".config/zed/settings.json", "AppData/Roaming/Zed/settings.json"),
    "VS Code": tuple(f"{folder}/Code/User/mcp.json" for folder in PROGRAM_DATA),
    "LM Studio": (".lmstudio/mcp.json",),
}
"""Clients' configuration files under the home folder; configurations per project are not searched."""

SERVERS = ("mcpServers", "servers", "mcp_servers", "context_servers")
"""Keys under which clients list their servers by name."""

_PROGRAM = re.compile(r"klein[-_]mcp(\.exe)?", re.IGNORECASE)
_JSON_WITH_COMMENTS = re.compile(r'("(?:\\.|[^"\\])*")|//[^\n]*|/\*.*?\*/', re.DOTALL)
_TRAILING_COMMA = re.compile(r'("(?:\\.|[^"\\])*")|,(?=\s*[}\]])')


def check_clients(home: Path) -> Check:
    """Name the clients whose configuration starts this server."""
    installed = {
        name: home / path for name, paths in CONFIGURATIONS.items() for path in paths if (home / path).is_file()
    }
    configured = [
        name for name, path in installed.items() if any(_is_ours(*server) for server in _servers(_parsed(path)))
    ]
    if configured:
        return Check("clients", f"configured in {', '.join(configured)}")
    found = f"not configured in {', '.join(installed)}" if installed else "no client's configuration found"
    todo = f"Add it, for example: claude mcp add klein -- {shell_line(stable_command())}"
    return Check("clients", found, todo, optional=True)


def _parsed(path: Path) -> Any:
    """Return what a configuration holds, None if nobody could read it."""
    try:
        text = decode_text(path.read_bytes())
        if path.suffix == ".toml":
            return tomllib.loads(text)
        # Zed and VS Code allow comments, and a comma before a closing bracket.
        for allowed in (_JSON_WITH_COMMENTS, _TRAILING_COMMA):
            text = allowed.sub(lambda match: match[1] or "", text)
        return json.loads(text)
    except (OSError, ValueError, RecursionError):
        return None


def _servers(found: Any) -> Iterator[tuple[str, Any]]:
    """Yield every server's name and entry, those of projects too."""
    for key, value in found.items() if isinstance(found, dict) else ():
        if key in SERVERS and isinstance(value, dict):
            yield from value.items()
        else:
            yield from _servers(value)


def _is_ours(name: str, entry: Any) -> bool:
    """Whether an entry starts this program.

    One without a command is a URL: its name tells.
    """
    if not isinstance(entry, dict):
        return False
    words = [*_words(entry.get("command")), *_words(entry.get("args"))]
    return any(map(_is_program, words)) if words else "klein" in name.lower()


def _is_program(word: str) -> bool:
    """Whether a word of a command is this program, not a folder."""
    name = re.split(r"[\\/]", word)[-1]
    return _PROGRAM.fullmatch(name) is not None and (word == name or not Path(word).is_dir())


def _words(found: Any) -> Iterator[str]:
    """Yield the words of a command, which may be a whole line."""
    if isinstance(found, str):
        yield from found.split()
    elif isinstance(found, list | dict):
        for value in found.values() if isinstance(found, dict) else found:
            yield from _words(value)
