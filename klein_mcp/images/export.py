"""A picture into the user's project: inside an allowed folder, under a new name, whole or not at all."""

import contextlib
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath

from klein_mcp.errors import Refused, RequestError, did_you_mean, shown
from klein_mcp.images import codec
from klein_mcp.images.library import Record, Store

_SUFFIXES: dict[str, codec.Format] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
ALLOW = (
    "The user can allow a folder with KLEIN_WRITE_ROOTS=/path/to/project in this server's environment "
    '("env" in a client\'s configuration).'
)


@dataclass(frozen=True, slots=True)
class SaveOptions:
    """path: as the caller wrote it; a relative one counts from the first allowed folder."""

    path: str
    format: codec.Format | None = None
    max_size: int | None = None
    strip_metadata: bool = False
    overwrite: bool = False


@dataclass(frozen=True, slots=True)
class Saved:
    path: Path
    format: codec.Format
    width: int
    height: int
    bytes: int


def save(store: Store, record: Record, wish: SaveOptions, roots: Iterable[Path]) -> Saved:
    """roots: folders that may be written into. Raises RequestError. Blocking."""
    target, kind = resolve(wish, record.handle, tuple(roots))
    try:
        data, width, height = _rendered(store, record, wish, kind)
    except ValueError as problem:
        raise RequestError(f"{kind} cannot hold it: {problem}.", hint="Choose png, or a max_size.") from None
    try:
        _write(target, data, wish.overwrite)
    except FileExistsError:
        raise RequestError(f"{target} exists.", hint="Choose another name, or say overwrite: true.") from None
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise RequestError(f"{target} cannot be written: {reason}.", hint="Choose another path.") from None
    return Saved(target, kind, width, height, len(data))


def resolve(wish: SaveOptions, handle: str, roots: tuple[Path, ...]) -> tuple[Path, codec.Format]:
    """Where the file will really lie, links followed, and in which format. Raises RequestError."""
    if not roots:
        raise Refused("No folder is open for writing here.", hint=ALLOW)
    if any(ord(letter) < 32 for letter in wish.path):
        raise RequestError("path has control characters in it.")
    try:
        path = Path(wish.path).expanduser()
    except RuntimeError:
        raise RequestError(f"{wish.path} begins with a user there is not.", hint="Give an absolute path.") from None
    if ".." in PurePath(wish.path).parts:
        raise Refused(f"{wish.path} goes up with '..'.", hint="Give the folder itself.")
    if not path.is_absolute():
        path = roots[0] / path
    try:
        if wish.path.endswith(("/", os.sep)) or path.is_dir():
            path = path / f"{handle}.{'jpg' if wish.format == 'jpeg' else wish.format or 'png'}"
        path, kind = _with_suffix(path, wish.format)
        real = path.parent.resolve() / path.name
        inside = any(real.parent.is_relative_to(root.resolve()) for root in roots)
    except (OSError, RuntimeError, ValueError) as problem:  # a name too long, a loop of links
        raise RequestError(f"{shown(wish.path)} is no usable path: {problem}.") from None
    if not inside:
        folders = ", ".join(map(str, roots))
        raise Refused(f"{path} is outside the folders that may be written ({folders}).", hint=ALLOW)
    return real, kind


def _with_suffix(path: Path, asked: codec.Format | None) -> tuple[Path, codec.Format]:
    kind = _SUFFIXES.get(path.suffix.lower())
    if kind is None and path.suffix and asked is None:
        meant = did_you_mean(path.suffix.lower(), _SUFFIXES)
        raise RequestError(f"{path.name} ends in {path.suffix}; it can be {', '.join(_SUFFIXES)}. {meant}")
    if kind is None:
        kind = asked or "png"
        return path.with_name(path.name + (".jpg" if kind == "jpeg" else f".{kind}")), kind
    if asked is not None and asked != kind:
        raise RequestError(f"{path.name} says {kind}, format says {asked}.", hint="Leave out format, or rename.")
    return path, kind


def _rendered(store: Store, record: Record, wish: SaveOptions, kind: codec.Format) -> tuple[bytes, int, int]:
    """The library's own bytes where nothing is to be changed."""
    data = store.read(record)
    longest = max(record.width, record.height)
    smaller = wish.max_size is not None and wish.max_size < longest
    if kind == "png" and not smaller and not wish.strip_metadata:
        return data, record.width, record.height
    image = codec.decode(data, record.handle).image
    if smaller and wish.max_size:
        image = codec.fitted(image, wish.max_size)
    height, width = image.shape[:2]
    return codec.encode(image, kind, None if wish.strip_metadata else record.provenance), width, height


def _write(target: Path, data: bytes, overwrite: bool) -> None:
    """First beside its place under another name, then there at once. Raises FileExistsError."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise OSError("a file is where its folder should be") from None
    if target.parent.resolve() != target.parent:
        raise OSError("the folder was replaced by a link meanwhile")
    if not overwrite and os.path.lexists(target):
        raise FileExistsError
    beside = target.parent / f".{target.name[:100]}.{secrets.token_hex(4)}"
    try:
        with open(beside, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            os.replace(beside, target)
        else:
            _appear(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def _appear(beside: Path, target: Path) -> None:
    """A hard link fails where a name is taken, even by somebody quicker; some file systems have none."""
    with contextlib.suppress(PermissionError, NotImplementedError):
        try:
            os.link(beside, target)
            return
        except OSError as problem:
            if isinstance(problem, FileExistsError):
                raise
    with open(target, "xb") as file:
        file.write(beside.read_bytes())
