"""Records of images that have none in the index."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.contract import image_hash
from klein_mcp.errors import RequestError
from klein_mcp.images.record import Record

_FOLDER = "unsaved"


def set_aside(folder: Path, record: Record, file: Path) -> None:
    """Keep a file that could not be recorded, with its record."""
    waiting = folder / _FOLDER
    waiting.mkdir(mode=0o700, exist_ok=True)
    note = waiting / f"{file.stem}.json"
    note.write_text(json.dumps(asdict(record)), encoding="utf-8")
    os.replace(file, waiting / file.name)


def waiting(folder: Path) -> Iterator[tuple[Record, Path]]:
    """Yield what was set aside."""
    for note in sorted((folder / _FOLDER).glob("*.json")):
        file = note.with_suffix(".png")
        with contextlib.suppress(OSError, ValueError, TypeError):
            values = json.loads(note.read_text(encoding="utf-8"))
            if file.exists():
                yield Record(**{**values, "parents": tuple(values["parents"])}), file


def forget(file: Path) -> None:
    """Delete the note of a file that was taken in."""
    file.with_suffix(".json").unlink(missing_ok=True)


def record_in(file: Path) -> Record | None:
    """Return the record in a file's recipe, None if not whole."""
    from klein_mcp.images import codec

    try:
        data = file.read_bytes()
        name = hashlib.sha256(data).hexdigest()
        if name != file.stem:
            return None
        decoded = codec.decode(data, file.name, None)
    except (OSError, RequestError):
        return None
    recipe = decoded.recipe or {}
    transparent = {} if decoded.alpha is None else {"alpha": True}
    request: Any = recipe.get("request") or recipe.get("order") or {}
    generated = isinstance(request, dict) and "tool" in request
    parents = [parent for parent in recipe.get("parents") or () if isinstance(parent, str)]
    height, width = decoded.image.shape[:2]
    return Record(
        handle=str(recipe.get("image", "")),
        file=name,
        pixels=image_hash(decoded.pixels),
        width=width,
        height=height,
        bytes=len(data),
        created=file.stat().st_mtime,
        client="",  # files do not name it
        tool=str(request["tool"]) if generated else "open",
        source=None,
        prompt=str(recipe.get("prompt") or request.get("prompt") or "") or None if generated else None,
        recipe={**(recipe if generated else {"made": recipe} if recipe else {}), **transparent},
        parents=tuple(parents) if generated else (),
    )


def orphans(files: Path) -> Iterator[Path]:
    """Yield the files of a library, oldest first."""
    found = [path for path in files.glob("*/*.png") if re.fullmatch("[0-9a-f]{64}", path.stem)]
    yield from sorted(found, key=lambda path: path.stat().st_mtime)
