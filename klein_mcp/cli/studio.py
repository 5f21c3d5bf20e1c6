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
    from klein_mcp.http import app, invitations, studio

    if not arguments.port and (link := invitations.fresh_link(settings.home, studio.ENTRY)):
        show(link, browser=not arguments.no_browser, then="klein-mcp serve, which runs already, serves it.")
        return 0

    def ready(context: "HttpContext", url: str) -> None:
        open_link(context, url, browser=not arguments.no_browser)

    return app.run(settings, app.HttpOptions(port=arguments.port), ready)


def open_link(context: "HttpContext", url: str, *, browser: bool) -> None:
    """Open the one-time link, or print it on its own line."""
    from klein_mcp.http import studio

    show(studio.link(context, url), browser=browser, then=f"It is served at {url}. Ctrl-C ends it.")


def show(link: str, *, browser: bool, then: str) -> None:
    """Open a link in the browser, or print it.

    then: what to say besides.
    """
    import webbrowser

    if browser and webbrowser.open(link):
        print(f"The studio is open in your browser. {then}", file=sys.stderr)
        return
    print(f"Open this link in a browser on this machine, within ten minutes. It works once. {then}", file=sys.stderr)
    print(link, flush=True)
