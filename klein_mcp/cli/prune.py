"""`klein-mcp prune`: delete the files of the oldest images, after asking."""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence

from klein_mcp import __version__
from klein_mcp.cli import terminal
from klein_mcp.cli.arguments import age, byte_size
from klein_mcp.cli.records import local_day
from klein_mcp.errors import RequestError
from klein_mcp.images.library import Record, Store
from klein_mcp.settings import Settings


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--older-than", type=age, metavar="AGE", help="such as 12h, 30d, 2w, 6m (months) or 1y")
    parser.add_argument(
        "--max-size", type=byte_size, metavar="SIZE", help="what may stay, such as 5GB; the oldest go first"
    )
    parser.add_argument("--yes", action="store_true", help="do not ask")


def run(settings: Settings, arguments: argparse.Namespace) -> int:
    if arguments.older_than is None and arguments.max_size is None:
        print("klein-mcp prune: say --older-than 30d, or --max-size 5GB, or both.", file=sys.stderr)
        return 2
    remove_old_caches(settings)
    return prune(
        settings,
        older_than=arguments.older_than,
        max_size=arguments.max_size,
        yes=arguments.yes,
        as_json=arguments.json,
    )


def remove_old_caches(settings: Settings) -> None:
    """Delete the compilers' caches of other versions, which nothing reads any more."""
    if settings.compile_cache.is_dir():
        for folder in settings.compile_cache.iterdir():
            if folder.name != __version__:
                shutil.rmtree(folder, ignore_errors=True)


def prune(
    settings: Settings,
    *,
    older_than: float | None = None,
    max_size: int | None = None,
    yes: bool = False,
    as_json: bool = False,
    ask: Callable[[str], str] = terminal.ask,
) -> int:
    """Delete images older than `older_than` seconds, then the oldest beyond `max_size` bytes."""
    store = Store(settings.library)
    try:
        chosen = select_for_deletion(store.everything(), older_than=older_than, max_size=max_size, now=time.time())
        total = sum(record.bytes for record in chosen)
        summary = f"{len(chosen)} images, {total / 1e6:.1f} MB"
        if chosen and not yes:
            if not sys.stdin.isatty() and ask is terminal.ask:
                raise RequestError(f"Nothing was deleted: {summary} would be.", hint="Say --yes to delete them.")
            oldest, newest = local_day(chosen[0].created), local_day(chosen[-1].created)
            if ask(f"Delete {summary}, from {oldest} to {newest}? [y/N]").lower() not in ("y", "yes"):
                print("klein-mcp: nothing was deleted", file=sys.stderr)
                if as_json:
                    print(json.dumps({"deleted": [], "bytes": 0}))
                return 1
        store.delete([record.handle for record in chosen])
    finally:
        store.close()
    handles = [record.handle for record in chosen]
    print(json.dumps({"deleted": handles, "bytes": total}) if as_json else f"deleted {summary}")
    return 0


def select_for_deletion(
    records: Sequence[Record], *, older_than: float | None, max_size: int | None, now: float
) -> list[Record]:
    """Choose images that are too old, then the oldest beyond `max_size`.

    records: from oldest to newest.
    """
    remaining = sum(record.bytes for record in records)
    chosen = []
    for record in records:
        too_old = older_than is not None and now - record.created > older_than
        too_large = max_size is not None and remaining > max_size
        if too_old or too_large:
            chosen.append(record)
            remaining -= record.bytes
    return chosen
