"""`klein-mcp list`: the images of the library, newest first."""

import argparse
import json
import sys

from klein_mcp.cli.arguments import count
from klein_mcp.cli.records import describe_record, local_day
from klein_mcp.cli.terminal import strip_control_chars
from klein_mcp.errors import one_line
from klein_mcp.images.library import Store
from klein_mcp.settings import Settings


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--search", default="", metavar="WORDS", help="in the prompt, or part of a path")
    parser.add_argument("--limit", type=count, default=20, metavar="N", help="default: 20")


def run(settings: Settings, arguments: argparse.Namespace) -> int:
    return list_images(settings, search=arguments.search, limit=arguments.limit, as_json=arguments.json)


def list_images(settings: Settings, *, search: str = "", limit: int = 20, as_json: bool = False) -> int:
    store = Store(settings.library)
    page, following = store.search(search, limit=limit)
    if as_json:
        print(json.dumps([describe_record(store, record) for record in page]))
    elif not page:
        print("no images" + (f" with {search!r}" if search else "") + f" in {settings.library}")
    else:
        for record in page:
            made = f"{record.tool} {'← ' + ' '.join(record.parents) if record.parents else ''}".strip()
            words = one_line(strip_control_chars(record.prompt or record.source or ""), 60)
            print(f"{record.handle}  {local_day(record.created)}  {record.width}×{record.height}  {made}  {words}")
        if following is not None:
            print(f"… more with --limit {2 * limit}", file=sys.stderr)
    store.close()
    return 0
