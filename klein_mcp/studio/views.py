"""The library in the shapes of the studio's contract.

Blocking: call from a worker thread.
"""

import string
import time
from collections.abc import Sequence
from typing import Any

from klein_mcp.images.library import Store
from klein_mcp.images.record import Record, by_place, sheet_of
from klein_mcp.jobs.replay import can_repeat
from klein_mcp.studio.contract import Card, Changed, ImageDetails, LibraryPage

MOST_RELATIVES = 120
"""Images in one lineage tree; the nearest ones where there are more."""
MOST_DELETED = 500
"""Deleted images that are followed because they connect the others of a tree."""

THUMB_SIDE = 256
"""Pixels: twice the largest tile of the page, for dense screens."""


def card(record: Record, picks: set[str], sheet: str | None = None) -> Card:
    """Return the list entry of an image."""
    recipe = record.recipe
    seed = recipe.get("seed")
    return {
        "image": record.handle,
        "prompt": record.prompt,
        "source": record.source,
        "tool": record.tool,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
        "width": record.width,
        "height": record.height,
        "parents": list(record.parents),
        "seed": None if seed is None else str(seed),
        "model": _text(recipe.get("model")),
        "alpha": record.transparent,
        "picked": record.handle in picks,
        "sheet": sheet,
    }


def library_page(store: Store, *, search: str = "", cursor: str = "", limit: int = 40) -> LibraryPage:
    """Return one page, newest first, without masks.

    cursor: the `next` of the page before, or nothing.
    """
    before = int(cursor) if cursor.isdecimal() and len(cursor) < 19 else None
    records, following = store.search(search, limit=max(1, min(limit, 100)), before=before, masks=False)
    sheets = _sheets(records)
    picks = store.picks.images()
    return {
        "images": [card(record, picks, sheets.get(record.handle)) for record in records],
        "next": None if following is None else str(following),
    }


def image_details(store: Store, handle: str) -> ImageDetails:
    """Return everything the page shows about one image. Raises UnknownImage."""
    record = store.get(handle)
    recipe = record.recipe
    picks = store.picks.images()
    sheet = store.lineage.siblings(record) if record.prompt else []
    labels = {each.handle: _label(place) for place, each in by_place(sheet).items()}
    siblings = list(labels)
    request = recipe.get("request") or recipe.get("order")  # "order": as 0.1 wrote it
    request = request if isinstance(request, dict) else {}
    return {
        **card(record, picks, siblings[0] if len(siblings) > 1 else None),
        "bytes": record.bytes,
        "dtype": _text(recipe.get("dtype")),
        "steps": recipe.get("steps"),
        "region": _list(request.get("region")),
        "mask": _text(request.get("mask")),
        "read_as": _text(recipe.get("read_as")),
        "again": can_repeat(store, record),
        "changed": _changed(recipe.get("changed")),
        "family": _family(store, record, picks),
        "siblings": siblings if len(siblings) > 1 else [],
        "labels": labels,
    }


def _label(place: int) -> str:
    """Return an image's letter on its sheet, as tools label it."""
    return string.ascii_uppercase[place] if place < len(string.ascii_uppercase) else str(place + 1)


def _sheets(records: Sequence[Record]) -> dict[str, str]:
    """Map each image that came with others to the first of them."""
    sheets: dict[str, str] = {}
    for record in records:
        if record.handle not in sheets and record.prompt:
            together = sheet_of(record, records)
            if len(together) > 1:
                sheets |= dict.fromkeys((other.handle for other in together), together[0].handle)
    return sheets


def _family(store: Store, record: Record, picks: set[str]) -> list[Card]:
    """Return the cards of an image's relatives and its own, oldest first.

    Each has its nearest parents that are not deleted.
    """
    found = _relatives(store, record)

    def parents(of: Record) -> list[str]:
        nearest: list[str] = []
        waiting, seen = list(of.parents), {of.handle}
        while waiting:
            parent = found.get(waiting.pop(0))
            if parent is None or parent.handle in seen:
                continue
            seen.add(parent.handle)
            if parent.deleted is None:
                nearest.append(parent.handle)
            else:
                waiting[:0] = parent.parents
        return nearest

    family = sorted((each for each in found.values() if each.deleted is None), key=lambda each: each.created)
    return [{**card(relative, picks), "parents": parents(relative)} for relative in family]


def _relatives(store: Store, record: Record) -> dict[str, Record]:
    """Return the ancestors and the descendants of the oldest, by handle.

    Deleted ones too, since they connect the others.
    """
    found = {record.handle: record}
    room, deleted_room = MOST_RELATIVES - 1, MOST_DELETED

    def add(relatives: Sequence[Record]) -> list[Record]:
        nonlocal room, deleted_room
        new = []
        for each in relatives:
            if each.handle not in found and room > 0 and (each.deleted is None or deleted_room > 0):
                found[each.handle] = each
                new.append(each)
                room -= each.deleted is None
                deleted_room -= each.deleted is not None
        return new

    waiting = [record]
    while waiting:
        parents = [store.find(handle) for handle in waiting.pop(0).parents]
        waiting += add([parent for parent in parents if parent is not None])
    root, line = record, {record.handle}
    while root.parents and (parent := found.get(root.parents[0])) is not None and parent.handle not in line:
        root = parent
        line.add(root.handle)
    # From the image itself first: of a family that is too large, its own descendants matter more than cousins.
    for start in (record, root):
        waiting = [start]
        while waiting and room > 0:
            limit = MOST_RELATIVES + MOST_DELETED
            waiting += add(store.lineage.children(waiting.pop(0).handle, deleted=True, limit=limit))
    return found


def _changed(value: Any) -> Changed | None:
    if isinstance(value, int | float):
        return {"share": float(value), "box": None, "kept": False, "mask": False}
    if not isinstance(value, dict) or not isinstance(value.get("share"), int | float):
        return None
    return {
        "share": float(value["share"]),
        "box": _list(value.get("box")),
        "kept": bool(value.get("kept")),
        "mask": bool(value.get("mask")),
    }


def _list(value: Any) -> list[int] | None:
    return value if value and isinstance(value, list) else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
