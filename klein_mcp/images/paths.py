"""Paths and file: URLs as people and clients write them."""

import os
import platform
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from urllib.parse import unquote

from klein_mcp.errors import one_line

_QUOTES = ("'", '"', "`", "“”", "‘’", "<>")
_BLANKS = dict.fromkeys(map(ord, "\u00a0\u2007\u2009\u202f\u2002\u2003"), " ")
_APOSTROPHES = {ord("’"): "'", ord("‘"): "'", ord("“"): '"', ord("”"): '"'}
_MOST_NAMES = 20_000
"""Names of one folder that are compared with the one asked for."""


def unwrap(text: str) -> str:
    """Remove quotes, backquotes and a leading @ around a path."""
    text = text.strip()
    if text[:1] == "@" and len(text) > 1:
        text = text[1:]
    for pair in _QUOTES:
        if len(text) > 1 and text[0] == pair[0] and text[-1] == pair[-1]:
            return text[1:-1].strip()
    return text


def expanded(path: str | PurePath) -> Path:
    """Return a path with ~ as the home folder it means.

    It stays as it is if it names a user there is not.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


_NO_PATH = re.compile(r"(?:klein|https?|data|file):.*|last(?:[~.]\w+)?", re.IGNORECASE | re.DOTALL)
_ADDRESS = re.compile(r"(?:([a-z][a-z0-9+.-]+)://|(data|klein|sandbox|blob|attachment):)", re.IGNORECASE)
_OF_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\[\w.$-]+\\")
_VARIABLE = re.compile(r"(\$\w+|\$\{\w+\}|%\w+%)[/\\]")


MAX_REFERENCE = 8192
"""Characters of a path or an address; Linux allows 4,096 bytes, browsers 2,000 to 64,000."""


def is_relative(text: str) -> bool:
    """Return whether a reference looks like a relative path.

    URLs do not. `sunset.png` may also be a handle with an ending.
    """
    if len(text) > MAX_REFERENCE:
        return False
    text = unwrap(text)
    if _NO_PATH.fullmatch(text) or any(path.is_absolute() for path in candidates(text)) or text.startswith("~"):
        return False
    return re.search(r"[/\\]|\.\w{1,5}$", text) is not None


IN_WSL = "microsoft" in platform.release().lower()
"""Whether this is Linux within Windows, where clients of Windows name its drives."""


def why_foreign(text: str, *, windows: bool = os.name == "nt" or IN_WSL) -> str:
    """Return why text can be no path of this machine, or "".

    Taken as a relative path it would name a file, or make a folder, that nobody meant.
    """
    name = one_line(text, 80)
    if (match := _ADDRESS.match(text)) and (match[1] or match[2]).lower() != "file":
        return f"{name} is an address ({match[0].lower()}), no path."
    if not windows and _OF_WINDOWS.match(text):
        return f"{name} is a path of Windows, on which this server does not run."
    if match := _VARIABLE.match(text):
        return f"{name} begins with a variable, {match[1]}, which is not replaced."
    return ""


def candidates(text: str, *, windows: bool = os.name == "nt", wsl: bool = IN_WSL) -> Iterator[PurePath]:
    """Yield the paths that a path or URL may mean, likeliest first.

    Clients build file: URLs by hand: some encode, some do not, so `a%20b`, `C# project` and `what?` may be literal.
    """
    if re.match("file:", text, re.IGNORECASE):
        yield from _from_url(text[5:], windows, wsl)
        return
    if wsl and (path := _in_wsl(PureWindowsPath(text))) is not None:
        yield path
        return
    flavour = PureWindowsPath if windows else PurePosixPath
    yield flavour(text)
    if not windows and "\\" in text:
        yield flavour(re.sub(r"\\(.)", r"\1", text))  # `a\ b.png`, as a terminal drops it


def _in_wsl(path: PureWindowsPath) -> PurePosixPath | None:
    """Return the path within Linux of one that Windows names."""
    if re.fullmatch("[A-Za-z]:", path.drive) and path.root:
        return PurePosixPath("/mnt", path.drive[0].lower(), *path.parts[1:])
    if re.match(r"\\\\wsl(?:\.localhost|\$)\\", path.drive, re.IGNORECASE):
        return PurePosixPath("/", *path.parts[1:])
    return None


def _from_url(rest: str, windows: bool, wsl: bool) -> Iterator[PurePath]:
    """rest: what follows `file:`."""
    host, path = "", rest
    if rest.startswith("//"):
        host, slash, path = rest[2:].partition("/")
        path = slash + path
    decoded = [_decoded(path), _decoded(re.split("[?#]", path)[0]), path]
    for text in dict.fromkeys(decoded):
        of_windows = _windows_path(unquote(host), text)
        inside = _in_wsl(of_windows) if wsl else None
        yield of_windows if windows else inside or _posix_path(host, text)


def _decoded(text: str) -> str:
    """Decode %-escapes, leaving every other % as it is."""
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        return unquote(text, errors="surrogateescape")


def _posix_path(host: str, text: str) -> PurePath:
    return PurePosixPath(text if host in ("", "localhost") else f"//{host}{text}")


def _windows_path(host: str, text: str) -> PureWindowsPath:
    """`/c:/x`, `C:/x` as host and path, `//server/share/x`, `//wsl.localhost/…`."""
    if re.fullmatch("[A-Za-z][:|]", host):
        return PureWindowsPath(f"{host[0]}:{text}")
    if host and host != "localhost":
        return PureWindowsPath(f"//{host}{text}")
    if match := re.match("/([A-Za-z])[:|](.*)", text, re.DOTALL):
        return PureWindowsPath(f"{match[1]}:{match[2] or '/'}")
    return PureWindowsPath(text)


def folder_of(uri: str, *, windows: bool = os.name == "nt") -> Path | None:
    """Return the existing folder a client's root means, or None.

    A whole disk is none: a client that sends `file://` would open everything, which nobody meant.
    """
    for candidate in candidates(uri, windows=windows):
        path = Path(candidate)
        try:
            if path.is_absolute() and path.is_dir() and not _is_disk(path):
                return path
        except (OSError, ValueError):
            continue
    return None


def _is_disk(path: Path) -> bool:
    """Return whether a path is `/` or a drive.

    The root of a network share is a folder like others.
    """
    real = path.resolve()
    return real == Path(real.anchor) and not real.anchor.startswith("\\\\")


def look_alike(path: Path) -> Path:
    """Return the existing path that looks like `path`, else `path`.

    macOS puts U+202F into a screenshot's name, others U+00A0; names come in NFC and NFD, with curly apostrophes.
    """
    existing = Path(path.anchor)
    for part in path.parts[1:]:
        existing = _child(existing, part)
    return existing


def _child(folder: Path, name: str) -> Path:
    exact = folder / name
    if os.path.lexists(exact) or not _may_differ(name):
        return exact
    wanted = _folded(name)
    found = [entry for entry in _names(folder) if _folded(entry) == wanted]
    return folder / found[0] if len(found) == 1 else exact


def _may_differ(name: str) -> bool:
    return not name.isascii() or " " in name or "'" in name or '"' in name


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).translate(_BLANKS | _APOSTROPHES)


def _names(folder: Path) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            for _, entry in zip(range(_MOST_NAMES), entries, strict=False):
                yield entry.name
    except OSError:
        return
