"""The MCP server over stdio, with an introduction on a terminal."""

import json
import sys

from klein_mcp import __version__
from klein_mcp.settings import Settings

INTRODUCTION = """\
klein-mcp {version} is an MCP server: a program (Claude, VS Code, Cursor, an agent of yours) starts it and talks to it
over stdin and stdout. There is nothing to type here; add it to such a program:

  claude mcp add klein -- {command}
  codex mcp add klein -- {command}
  {configuration}

Or try it: `klein-mcp demo`, `klein-mcp paint "an apple on a yellow background"`, `klein-mcp --help`. Ctrl-D ends it.
"""


def run(settings: Settings) -> int:
    """Serve until the client closes stdin."""
    if sys.stdin.isatty():
        print(introduction(), file=sys.stderr)
    from klein_mcp.mcp_server import stdio

    return stdio.run(settings)


def introduction() -> str:
    """Return how to add this server to the common clients."""
    from klein_mcp.cli.terminal import shell_line, stable_command

    command = stable_command()
    launch = {"command": command[0], "args": command[1:]}
    configuration = json.dumps({"mcpServers": {"klein": launch}})
    return INTRODUCTION.format(version=__version__, command=shell_line(command), configuration=configuration)
