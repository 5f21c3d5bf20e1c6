"""Resolve an image reference (handle, `last`, path, URL) under a read policy."""

import base64
import binascii
import contextlib
import hashlib
import os
import re
import stat
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import unquote_to_bytes

from engine.contract import image_hash
from klein_mcp.errors import BadImage, Refused, RequestError, UnknownImage, did_you_mean, quote
from klein_mcp.images import paths
from klein_mcp.images.library import Store
from klein_mcp.images.record import ALPHABET, HANDLE_LENGTH, Record, by_place, of_opened, place_on_sheet
from klein_mcp.limits import JOB_ID, MAX_FILE_BYTES
from klein_mcp.settings import Settings, user_home

if TYPE_CHECKING:
    from klein_mcp.images.alpha import Pixels
    from klein_mcp.images.codec import Decoded

BLACK = 0

Reading = Literal["image", "mask", "alpha mask"]
"""image: as it is, alpha included. mask: as `images.mask` decides. alpha mask: transparent pixels may change."""

MOST_SEEN = 256
"""Files remembered by their hash; a conversation names a handful."""

_LAST = re.compile(r"last(?:~(\d{1,4}))?", re.IGNORECASE)
_LABEL = re.compile(r"(?:last\.)?([A-D])", re.IGNORECASE)
SHEETS_BACK = 32
"""Images that are looked through for the latest sheet."""
_HANDLE = re.compile(rf"[{ALPHABET}]{{{HANDLE_LENGTH}}}")
_READ = os.O_RDONLY | sum(getattr(os, flag, 0) for flag in ("O_NONBLOCK", "O_NOFOLLOW", "O_BINARY"))


@dataclass(frozen=True, slots=True)
class ResolvedImage:
    """A reference and its record in the library.

    new: whether this call added the record.
    """

    record: Record
    warnings: tuple[str, ...] = ()
    new: bool = False


def is_counted_back(reference: str) -> bool:
    """Return whether a reference counts back from its client's latest image."""
    reference = paths.unwrap(reference[: paths.MAX_REFERENCE])
    return bool(_LAST.fullmatch(reference) or _LABEL.fullmatch(reference))


def is_path(reference: str) -> bool:
    """Return whether a reference can only be a path of this machine."""
    if len(reference) > paths.MAX_REFERENCE or re.match(r"data:|https?:|klein:", reference, re.IGNORECASE):
        return False
    candidates = paths.candidates(paths.unwrap(reference))
    return any(path.is_absolute() for path in map(paths.expanded, candidates))


