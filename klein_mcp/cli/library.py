"""The library in the terminal: list, info, replay, prune. Each takes what the command line said; errors are raised."""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from klein_mcp.cli.terminal import ProgressBar, harmless
from klein_mcp.errors import RequestError, UnknownImage, one_line, shown
from klein_mcp.images.library import ALPHABET, HANDLE_LENGTH, Record, Store
from klein_mcp.settings import Settings

_SECONDS = {"h": 3600.0, "d": 86400.0, "w": 604800.0, "m": 30 * 86400.0, "y": 365 * 86400.0}
_BYTES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}

_LONGEST = 20_000
"""Characters of one fact that `info` prints: more than a prompt may have, less than a stranger's file may."""
_DEEPEST = 8
"""Spaces of indentation; our own recipes take 4."""


def age(text: str) -> float:
    """ "30d" in seconds. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([hdwmy])", text.strip().lower())
    if not match:
        raise ValueError(f"{text!r} is no age like 12h, 30d, 2w, 6m or 1y")
    return float(match[1]) * _SECONDS[match[2]]


def size(text: str) -> int:
    """ "5GB" in bytes. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(kb|mb|gb|tb|k|m|g|t|b|)", text.strip().lower())
    if not match:
        raise ValueError(f"{text!r} is no size like 500MB or 5GB")
    return int(float(match[1]) * _BYTES[match[2][:1].replace("b", "")])


def show(settings: Settings, *, search: str = "", limit: int = 20, as_json: bool = False) -> int:
    """`klein-mcp list`: newest first."""
    store = Store(settings.library)
    page, following = store.search(search, limit=limit)
    if as_json:
        print(json.dumps([_told(store, record) for record in page]))
    elif not page:
        print("no pictures" + (f" with {search!r}" if search else "") + f" in {settings.library}")
    else:
        for record in page:
            made = f"{record.tool} {'← ' + ' '.join(record.parents) if record.parents else ''}".strip()
            words = one_line(harmless(record.prompt or record.source or ""), 60)
            print(f"{record.handle}  {_day(record.created)}  {record.width}×{record.height}  {made}  {words}")
        if following is not None:
            print(f"… more with --limit {2 * limit}")
    store.close()
    return 0


def info(settings: Settings, target: str, *, as_json: bool = False) -> int:
    """`klein-mcp info FILE or HANDLE`: how it was made, and from what."""
    store = Store(settings.library)
    try:
        with in_a_terminal():
            known = Path(target).expanduser().exists()
            if not known:
                _expect_handle(store, target)
            told = _of_file(store, Path(target)) if known else _told(store, store.get(target))
    finally:
        store.close()
    if as_json:
        print(json.dumps(told))
    else:
        print("\n".join(_in_words(told)))
    return 0


