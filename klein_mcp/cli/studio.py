"""`klein-mcp studio`: serves the studio and opens it in the browser."""

import argparse
import sys
from typing import TYPE_CHECKING

from klein_mcp.cli.arguments import port
from klein_mcp.settings import Settings

if TYPE_CHECKING:
    from klein_mcp.http.surface import HttpContext


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=port, default=0, help="default: a free one")
    parser.add_argument("--no-browser", action="store_true", help="print the link, which works once, and open nothing")


def run(settings: Settings, arguments: argparse.Namespace) -> int:
    from klein_mcp.http import app

    def ready(context: "HttpContext", url: str) -> None:
        open_link(context, url, browser=not arguments.no_browser)

    return app.run(settings, app.HttpOptions(port=arguments.port), ready)


def open_link(context: "HttpContext", url: str, *, browser: bool) -> None:
    """Open the one-time link, or print it on its own line."""
    import webbrowser

    from klein_mcp.http import studio

    link = studio.link(context, url)
    if browser and webbrowser.open(link):
        print(f"The studio is open in your browser, served at {url}. Ctrl-C ends it.", file=sys.stderr)
        return
    print("Open this link in a browser on this machine. It works once. Ctrl-C ends the studio.", file=sys.stderr)
    print(link, flush=True)
