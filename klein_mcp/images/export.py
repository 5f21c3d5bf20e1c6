"""Save an image into an allowed folder, atomically."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from klein_mcp.atomic import write_new_or_replace
from klein_mcp.errors import Refused, RequestError, did_you_mean, quote
from klein_mcp.images import codec, credentials, cutout
from klein_mcp.images.budget import DECODING, MAX_PIXELS
from klein_mcp.images.library import Record, Store
from klein_mcp.images.outputs import SUFFIXES, Format
from klein_mcp.images.paths import candidates, look_alike, unwrap, why_foreign
from klein_mcp.limits import MAX_FILE_BYTES

ALLOW = (
    "The user can allow a folder with KLEIN_WRITE_ROOTS=/path/to/project in this server's environment "
    '("env" in a client\'s configuration).'
)


@dataclass(frozen=True, slots=True)
class SaveOptions:
    """Options of one save.

    path: as the caller wrote it; a relative one starts at the first allowed folder.
    max_size: long edge to shrink to. size: long edge to shrink or enlarge to, within max_size.
    transparent: whether the subject is cut out of a plain background.
    """

    path: str
    format: Format | None = None
    max_size: int | None = None
    strip_metadata: bool = False
    overwrite: bool = False
    size: int | None = None
    transparent: bool = False


@dataclass(frozen=True, slots=True)
class SavedFile:
    """A file that was written.

    alpha: the checks of a transparent one. warnings: what the format or the cut-out could not do.
    """

    path: Path
    format: Format
    width: int
    height: int
    bytes: int
    alpha: Mapping[str, float] | None = None
    warnings: tuple[str, ...] = ()


@dataclass(slots=True)
class _File:
    """The content of a file that is to be written."""

    data: bytes
    width: int
    height: int
    alpha: Mapping[str, float] | None = None
    warnings: list[str] = field(default_factory=list)


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
    file = _rendered(store, record, options, kind)
    if signer is not None and not options.strip_metadata:
        file.data = credentials.sign_record(store, record, file.data, f"image/{kind}", signer)
        if record.tool == "open":
            file.warnings.append(f"{record.handle} was opened, not made here: it is saved without credentials")
    if len(file.data) > MAX_FILE_BYTES:  # no tool could open it again
        raise RequestError(
            f"The file would have {len(file.data) / 2**20:.0f} MiB; at most {MAX_FILE_BYTES // 2**20}.",
            hint="Choose jpeg or webp, or a smaller size.",
        )
    try:
        write_new_or_replace(root, target, file.data, overwrite=options.overwrite)
    except FileExistsError:
        raise RequestError(f"{target} exists.", hint="Choose another name, or say overwrite: true.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        name = quote(target.name, 80) if len(target.name) > 80 else target
        raise RequestError(f"{name} cannot be written: {reason}.", hint="Choose another path.") from None
    return SavedFile(target, kind, file.width, file.height, len(file.data), file.alpha, tuple(file.warnings))


def resolve(options: SaveOptions, handle: str, roots: tuple[Path, ...]) -> tuple[Path, Path, Format]:
    """Return root, final path (links resolved) and format. Raises RequestError."""
    if not roots:
        raise Refused("No folder is open for writing here, or none of them exists.", hint=ALLOW)
    asked = unwrap(options.path)
    path = _written(asked, roots[0])
    try:
        if asked.endswith(("/", os.sep)) or path.is_dir():
            path = path / f"{handle}.{'jpg' if options.format == 'jpeg' else options.format or 'png'}"
        path, kind = _with_suffix(path, options.format)
        path = look_alike(path.parent) / path.name
        real = path.parent.resolve() / path.name
        root = next((root for root in map(Path.resolve, roots) if real.parent.is_relative_to(root)), None)
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, a loop of links
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"{quote(options.path)} is no usable path: {reason}.", hint="Choose another.") from None
    if root is None:
        folders = ", ".join(map(str, roots))
        raise Refused(f"{path} is outside the folders that may be written ({folders}).", hint=ALLOW)
    return root, real, kind


def _written(asked: str, root: Path) -> Path:
    """Return the path that is asked for.

    A relative one starts at `root`. Raises RequestError.
    """
    path = next(candidates(asked))
    if any(ord(letter) < 32 for letter in f"{asked}{path}"):  # a file: URL may encode them
        raise RequestError("path has control characters in it.", hint="Leave them out.")
    if why := why_foreign(asked):
        raise RequestError(why, hint=f"Give a path in {root}.")
    if ".." in path.parts:
        raise Refused(f"{asked} goes up with '..'.", hint="Give the folder itself.")
    try:
        return root / Path(path).expanduser()  # an absolute one stays as it is
    except RuntimeError:
        raise RequestError(f"{asked} begins with an unknown user.", hint="Give an absolute path.") from None


def _with_suffix(path: Path, asked: Format | None) -> tuple[Path, Format]:
    kind = SUFFIXES.get(path.suffix.lower())
    if kind is None and path.suffix and asked is None:
        suggestion = did_you_mean(path.suffix.lower(), SUFFIXES)
        raise RequestError(f"{path.name} ends in {path.suffix}; it can be {', '.join(SUFFIXES)}. {suggestion}")
    if kind is None:
        kind = asked or "png"
        return path.with_name(path.name + (".jpg" if kind == "jpeg" else f".{kind}")), kind
    if asked is not None and asked != kind:
        raise RequestError(f"{path.name} ends like {kind}, but format is {asked}.", hint="Leave out format, or rename.")
    return path, kind


def _long_edge(record: Record, options: SaveOptions) -> int:
    """Return the long edge of the file. Raises RequestError."""
    longest, shortest = max(record.width, record.height), min(record.width, record.height)
    if options.size is None:
        return min(longest, options.max_size or longest)
    if options.max_size is not None and options.size > options.max_size:
        raise RequestError(f"size {options.size} is more than max_size {options.max_size}.", hint="Give one of them.")
    most = int((MAX_PIXELS * longest / shortest) ** 0.5)
    if options.size > max(most, longest):  # no tool could open it again
        raise RequestError(
            f"size {options.size} makes an image of over {MAX_PIXELS // 10**6} MP; at most {most} in this shape.",
            hint=f"Say size {most}, or less.",
        )
    return options.size


def _rendered(store: Store, record: Record, options: SaveOptions, kind: Format) -> _File:
    """Return the file: the library's own bytes if nothing changes. Raises RequestError."""
    if options.transparent and kind == "jpeg":
        raise RequestError("JPEG has no transparency.", hint="Save as png or webp.")
    longest = max(record.width, record.height)
    wanted = _long_edge(record, options)
    data = store.read(record)
    if kind == "png" and wanted == longest and not options.strip_metadata and not options.transparent:
        return _File(data, record.width, record.height)
    pixels = round(record.area * max(1, wanted / longest) ** 2)
    return DECODING.run(pixels, lambda: _converted(data, record, options, kind, wanted))


def _converted(data: bytes, record: Record, options: SaveOptions, kind: Format, wanted: int) -> _File:
    """Return the image cut out, resized or in another format."""
    image, checks, warnings = codec.decode(data, record.handle, None).pixels, None, list[str]()
    longest = max(record.width, record.height)
    if options.transparent:
        cut = cutout.of_plain(image, record.handle)
        image, checks, warnings = cut.image, cut.checks.to_json(), list(cut.warnings)
    if wanted != longest:
        image = codec.enlarge(image, wanted) if wanted > longest else codec.fit(image, wanted)
    if kind == "jpeg" and image.shape[2] == 4:
        warnings.append("JPEG has no transparency: the image was flattened onto white")
    height, width = image.shape[:2]
    encoded = codec.encode(image, kind, None if options.strip_metadata else record.provenance)
    return _File(encoded, width, height, checks, warnings)
