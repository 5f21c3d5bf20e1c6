"""Resolve an image reference (handle, `last`, path, URL) under a read policy."""

import base64
import binascii
import hashlib
import os
import re
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

import numpy as np

from engine.contract import Rgb8
from klein_mcp.errors import BadImage, Refused, UnknownImage, quote
from klein_mcp.images import codec
from klein_mcp.images.budget import DECODING
from klein_mcp.images.library import ALPHABET, HANDLE_LENGTH, Record, Store
from klein_mcp.settings import Settings

_LAST = re.compile(r"last(?:~(\d{1,4}))?")
_HANDLE = re.compile(rf"[{ALPHABET}]{{{HANDLE_LENGTH}}}")
_READ = os.O_RDONLY | sum(getattr(os, flag, 0) for flag in ("O_NONBLOCK", "O_NOFOLLOW", "O_BINARY"))


@dataclass(frozen=True, slots=True)
class ResolvedImage:
    """The pixels of a reference and their record in the library.

    new: whether this call added the record.
    """

    image: Rgb8
    record: Record
    warnings: tuple[str, ...] = ()
    new: bool = False


class ImageResolver:
    """Opens references for one library under one policy. Blocking."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self._settings = settings
        self._store = store

    def open(self, reference: str, client: str, *, backdrop: int = 255) -> ResolvedImage:
        """Open one reference. Raises RequestError.

        client: whose `last` is meant. backdrop: the grey behind transparent pixels.
        """
        reference = reference.strip()
        if match := _LAST.fullmatch(reference):
            return self._from_library(self._last(client, int(match[1] or 0)))
        if reference.startswith("klein://images/"):
            return self._from_library(self._store.get(reference.removeprefix("klein://images/").split("/")[0]))
        if reference[:5].lower() == "data:":
            return self._import(_data_url(reference), "the data URL", None, client, backdrop)
        if re.match(r"https?://", reference, re.IGNORECASE):
            return self._import(self._fetch(reference), quote(reference), reference, client, backdrop)
        try:
            if reference.startswith("file://"):
                reference = url2pathname(urlsplit(reference).path)
            path = Path(reference).expanduser()
        except (RuntimeError, ValueError):
            raise UnknownImage(f"{quote(reference)} names no file.", hint="Give an absolute path.") from None
        if path.is_absolute():
            real = self._allowed(path)
            return self._import(_read(real), str(path), str(real), client, backdrop)
        if _HANDLE.fullmatch(reference):
            return self._from_library(self._store.get(reference))
        if "/" in reference or os.sep in reference or path.suffix:
            # Relative to the client's folder, which is unknown: this server was started in another.
            raise UnknownImage(f"{quote(reference)} is a relative path.", hint="Give an absolute one, or a handle.")
        raise UnknownImage(
            f"{quote(reference)} names no image.",
            hint="Give a handle such as k7f3q2, last, last~1, or an absolute path; list_images shows the handles.",
        )

    def add(self, data: bytes, name: str, client: str) -> ResolvedImage:
        """Add a file that a client uploaded. Raises BadImage."""
        return self._import(data, name, None, client, 255)

    keep = add  # until every caller uses the new name

    def _from_library(self, record: Record) -> ResolvedImage:
        return ResolvedImage(codec.decode(self._store.read(record), record.handle).image, record)

    def _last(self, client: str, back: int) -> Record:
        if (pick := self._store.picked(client)) is not None:
            if back == 0:
                return self._store.get(pick.image)
            back -= 1
        record = self._store.latest(client, back)
        if record is None:
            which = "last" if back == 0 else f"last~{back}"
            raise UnknownImage(
                f"There is no {which}: this client has not generated {'anything' if back == 0 else 'so many'} yet.",
                hint="Generate one, or name a handle; list_images shows them.",
            )
        return record

    def _import(self, data: bytes, name: str, source: str | None, client: str, backdrop: int) -> ResolvedImage:
        """Import a file, so that lineage and replay can refer to it."""
        with DECODING.reserve(codec.declared_pixels(data)):  # until it is stored: encoding needs memory, too
            return self._import_decoded(codec.decode(data, name, backdrop), source, client, backdrop)

    def _import_decoded(self, decoded: codec.Decoded, source: str | None, client: str, backdrop: int) -> ResolvedImage:
        pixels = fingerprint(decoded.image)
        record = self._store.by_pixels(pixels)
        new = record is None
        if record is None:
            recipe = decoded.recipe or {}
            ancestor = self._store.find(str(recipe.get("image", "")))
            height, width = decoded.image.shape[:2]
            flattened = {"flattened_on": backdrop} if decoded.flattened else {}
            record = self._store.put(
                codec.encode(decoded.image, "png", decoded.recipe),
                handle=self._store.new_handle(),
                pixels=pixels,
                size=(width, height),
                client=client,
                tool="open",
                recipe={**flattened, **({"made": recipe} if recipe else {})},
                parents=[ancestor.handle] if ancestor else [],
                source=source,
            )
        return ResolvedImage(decoded.image, record, decoded.warnings, new)

    def _allowed(self, path: Path) -> Path:
        roots = self._settings.read_roots or (Path.home(), Path(tempfile.gettempdir()))
        try:
            real = path.resolve()
            # Our own results name paths in the library, whose images any caller may open by handle.
            inside = any(real.is_relative_to(root.resolve()) for root in (*roots, self._store.files))
        except (OSError, RuntimeError, ValueError):  # a loop of links, a name no file can have
            raise UnknownImage(f"There is no file {quote(str(path))} that can be read.", hint="Check it.") from None
        if not inside:  # before any check whether it exists
            raise Refused(
                f"{path} is outside the folders that may be read ({', '.join(map(str, roots))}).",
                hint="The user can allow more with KLEIN_READ_ROOTS.",
            )
        return real

    def _fetch(self, url: str) -> bytes:
        if not self._settings.allow_urls:
            raise Refused(
                "Images from the web are not allowed.", hint="Save the image as a file, or set KLEIN_ALLOW_URLS=1."
            )
        from klein_mcp.images import fetch

        return fetch.get(url, limit=codec.MAX_BYTES)


def fingerprint(image: Rgb8) -> str:
    """Hash size and values: equal for equal images, independent of the file."""
    digest = hashlib.blake2b(b"%d %d " % image.shape[:2], digest_size=16)
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()


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
        raise BadImage(f"{path} is not a file.")
    with os.fdopen(descriptor, "rb") as file:
        return file.read(codec.MAX_BYTES + 1)


def _data_url(url: str) -> bytes:
    """Decode a data URL as leniently as browsers do."""
    head, comma, body = url[5:].partition(",")
    if not comma:
        raise BadImage("The data URL has no comma, so no data.", hint="data:image/png;base64,…")
    if len(body) > codec.MAX_BYTES * 4 // 3 + codec.MAX_BYTES // 16:  # blanks included: 76 characters a line
        raise BadImage(f"The data URL is over {codec.MAX_BYTES // 2**20} MiB.", hint="Give a path instead.")
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