class ImageResolver:
    """Opens references for one library under one policy. Blocking."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self.settings = settings
        self._store = store
        self._seen: OrderedDict[tuple[str, Reading], tuple[str, tuple[str, ...]]] = OrderedDict()
        """Files opened lately: (SHA-256, reading) -> handle and warnings, so that none is decoded twice."""

    def open(
        self, reference: str, client: str, *, reading: Reading = "image", folders: Sequence[Path] = ()
    ) -> ResolvedImage:
        """Open one reference. Raises RequestError.

        client: whose `last` is meant. reading: what the transparent pixels of a file mean.
        folders: that the client works in, where a relative path starts.
        """
        if reference[:5].lower() != "data:" and len(reference) > paths.MAX_REFERENCE:
            # Before anything splits it: resolving a path of two million folders took minutes.
            raise UnknownImage(
                f"{quote(reference)} has {len(reference):,} characters; no path or address is so long.",
                hint="Base64 is sent as data:image/png;base64,…; a path is shorter.",
            )
        reference = paths.unwrap(reference)
        if match := _LAST.fullmatch(reference):
            return ResolvedImage(self._last(client, int(match[1] or 0)))
        if match := _LABEL.fullmatch(reference):
            return ResolvedImage(self._of_sheet(client, match[1].upper()))
        if reference.startswith("klein://images/"):
            return ResolvedImage(self._store.get(reference.removeprefix("klein://images/").split("/")[0]))
        if reference[:5].lower() == "data:":
            return self._import(decode_data_url(reference), "The data URL", None, client, reading)
        if re.match(r"https?://", reference, re.IGNORECASE):
            return self._import(self._fetch(reference), quote(reference), reference, client, reading)
        handle = reference.lower().removesuffix(".png")
        # Of a name such as sunset.png, which may be either, the library's image comes first.
        if _HANDLE.fullmatch(handle) and (handle == reference.lower() or self._store.find(handle) or not folders):
            return ResolvedImage(self._store.get(handle))
        if why := paths.why_foreign(reference):
            raise UnknownImage(why, hint="Give an absolute path of this machine, a handle, or a data: URL.")
        written = [paths.expanded(path) for path in paths.candidates(reference)]
        absolute = [path for path in written if path.is_absolute()]
        if absolute:
            path, real = self._find(absolute)
            return self._import(_read(real), str(path), str(real), client, reading)
        if paths.is_relative(reference):
            path, real = self._in_folders(written, folders, reference)
            return self._import(_read(real), str(path), str(real), client, reading)
        if JOB_ID.fullmatch(reference.lower()):
            raise UnknownImage(f"{reference} is a job, no image.", action="wait", shows="the image it makes")
        nearest = did_you_mean(reference, ["last", *self._store.handles("", 1000)])
        raise UnknownImage(
            f"{quote(reference)} names no image. {nearest}",
            hint="Give a handle such as k7f3q2, last, last~1, or a path;",
            action="list",
            shows="the handles",
        )

    def add(self, data: bytes, name: str, client: str, *, reading: Reading = "image") -> ResolvedImage:
        """Add a file that a client uploaded. Raises RequestError."""
        return self._import(data, name, None, client, reading)

    def pixels(self, record: Record) -> "Pixels":
        """Decode an image of the library, alpha included. Raises UnknownImage or BadImage."""
        from klein_mcp.images import codec

        return codec.decode(self._store.read(record), record.handle, None).pixels

    def _of_sheet(self, client: str, label: str) -> Record:
        """Return the image with this label on the client's latest sheet."""
        for back in range(SHEETS_BACK):
            record = self._store.latest(client, back)
            if record is None:
                break
            sheet = self._store.lineage.siblings(record)
            places = by_place(sheet)
            own = place_on_sheet(record)
            count = own[1] if own else len(sheet)
            if count > 1:
                wanted = ord(label) - ord("A")
                if wanted in places:
                    return places[wanted]
                if wanted < count:
                    raise UnknownImage(
                        f"{label} of the latest sheet was deleted, or was never made.",
                        action="list",
                        shows="what there is",
                    )
                raise UnknownImage(
                    f"The latest sheet has no {label}: it has {count} images.",
                    hint=f"They are A to {chr(ord('A') + count - 1)}.",
                )
        raise UnknownImage(
            f"There is no {label}: this client has made no sheet lately.",
            hint="count 2 to 4 makes one; else name a handle.",
        )

    def _last(self, client: str, back: int) -> Record:
        pick = self._store.picks.of(client)
        if pick is None:
            record = self._store.latest(client, back)
        elif back == 0:
            return self._store.get(pick.image)
        else:
            # The picked image is `last` already, wherever it stands among the others.
            record = self._store.latest(client, back - 1, besides=pick.image)
        if record is None:
            which = "last" if back == 0 else f"last~{back}"
            raise UnknownImage(
                f"There is no {which}: this client has {'no image' if back == 0 else 'fewer images'} in the library.",
                action="make",
            )
        return record

    def _import(self, data: bytes, name: str, source: str | None, client: str, reading: Reading) -> ResolvedImage:
        """Import a file, so that lineage and replay can refer to it."""
        resolved = self._imported(data, name, source, client, reading)
        record = resolved.record
        # Our own results name paths in the library: such a one is no file of the user.
        if source is None or record.tool != "open" or any(map(Path(source).is_relative_to, self._library())):
            return resolved
        return replace(resolved, record=self._store.note_source(record, source))  # a file that was moved or copied

    def _imported(self, data: bytes, name: str, source: str | None, client: str, reading: Reading) -> ResolvedImage:
        file = hashlib.sha256(data).hexdigest()
        if known := self._known(file, data, reading):
            return known
        from klein_mcp.images import codec
        from klein_mcp.images.budget import DECODING

        with DECODING.reserve(codec.declared_pixels(data)):  # until it is stored: encoding needs memory, too
            resolved = self._import_decoded(_decode(data, name, reading), source, client, reading)
        self._remember(file, reading, resolved)
        return resolved

    def _remember(self, file: str, reading: Reading, resolved: ResolvedImage) -> None:
        """Remember a file's image, from any thread."""
        self._seen[file, reading] = resolved.record.handle, resolved.warnings
        if len(self._seen) > MOST_SEEN:
            self._seen.popitem(last=False)  # in one step: another thread may do the same

    def _import_decoded(self, decoded: "Decoded", source: str | None, client: str, reading: Reading) -> ResolvedImage:
        from klein_mcp.images import codec

        image = decoded.pixels
        pixels = image_hash(image)
        record = self._store.by_pixels(pixels)
        new = record is None
        if record is not None and not self._store.is_whole(record):
            made = of_opened(record.provenance) if record.tool == "open" else record.provenance
            record = self._store.restore(record, codec.encode(image, "png", made))
        if record is None:
            recipe = decoded.recipe or {}
            ancestor = self._store.original(recipe)
            height, width = image.shape[:2]
            transparent = {"alpha": True} if image.shape[2] == 4 else {}
            mask = {"mask": True} if reading != "image" else {}
            record = self._store.put(
                codec.encode(image, "png", of_opened(decoded.recipe)),
                handle=self._store.new_handle(),
                pixels=pixels,
                size=(width, height),
                client=client,
                tool="open",
                recipe={**mask, **transparent, **({"made": recipe} if recipe else {})},
                parents=[ancestor.handle] if ancestor else [],
                source=source,
            )
        return ResolvedImage(record, decoded.warnings, new)

    def _known(self, file: str, data: bytes, reading: Reading) -> ResolvedImage | None:
        """Find a file of the library, or one opened lately, without decoding."""
        if record := self._store.by_file(file):
            return ResolvedImage(record if self._store.is_whole(record) else self._store.restore(record, data))
        handle, warnings = self._seen.get((file, reading), ("", ()))
        record = self._store.find(handle) if handle else None
        if record is None or record.deleted is not None or not self._store.is_whole(record):
            return None
        return ResolvedImage(record, warnings)

    def _in_folders(self, written: Sequence[Path], folders: Sequence[Path], reference: str) -> tuple[Path, Path]:
        """Find a relative path in one of the client's folders."""
        if not folders:
            # Relative to the client's folder, which is unknown: this server was started in another.
            raise UnknownImage(f"{quote(reference)} is a relative path.", hint="Give an absolute one, or a handle.")
        opened = () if self.settings.read_roots is not None else tuple(folders)
        path, real = self._find([folder / path for folder in folders for path in written], opened)
        if not os.path.exists(real):
            places = ", ".join(map(str, folders))
            raise UnknownImage(f"There is no file {quote(reference)} in {places}.", hint="Check the path.")
        return path, real

    def _find(self, candidates: Sequence[Path], opened: Sequence[Path] = ()) -> tuple[Path, Path]:
        """Return the first existing path, as written and resolved.

        opened: folders that may be read besides the settings' own.
        """
        for path in candidates:
            with contextlib.suppress(RequestError):
                real = self._allowed(path, opened)
                if os.path.exists(real):
                    return path, real
                # Only after the policy allowed the path as written: a search is a way to learn names.
                similar = paths.look_alike(path)
                if similar != path and os.path.exists(similar):
                    return similar, self._allowed(similar, opened)
        return candidates[0], self._allowed(candidates[0], opened)

    def _roots(self) -> tuple[Path, ...]:
        if self.settings.read_roots is not None:
            return self.settings.read_roots
        home, temporary = user_home(), Path(tempfile.gettempdir())
        return (home, temporary) if home else (temporary,)

    def _allowed(self, path: Path, opened: Sequence[Path] = ()) -> Path:
        roots = (*self._roots(), *opened)
        try:
            real = path.resolve()
            # Our own results name paths in the library, whose images any caller may open by handle.
            inside = any(real.is_relative_to(root) for root in (*map(Path.resolve, roots), *self._library()))
        except (OSError, RuntimeError, ValueError):  # a loop of links, a name no file can have
            raise UnknownImage(f"There is no file {quote(str(path))} that can be read.", hint="Check it.") from None
        if not inside:  # before any check whether it exists
            folders = ", ".join(map(str, roots)) or "none is open"
            raise Refused(
                f"{path} is outside the folders that may be read ({folders}).",
                hint="The user can allow more with KLEIN_READ_ROOTS.",
            )
        return real

    def _library(self) -> tuple[Path, ...]:
        """Return the library's folders of files and of readable names."""
        return self._store.files.root.resolve(), self._store.files.short_path("").parent.resolve()

    def _fetch(self, url: str) -> bytes:
        if not self.settings.allow_urls:
            raise Refused(
                "Images from the web are not allowed.", hint="Save the image as a file, or set KLEIN_ALLOW_URLS=1."
            )
        from klein_mcp.images import fetch

        return fetch.get(url, limit=MAX_FILE_BYTES)


