"""Library records and image files as facts for the terminal."""

import os
import re
import time
from pathlib import Path
from typing import Any

from klein_mcp.errors import UnknownImage, quote
from klein_mcp.images.files import read_regular_file
from klein_mcp.images.library import Store
from klein_mcp.images.paths import expanded
from klein_mcp.images.record import ALPHABET, HANDLE_LENGTH, Record


def is_handle(name: str) -> bool:
    """Return whether `name` may be that of an image of the library."""
    return re.fullmatch(rf"[{ALPHABET}]{{{HANDLE_LENGTH}}}", name) is not None


def expect_handle(store: Store, name: str) -> None:
    """Raise UnknownImage with advice if `name` cannot be a handle."""
    if is_handle(name):
        return
    if re.fullmatch(r"last(~\d+)?", name):
        raise UnknownImage(f"{name} is for MCP clients.", action="list", shows="handles")
    if os.path.isfile(expanded(name)):  # False for a name too long, too
        handle = describe_file(store, expanded(name))["in_library"]
        known = f"that of {name} is {handle}." if handle else f"{name} is not in the library."
        raise UnknownImage(f"This takes a handle; {known}", action="" if handle else "list")
    raise UnknownImage(f"There is no file or handle {quote(name)}.", action="list", shows="handles")


def describe_record(store: Store, record: Record) -> dict[str, Any]:
    """Return all that the library knows about an image."""
    return {
        "image": record.handle,
        "path": _path(store, record),
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


def _path(store: Store, record: Record) -> str | None:
    """Return the path of its file, None if it is missing.

    An image that was in a result has a readable name.
    """
    try:
        file, readable = store.path(record), store.files.short_path(record.handle)
        return str(readable if readable.exists() else file)
    except UnknownImage:
        return None


def describe_file(store: Store, path: Path, home: Path | None = None) -> dict[str, Any]:
    """Return the file's own facts and what the library knows about it.

    home: data folder whose certificate counts as known; None leaves content credentials unchecked.
    """
    from engine.contract import image_hash
    from klein_mcp.images import codec, credentials

    try:
        data = read_regular_file(path.resolve())  # a pipe would block
    except OSError as error:
        reason = "it is a folder" if path.is_dir() else error.strerror or error
        raise UnknownImage(f"{path} cannot be read: {reason}.", hint="Name an image's file or handle.") from None
    decoded = codec.decode(data, str(path), None)
    claim = credentials.describe(data, home) if home else None
    recipe = decoded.recipe or {}
    known = store.by_pixels(image_hash(decoded.pixels)) or store.original(recipe)
    height, width = decoded.image.shape[:2]
    return {
        "file": str(path),
        "width": width,
        "height": height,
        "transparent": decoded.alpha is not None,
        "made_by_klein_mcp": decoded.recipe is not None,
        "recipe": recipe,
        **({"credentials": claim} if claim else {}),
        "in_library": known.handle if known and known.deleted is None else None,
        "ancestors": _ancestors(store, known) if known else [],
    }


def _ancestors(store: Store, record: Record) -> list[str]:
    """Return handles, nearest first."""
    found: dict[str, None] = {}
    waiting = list(record.parents)
    while waiting:
        handle = waiting.pop(0)
        if handle not in found and (parent := store.find(handle)) is not None:
            found[handle] = None
            waiting += parent.parents
    return list(found)


def local_day(seconds: float) -> str:
    """Format a Unix time as local date and minute."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