def _in_words(told: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """A line for each fact; what belongs to one of them is indented below it."""
    for name, value in told.items():
        label = f"{indent}{one_line(harmless(name.replace('_', ' ')), 60)}:"
        if isinstance(value, Mapping) and value and len(indent) < _DEEPEST:
            yield label
            yield from _in_words(value, indent + "  ")
        else:
            yield f"{label} {_word(value)}"


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        value = ", ".join(str(each) if isinstance(each, list) else _word(each) for each in value)
    return "none" if value is None or value in ("", {}) else one_line(harmless(str(value)), _LONGEST)


def prune(
    settings: Settings,
    *,
    older_than: float | None = None,
    max_size: int | None = None,
    yes: bool = False,
    as_json: bool = False,
    ask: Callable[[str], str] = input,
) -> int:
    """`klein-mcp prune`: deletes the oldest pictures' files, after asking. older_than: seconds; max_size: bytes."""
    store = Store(settings.library)
    try:
        chosen = too_many(store.everything(), older_than=older_than, max_size=max_size, now=time.time())
        total = sum(record.bytes for record in chosen)
        summary = f"{len(chosen)} pictures, {total / 1e6:.1f} MB"
        if chosen and not yes:
            if not sys.stdin.isatty() and ask is input:
                raise RequestError(f"Nothing was deleted: {summary} would be.", hint="Say --yes to delete them.")
            oldest, newest = _day(chosen[0].created), _day(chosen[-1].created)
            if ask(f"Delete {summary}, from {oldest} to {newest}? [y/N] ").strip().lower() not in ("y", "yes"):
                print("nothing was deleted")
                return 1
        store.delete([record.handle for record in chosen])
    finally:
        store.close()
    handles = [record.handle for record in chosen]
    print(json.dumps({"deleted": handles, "bytes": total}) if as_json else f"deleted {summary}")
    return 0


def too_many(records: Sequence[Record], *, older_than: float | None, max_size: int | None, now: float) -> list[Record]:
    """Of pictures from oldest to newest, those that are too old, and then the oldest until the rest is small enough."""
    left = sum(record.bytes for record in records)
    chosen = []
    for record in records:
        too_old = older_than is not None and now - record.created > older_than
        too_large = max_size is not None and left > max_size
        if too_old or too_large:
            chosen.append(record)
            left -= record.bytes
    return chosen


def replay(
    settings: Settings, handle: str, *, onto: str | None = None, seed: int | None = None, as_json: bool = False
) -> int:
    """`klein-mcp replay`: paints a picture's history again with this machine's engine."""
    import anyio

    from klein_mcp.daemon.client import DaemonBackend
    from klein_mcp.jobs.context import CallContext
    from klein_mcp.jobs.replay import changed_weights, plan
    from klein_mcp.jobs.replay import replay as paint_again
    from klein_mcp.jobs.service import Service

    if onto is not None and Path(onto).expanduser().exists():
        onto = str(Path(onto).expanduser().resolve())  # a terminal has a working directory; a reference has none

    async def work() -> int:
        backend = DaemonBackend(settings)
        service = Service(settings, backend)
        try:
            _expect_handle(service.store, handle)
            steps = plan(service.store, handle, onto=onto is not None).steps
            with ProgressBar("starting the engine") as bar:

                async def tell(done: float, total: float, words: str) -> None:
                    bar.tell(done / total, words)

                made = await paint_again(service, handle, CallContext("replay", tell=tell), onto=onto, seed=seed)
            told = [_told(service.store, one.record) for one in made]
            others = changed_weights(steps, made)
        finally:
            await backend.aclose()
            service.close()
        if as_json:
            print(json.dumps(told))
        else:
            for old, new in zip(steps, told, strict=True):
                print(f"{old.handle} → {new['image']}  {one_line(harmless(str(new['prompt'])), 60)}")
            print(told[-1]["path"])
        if others:
            print(f"painted with other weights than the first time: {', '.join(others)}", file=sys.stderr)
        return 0

    with in_a_terminal():
        return anyio.run(work)


@contextmanager
def in_a_terminal() -> Iterator[None]:
    """Where the tools point to a tool that lists pictures, a person has a command."""
    try:
        yield
    except UnknownImage as problem:
        raise UnknownImage(problem.message, hint=problem.hint.replace("list_images", "klein-mcp list")) from None


def _expect_handle(store: Store, name: str) -> None:
    """Raises UnknownImage for what cannot be one, each with its own way out."""
    if re.fullmatch(rf"[{ALPHABET}]{{{HANDLE_LENGTH}}}", name):
        return
    if re.fullmatch(r"last(~\d+)?", name):
        raise UnknownImage(f"{name} is for MCP clients.", hint="list_images shows handles.")
    if Path(name).expanduser().is_file():
        handle = _of_file(store, Path(name))["in_library"]
        known = f"that of {name} is {handle}." if handle else f"{name} is not in the library."
        raise UnknownImage(f"This takes a handle; {known}", hint="" if handle else "list_images shows all.")
    raise UnknownImage(f"There is no file or handle {shown(name)}.", hint="list_images shows handles.")


def _told(store: Store, record: Record) -> dict[str, Any]:
    return {
        "image": record.handle,
        "path": str(store.path(record)),
        "width": record.width,
        "height": record.height,
        "bytes": record.bytes,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
        "tool": record.tool,
        "prompt": record.prompt,
        "source": record.source,
        "parents": list(record.parents),
        "ancestors": _ancestors(store, record),
        "recipe": dict(record.recipe),
    }


def _of_file(store: Store, path: Path) -> dict[str, Any]:
    """What the file itself says, and what the library knows of its pixels."""
    from klein_mcp.images import codec, resolver

    decoded = codec.decode(path.expanduser().read_bytes(), str(path))
    recipe = decoded.recipe or {}
    known = store.by_pixels(resolver.fingerprint(decoded.image)) or store.find(str(recipe.get("image", "")))
    height, width = decoded.image.shape[:2]
    return {
        "file": str(path),
        "width": width,
        "height": height,
        "made_by_klein_mcp": decoded.recipe is not None,
        "recipe": recipe,
        "in_library": known.handle if known else None,
        "ancestors": _ancestors(store, known) if known else [],
    }


def _ancestors(store: Store, record: Record) -> list[str]:
    """Handles, nearest first."""
    found: dict[str, None] = {}
    waiting = list(record.parents)
    while waiting:
        handle = waiting.pop(0)
        if handle not in found and (parent := store.find(handle)) is not None:
            found[handle] = None
            waiting += parent.parents
    return list(found)


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