def _decode(data: bytes, name: str, reading: Reading) -> "Decoded":
    from klein_mcp.images import codec, mask

    if reading == "image":
        return codec.decode(data, name, None)
    decoded = codec.decode(data, name, BLACK)
    image = mask.to_brightness(decoded, name, alpha_only=reading == "alpha mask")
    return replace(decoded, image=image, warnings=(), flattened=False, alpha=None)


def _read(path: Path) -> bytes:
    try:
        # O_NONBLOCK: opening a FIFO must not block. O_NOFOLLOW: a link put there since the check is refused.
        descriptor = os.open(path, _READ)
    except FileNotFoundError:
        raise UnknownImage(f"There is no file {path} that can be read.", hint="Check the path.") from None
    except OSError as error:
        raise UnknownImage(f"{path} cannot be read: {error.strerror}.", hint="Check the path.") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BadImage(f"{path} is not a file.", hint="Name an image in it, or another.")
    with os.fdopen(descriptor, "rb") as file:
        return file.read(MAX_FILE_BYTES + 1)


def decode_data_url(url: str) -> bytes:
    """Decode a data URL as leniently as browsers do."""
    head, comma, body = url[5:].partition(",")
    if not comma:
        raise BadImage("The data URL has no comma, so no data.", hint="data:image/png;base64,…")
    if len(body) > MAX_FILE_BYTES * 4 // 3 + MAX_FILE_BYTES // 16:  # blanks included: 76 characters a line
        raise BadImage(f"The data URL is over {MAX_FILE_BYTES // 2**20} MiB.", hint="Give a path instead.")
    parameters = [parameter.strip().lower() for parameter in head.split(";")]
    if "base64" not in parameters[1:]:
        return unquote_to_bytes(body)
    return _base64(unquote_to_bytes(body) if "%" in body else body.encode("ascii", "replace"))


def _base64(text: bytes) -> bytes:
    text = text.translate(_URL_SAFE, b" \t\r\n\f").rstrip(b"=")
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise BadImage("The data URL is no valid base64; it may be cut short.", hint="Give a path instead.") from None


_URL_SAFE = bytes.maketrans(b"-_", b"+/")
