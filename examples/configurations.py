"""Write the configuration that starts klein-mcp for each MCP client.

The command is the same; each client has its own format. Each format can also be read back.

python -m examples.configurations                       write examples/clients/
python -m examples.configurations /opt/klein/bin/klein-mcp   print them all for a command of your own
"""

import base64
import json
import shlex
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

NAME = "klein"
"""Name under which the tools appear. klein_compose_references is the longest, far below Cursor's limit of 60."""
FOLDER = Path(__file__).parent / "clients"


@dataclass(frozen=True, slots=True)
class Launch:
    """The command that a client runs."""

    command: str
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the form that most clients use, without an empty environment."""
        return {"command": self.command, "args": [*self.args], **({"env": dict(self.env)} if self.env else {})}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Launch":
        return cls(value["command"], tuple(value.get("args", ())), value.get("env", {}))


LAUNCH = Launch("uvx", ("klein-mcp",))


@dataclass(frozen=True, slots=True)
class Client:
    """An MCP client and its configuration file.

    write(launch): the content of `file`, or the command after `$ ` in a terminal. read(text): the launch in it.
    where: the place a user puts it.
    """

    title: str
    file: str
    where: str
    write: Callable[[Launch], str]
    read: Callable[[str], Launch]


def _json(*path: str, **more: Any) -> tuple[Callable[[Launch], str], Callable[[str], Launch]]:
    """Return writer and reader of a JSON configuration.

    The launch is at `path`, with `more` beside it.
    """

    def write(launch: Launch) -> str:
        value: Any = {**more, **launch.to_json()}
        for key in reversed((*path, NAME)):
            value = {key: value}
        return json.dumps(value, indent=2) + "\n"

    def read(text: str) -> Launch:
        value = json.loads(text)
        for key in (*path, NAME):
            value = value[key]
        return Launch.from_json(value)

    return write, read


def _codex(launch: Launch) -> str:
    lines = [f"[mcp_servers.{NAME}]", f"command = {_toml(launch.command)}", f"args = {_toml([*launch.args])}"]
    lines += ["startup_timeout_sec = 60", "tool_timeout_sec = 120"]
    if launch.env:
        lines.append(f"env = {{ {', '.join(f'{key} = {_toml(value)}' for key, value in launch.env.items())} }}")
    return "\n".join(lines) + "\n"


def _toml(value: str | list[str]) -> str:
    """Return a string or list as TOML.

    JSON has the same form, except for characters beyond 16 bits, which are not escaped.
    """
    return json.dumps(value, ensure_ascii=False)


def _read_codex(text: str) -> Launch:
    return Launch.from_json(tomllib.loads(text)["mcp_servers"][NAME])


def _goose(launch: Launch) -> str:
    extension = {
        "name": NAME,
        "type": "stdio",
        "enabled": True,
        "cmd": launch.command,
        "args": [*launch.args],
        "envs": dict(launch.env),
        "timeout": 300,
    }
    return yaml.safe_dump({"extensions": {NAME: extension}}, sort_keys=False)


def _read_goose(text: str) -> Launch:
    extension = yaml.safe_load(text)["extensions"][NAME]
    return Launch(extension["cmd"], tuple(extension["args"]), extension["envs"])


CLIENTS = (
    Client(
        "Claude Desktop",
        "claude_desktop_config.json",
        "Settings → Developer → Edit Config",
        *_json("mcpServers"),
    ),
    Client("Claude Code", ".mcp.json", "`.mcp.json` in the project", *_json("mcpServers", type="stdio")),
    Client("VS Code", "vscode-mcp.json", "`.vscode/mcp.json` in the project", *_json("servers", type="stdio")),
    Client("Cursor", "cursor-mcp.json", "`~/.cursor/mcp.json`", *_json("mcpServers")),
    Client("Codex", "codex-config.toml", "`~/.codex/config.toml`", _codex, _read_codex),
    Client("Gemini CLI", "gemini-settings.json", "`~/.gemini/settings.json`", *_json("mcpServers", timeout=120_000)),
    Client("Goose", "goose-config.yaml", "`~/.config/goose/config.yaml`", _goose, _read_goose),
    Client("Zed", "zed-settings.json", "`zed: open settings file`", *_json("context_servers")),
    Client("LM Studio", "lmstudio-mcp.json", "Program → Install → Edit mcp.json", *_json("mcpServers")),
)


def _terminal(*program: str, env: str) -> tuple[Callable[[Launch], str], Callable[[str], Launch]]:
    """Return writer and reader of a terminal command.

    Its form is `program … klein ENV -- command arguments`. env: the option that takes one KEY=VALUE.
    """

    def write(launch: Launch) -> str:
        given = [part for key, value in launch.env.items() for part in (env, f"{key}={value}")]
        return shlex.join([*program, NAME, *given, "--", launch.command, *launch.args])

    def read(text: str) -> Launch:
        words = shlex.split(text)
        at = words.index("--")
        given = words[len(program) + 1 : at]
        pairs = (word.split("=", 1) for option, word in zip(given[::2], given[1::2], strict=True) if option == env)
        return Launch(words[at + 1], tuple(words[at + 2 :]), dict(pairs))

    return write, read


COMMANDS = {
    "Claude Code": _terminal("claude", "mcp", "add", env="-e"),
    "Codex": _terminal("codex", "mcp", "add", env="--env"),
}
"""Clients that can also be configured in a terminal."""


def vscode_link(launch: Launch) -> str:
    """Return VS Code's install link.

    It is wrapped in https because GitHub shows no other links.
    """
    asked = quote(json.dumps({"name": NAME, **launch.to_json()}, separators=(",", ":")), safe="")
    return "https://vscode.dev/redirect?url=" + quote(f"vscode:mcp/install?{asked}", safe="")


def read_vscode_link(link: str) -> Launch:
    """Return the launch in an install link."""
    (inner,) = parse_qs(urlsplit(link).query)["url"]
    return Launch.from_json(json.loads(unquote(inner.removeprefix("vscode:mcp/install?"))))


def cursor_link(launch: Launch) -> str:
    """Return Cursor's install link.

    cursor.com forwards it to cursor://anysphere.cursor-deeplink/mcp/install.
    """
    asked = base64.b64encode(json.dumps(launch.to_json(), separators=(",", ":")).encode()).decode()
    return f"https://cursor.com/en/install-mcp?name={NAME}&config={quote(asked, safe='')}"


def read_cursor_link(link: str) -> Launch:
    """Return the launch in an install link."""
    (asked,) = parse_qs(urlsplit(link).query)["config"]
    return Launch.from_json(json.loads(base64.b64decode(asked)))


def files(launch: Launch = LAUNCH) -> dict[Path, str]:
    """Return the files of examples/clients/."""
    return {FOLDER / client.file: client.write(launch) for client in CLIENTS}


def main(words: list[str]) -> None:
    """Write the folder, or print everything for the given command."""
    if not words:
        for path, text in files().items():
            path.write_text(text, encoding="utf-8")
        return
    launch = Launch(words[0], tuple(words[1:]))
    for client in CLIENTS:
        print(f"{client.title}: {client.where}\n{client.write(launch)}")
    for title, (write, _) in COMMANDS.items():
        print(f"{title}, in a terminal:\n{write(launch)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
