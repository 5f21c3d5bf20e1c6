"""`klein-mcp serve`: the MCP server over HTTP."""

import argparse
import sys

from klein_mcp.cli.arguments import local_path, port
from klein_mcp.settings import Settings


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on, any but loopback with a token; default: 127.0.0.1"
    )
    parser.add_argument("--port", type=port, default=8765, help="default: 8765; 0: a free one, which is printed")
    parser.add_argument("--token-file", type=local_path, metavar="F", help="file with the token that clients must send")
    parser.add_argument("--allowed-host", action="append", default=[], metavar="H", help="name clients reach it by")


def run(settings: Settings, arguments: argparse.Namespace) -> int:
    from klein_mcp.http import app

    try:
        options = app.HttpOptions.from_arguments(arguments)
    except ValueError as error:
        print("klein-mcp serve:", error, file=sys.stderr)
        return 2
    return app.run(settings, options, invites=True)
