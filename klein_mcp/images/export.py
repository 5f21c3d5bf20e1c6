"""Save an image into an allowed folder, atomically."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath

from klein_mcp.atomic import write_new_or_replace
from klein_mcp.errors import Refused, RequestError, did_you_mean, quote
from klein_mcp.images import codec, credentials
from klein_mcp.images.library import Record, Store
from klein_mcp.images.paths import look_alike, unwrap

_SUFFIXES: dict[str, codec.Format] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
ALLOW = (
    "The user can allow a folder with KLEIN_WRITE_ROOTS=/path/to/project in this server's environment "
    '("env" in a client\'s configuration).'
)


@dataclass(frozen=True, slots=True)
class SaveOptions:
    """Options of one save.

    path: as the caller wrote it; a relative one starts at the first allowed folder.
    max_size: long edge to shrink to. size: long edge to shrink or enlarge to.
    """

    path: str
    format: codec.Format | None = None
    max_size: int | None = None
    strip_metadata: bool = False
    overwrite: bool = False
    size: int | None = None


@dataclass(frozen=True, slots=True)
class SavedFile:
    """A file that was written."""

    path: Path
    format: codec.Format
    width: int
    height: int
    bytes: int


def save(
    store: Store,
    record: Record,
    options: SaveOptions,
    roots: Iterable[Path],
    signer: credentials.CredentialSigner | None = None,
) -> SavedFile:
    """Write the image below one of `roots`. Raises RequestError. Blocking.

    signer: signs the file, unless its metadata is stripped.
    """
    root, target, kind = resolve(options, record.handle, tuple(filter(Path.is_dir, roots)))
    try:
        data, width, height = _rendered(store, record, options, kind)
        if signer is not None and not options.strip_metadata:
            data = credentials.sign_record(store, record, data, f"image/{kind}", signer)
    except ValueError as error:
        raise RequestError(f"{kind} cannot store it: {error}.", hint="Choose png, or a max_size.") from None
    try:
        write_new_or_replace(root, target, data, overwrite=options.overwrite)
    except FileExistsError:
        raise RequestError(f"{target} exists.", hint="Choose another name, or say overwrite: true.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"{target} cannot be written: {reason}.", hint="Choose another path.") from None
    return SavedFile(target, kind, width, height, len(data))


def resolve(options: SaveOptions, handle: str, roots: tuple[Path, ...]) -> tuple[Path, Path, codec.Format]:
    """Return root, final path (links resolved) and format. Raises RequestError."""
    if not roots:
        raise Refused("No folder is open for writing here, or none of them exists.", hint=ALLOW)
    if any(ord(letter) < 32 for letter in options.path):
        raise RequestError("path has control characters in it.")
    try:
        path = Path(unwrap(options.path)).expanduser()
    except RuntimeError:
        raise RequestError(f"{options.path} begins with an unknown user.", hint="Give an absolute path.") from None
    if ".." in PurePath(options.path).parts:
        raise Refused(f"{options.path} goes up with '..'.", hint="Give the folder itself.")
    if not path.is_absolute():
        path = roots[0] / path
    try:
        if options.path.endswith(("/", os.sep)) or path.is_dir():
            path = path / f"{handle}.{'jpg' if options.format == 'jpeg' else options.format or 'png'}"
        path, kind = _with_suffix(path, options.format)
        path = look_alike(path.parent) / path.name
        real = path.parent.resolve() / path.name
        root = next((root for root in map(Path.resolve, roots) if real.parent.is_relative_to(root)), None)
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, a loop of links
        raise RequestError(f"{quote(options.path)} is no usable path: {error}.") from None
    if root is None:
        folders = ", ".join(map(str, roots))
        raise Refused(f"{path} is outside the folders that may be written ({folders}).", hint=ALLOW)
    return root, real, kind


def _with_suffix(path: Path, asked: codec.Format | None) -> tuple[Path, codec.Format]:
    kind = _SUFFIXES.get(path.suffix.lower())
    if kind is None and path.suffix and asked is None:
        suggestion = did_you_mean(path.suffix.lower(), _SUFFIXES)
        raise RequestError(f"{path.name} ends in {path.suffix}; it can be {', '.join(_SUFFIXES)}. {suggestion}")
    if kind is None:
        kind = asked or "png"
        return path.with_name(path.name + (".jpg" if kind == "jpeg" else f".{kind}")), kind
    if asked is not None and asked != kind:
        raise RequestError(f"{path.name} ends like {kind}, but format is {asked}.", hint="Leave out format, or rename.")
    return path, kind


def _rendered(store: Store, record: Record, options: SaveOptions, kind: codec.Format) -> tuple[bytes, int, int]:
    """Return (bytes, width, height): the library's own bytes if nothing changes."""
    data = store.read(record)
    longest = max(record.width, record.height)
    wanted = options.size or min(longest, options.max_size or longest)
    if kind == "png" and wanted == longest and not options.strip_metadata:
        return data, record.width, record.height
    image = codec.decode(data, record.handle).image
    if wanted != longest:
        image = codec.enlarge(image, wanted) if wanted > longest else codec.fit(image, wanted)
    height, width = image.shape[:2]
    return codec.encode(image, kind, None if options.strip_metadata else record.provenance), width, height
