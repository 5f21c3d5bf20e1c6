"""`klein-mcp pull NAME`: fetch the needed files into the hub's cache."""

import argparse
import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.families.klein.variants import APACHE, VARIANTS, Variant
from klein_mcp.cli.pull_sources import FileSelection, selections
from klein_mcp.cli.terminal import ProgressBar, ask, shell_line
from klein_mcp.errors import RequestError, quote
from klein_mcp.settings import Settings

SPARE = 1 << 30
"""Bytes of disk that stay free: a full disk breaks more than a download."""

_CHECK_HUB = "HF_ENDPOINT, or a proxy on the way, may not be the hub."

LICENCES = {
    APACHE: "Apache-2.0: free to use, for money too.",
    "FLUX Non-Commercial": (
        "FLUX Non-Commercial License: not for commercial use of the model; outputs are yours, within its terms. "
        "Read it at {url}."
    ),
}


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file to fetch.

    sha256: of large files only. have: bytes that are there already.
    """

    repo: str
    commit: str
    name: str
    size: int
    sha256: str | None
    have: int


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="klein-4b, klein-9b, klein-4b-fp8 …; a wrong one lists them all")
    parser.add_argument("--format", default="", help="fp8, nvfp4, gguf:Q4_K_M …, comfyui; a wrong one lists them all")
    parser.add_argument(
        "--accept-licence", action="store_true", help="agree to a non-commercial licence without asking"
    )


def run(settings: Settings, arguments: argparse.Namespace) -> int:
    """Raises RequestError, OSError."""
    row, wishes = selections(arguments.name, arguments.format)
    _agree(row, arguments.name, arguments.accept_licence)
    _quiet()
    items: list[RemoteFile] = []
    for wish in wishes:
        with _in_words(row, arguments.name, wish.repo):
            items += _items(settings.hub, wish)
    _show_sizes(items)
    _check_disk(settings.hub, sum(item.size - item.have for item in items))
    for item in items:
        with _in_words(row, arguments.name, item.repo):
            _fetch(settings.hub, item)
    folders = sorted({str(_snapshot(settings.hub, item)) for item in items})
    if arguments.json:
        print(json.dumps({"name": arguments.name, "folders": folders, "bytes": sum(item.size for item in items)}))
    else:
        print(f"{arguments.name} is installed: {_gb(sum(item.size for item in items))} in {', '.join(folders)}")
    return 0


def _agree(row: Variant | None, name: str, agreed: bool) -> None:
    """Show the licence, and ask where it is not a free one."""
    if row is None:
        print(f"{name}: {LICENCES[APACHE]}", file=sys.stderr)
        return
    print(f"{row.title}: {LICENCES[row.licence].format(url=_page(row.repo))}", file=sys.stderr)
    if row.licence == APACHE or agreed:
        return
    if not sys.stdin.isatty():
        raise RequestError(
            f"{row.name} is for non-commercial use only, which has to be agreed to.",
            hint=f"If you do: klein-mcp pull {name} --accept-licence",
        )
    if ask("Do you agree to it? [y/N]").lower() not in ("y", "yes"):
        raise RequestError(
            f"{row.name} was not pulled: its licence was not agreed to.", hint="klein-4b has a free one."
        )


def _quiet() -> None:
    """Show progress bars only on a terminal, and silence the library's hints."""
    import logging

    from huggingface_hub.utils import disable_progress_bars

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        disable_progress_bars()


def _items(hub: Path, wish: FileSelection) -> list[RemoteFile]:
    """Return the wanted files of a repository, with sizes."""
    from fnmatch import fnmatch

    from huggingface_hub import HfApi

    info = HfApi().model_info(wish.repo, files_metadata=True)
    there = {file.rfilename: file for file in info.siblings or []}
    _check_names(wish.repo, str(info.sha), [])
    if wish.which:
        wish = _one_of(wish, {name: int(file.size or 0) for name, file in there.items()})
    needed = _shards(hub, wish, str(info.sha), there)
    chosen = [name for name in there if any(fnmatch(name, pattern) for pattern in wish.patterns) and needed(name)]
    if missing := [pattern for pattern in wish.patterns if "*" not in pattern and pattern not in there]:
        raise RequestError(f"{wish.repo} has no {missing[0]}.", hint="Has the repository changed? Look at its page.")
    _check_names(wish.repo, str(info.sha), chosen)
    items = []
    for name in chosen:
        size, lfs = int(there[name].size or 0), there[name].lfs
        if size < 0 or (lfs and not re.fullmatch(r"[0-9a-f]{64}", str(lfs.sha256))):
            raise RequestError(f"{wish.repo} names a size or a hash of {name} that is none.", hint=_CHECK_HUB)
        item = RemoteFile(wish.repo, str(info.sha), name, size, lfs.sha256 if lfs else None, 0)
        items.append(RemoteFile(item.repo, item.commit, name, size, item.sha256, min(size, _have(hub, item))))
    return items


def _check_names(repo: str, commit: str, names: list[str]) -> None:
    """Refuse names that would lead out of the cache."""
    for name in names:
        if name.startswith("/") or "\\" in name or ":" in name or not {"..", ""}.isdisjoint(name.split("/")):
            raise RequestError(
                f"{repo} names a file {name[:80]!r}, which would lie outside the cache.", hint=_CHECK_HUB
            )
    if not re.fullmatch(r"[0-9a-f]{40,64}", commit):
        raise RequestError(f"{repo} names a commit {commit[:80]!r}, which is none.", hint=_CHECK_HUB)


def _one_of(wish: FileSelection, sizes: dict[str, int]) -> FileSelection:
    """Return the selection of the one file of a block type."""
    from fnmatch import fnmatch

    kinds = {
        found[1].upper(): name
        for name in sizes
        if any(fnmatch(name, pattern) for pattern in wish.patterns)
        and (found := re.search(r"[-_.]((?:UD-)?I?Q\d\w*|BF16|F16|F32)\.gguf$", name, re.IGNORECASE))
    }
    if (name := kinds.get(wish.which.upper())) is not None:
        return FileSelection(wish.repo, (name,))
    known = ", ".join(f"gguf:{kind} ({_gb(sizes[file])})" for kind, file in sorted(kinds.items(), key=_by_size(sizes)))
    asked = "" if wish.which == "?" else f" no {wish.which}"
    raise RequestError(f"{wish.repo} has{asked or ' several formats'}.", hint=f"There are: {known or 'none'}.")


def _by_size(sizes: dict[str, int]) -> Callable[[tuple[str, str]], int]:
    return lambda kind: sizes[kind[1]]


def _show_sizes(items: list[RemoteFile]) -> None:
    """Say what will be fetched before it is."""
    for item in items:
        if item.size >= 10_000_000:
            state = " (there)" if item.have == item.size else f" ({_gb(item.have)} there)" if item.have else ""
            print(f"  {_gb(item.size):>8}  {item.repo}/{item.name}{state}", file=sys.stderr)
    missing = sum(item.size - item.have for item in items)
    print(f"  {_gb(missing):>8}  to fetch", file=sys.stderr)


def _shards(hub: Path, wish: FileSelection, commit: str, there: dict[str, Any]) -> Callable[[str], bool]:
    """Return a test for needed files, which skips unread shards."""
    index = "text_encoder/model.safetensors.index.json"
    if index not in there or not any(pattern.startswith("text_encoder") for pattern in wish.patterns):
        return lambda name: True
    item = RemoteFile(wish.repo, commit, index, int(there[index].size or 0), None, 0)
    _fetch(hub, item)
    weight_map = json.loads((_snapshot(hub, item) / index).read_bytes())
    last = max(next(row for row in VARIANTS.values() if row.repo == wish.repo).text_layers)
    files = {f"text_encoder/{file}" for name, file in weight_map["weight_map"].items() if _is_read(name, last)}
    return lambda name: not re.fullmatch(r"text_encoder/.*\.safetensors", name) or name in files


def _is_read(tensor: str, layers: int) -> bool:
    """Return whether a tensor of Qwen3 is read."""
    layer = re.match(r"model\.layers\.(\d+)\.", tensor)
    return int(layer[1]) < layers if layer else tensor.startswith("model.embed_tokens.")


def _repo_folder(hub: Path, repo: str) -> Path:
    return hub / f"models--{repo.replace('/', '--')}"


def _snapshot(hub: Path, item: RemoteFile) -> Path:
    return _repo_folder(hub, item.repo) / "snapshots" / item.commit


def _partial(hub: Path, item: RemoteFile) -> Path:
    return _repo_folder(hub, item.repo) / "blobs" / f"{item.sha256}.klein-incomplete"


def _is_there(hub: Path, item: RemoteFile) -> bool:
    """Whole, and under its own name."""
    blob = _repo_folder(hub, item.repo) / "blobs" / str(item.sha256)
    return _is_whole(_snapshot(hub, item) / item.name, item) or blob.exists()


def _is_whole(pointer: Path, item: RemoteFile) -> bool:
    """Return whether the file has the size that the hub names."""
    return pointer.exists() and pointer.stat().st_size == item.size


def _have(hub: Path, item: RemoteFile) -> int:
    if _is_there(hub, item):
        return item.size
    partial = _partial(hub, item)
    return partial.stat().st_size if item.sha256 and partial.exists() else 0


def _check_disk(hub: Path, missing: int) -> None:
    place = next(folder for folder in (hub, *hub.parents) if folder.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise RequestError(
            f"{place} is no folder that can be written to.", hint="Set KLEIN_HUB to one, or change its owner."
        )
    free = shutil.disk_usage(place).free
    if missing and missing + SPARE > free:
        raise RequestError(
            f"{_gb(missing)} are still to be fetched and {_gb(SPARE)} should stay free; {place} has {_gb(free)}.",
            hint="Make room, or set KLEIN_HUB to a folder on a larger disk.",
        )


def _fetch(hub: Path, item: RemoteFile) -> None:
    """Fetch one file into the cache, resumable if large.

    As the hub's library lays it out, but for one thing: a file is named by its own hash. The library names it by what
    the server calls its ETag, which may be any path, and another one each time it is asked.
    """
    pointer = _snapshot(hub, item) / item.name
    if _is_whole(pointer, item):
        return
    if item.sha256 is None:
        blob = _fetch_small(hub, item)
    else:
        blob = _repo_folder(hub, item.repo) / "blobs" / item.sha256
        if not blob.exists():
            _fetch_large(hub, item)
    pointer.parent.mkdir(parents=True, exist_ok=True)
    if not _is_whole(pointer, item):  # a copy that was interrupted, or a link to a blob that is gone
        pointer.unlink(missing_ok=True)
    _link(blob, pointer)


def _link(blob: Path, pointer: Path) -> None:
    """Give a blob its file name, in one step."""
    for link, target in ((os.symlink, os.path.relpath(blob, pointer.parent)), (os.link, blob)):
        try:
            link(target, pointer)
        except FileExistsError:  # by another pull, at the same time
            pass
        except OSError:  # Windows without the right to make symbolic links, exFAT without any links
            continue
        return
    os.replace(blob, pointer)  # a copy would need the room twice


def _fetch_small(hub: Path, item: RemoteFile) -> Path:
    """Fetch a file of kilobytes under git's name for its content."""
    blobs = _repo_folder(hub, item.repo) / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    partial = blobs / f"{hashlib.sha256(item.name.encode()).hexdigest()[:16]}.{os.getpid()}.klein-incomplete"
    try:
        _go_on(item, partial)
        data = partial.read_bytes()
        blob = blobs / hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
        os.replace(partial, blob)
    finally:
        partial.unlink(missing_ok=True)
    return blob


def _fetch_large(hub: Path, item: RemoteFile) -> None:
    """Fetch a large file, resumable and checked by its hash."""
    from filelock import FileLock

    partial = _partial(hub, item)
    partial.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(partial.with_suffix(".lock")):
        # It may be whole, but unchecked: its pull was ended meanwhile. Asked for what follows, a hub only complains.
        if not partial.exists() or partial.stat().st_size < item.size:
            _go_on(item, partial)
        with ProgressBar(f"checking {item.name}"):
            digest = _sha256(partial)
        if digest != item.sha256:
            partial.unlink()
            raise RequestError(
                f"{item.name} of {item.repo} came with another content than the hub names "
                f"(sha256 {digest[:8]}…, not {str(item.sha256)[:8]}…); it was deleted.",
                hint="Run the same line again.",
            )
        os.replace(partial, partial.with_name(str(item.sha256)))


def _go_on(item: RemoteFile, partial: Path) -> None:
    """Fetch what is missing of a partial file."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(item.repo, item.name, revision=item.commit)
    location = get_hf_file_metadata(url).location
    headers = build_hf_headers()
    if _host(location) != _host(url):
        # The token is for the hub, not for whoever stores its files.
        headers.pop("authorization", None)
    with partial.open("ab") as file:
        http_get(
            location,
            file,
            resume_size=file.tell(),
            headers=headers,
            expected_size=item.size,
            displayed_filename=item.name,
        )


def _host(url: str) -> str:
    from urllib.parse import urlsplit

    return urlsplit(url).netloc


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _in_words(row: Variant | None, name: str, repo: str) -> Iterator[None]:
    """Turn errors of hub and network into one line."""
    import httpx2
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    again = "Run the same line again; it goes on where it stopped."
    try:
        yield
    except HfHubHTTPError as problem:
        status = problem.response.status_code
        if status in (401, 403) or isinstance(problem, GatedRepoError | RepositoryNotFoundError):
            raise _closed(row, name, repo, known=status == 403) from None
        raise RequestError(f"The hub answered {status}.", hint="Try again later.") from None
    except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as problem:
        raise RequestError(
            f"{_host(constants.ENDPOINT)} cannot be reached: {problem or type(problem).__name__}.",
            hint="Check the network, and HTTPS_PROXY or HF_ENDPOINT where one is needed; then run the same line again.",
        ) from None
    except (httpx2.UnsupportedProtocol, httpx2.InvalidURL):
        raise RequestError(
            f"HF_ENDPOINT is {quote(constants.ENDPOINT)}, which is no address.",
            hint="Unset it, or begin it with https://.",
        ) from None
    except httpx2.HTTPError as problem:
        broke = f"The connection to the hub broke off: {problem or type(problem).__name__}."
        raise RequestError(broke, hint=again) from None
    except OSError as problem:
        if problem.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RequestError("The disk is full.", hint=f"Make room. {again}") from None
        if "Consistency check failed" not in str(problem):
            raise
        raise RequestError("The download ended before the file did.", hint=again) from None


def _closed(row: Variant | None, name: str, repo: str, *, known: bool) -> RequestError:
    """Return the error for a repository that may not be read.

    known: the hub knows who asks, and still refuses.
    """
    if row is not None and row.gated:
        line = f"klein-mcp pull {name}" if known else f"{_hf()} auth login && klein-mcp pull {name}"
        return RequestError(f"{name} is gated: accept its terms at {_page(repo)}, signed in.", hint=f"Then run: {line}")
    return RequestError(
        f"The hub does not let {repo} be read: it is not there, or a token that is set has expired.",
        hint=f"Look at {_page(repo)}, or run: {_hf()} auth login",
    )


def _page(repo: str) -> str:
    return f"https://huggingface.co/{repo}"


def _hf() -> str:
    """Return the hub's command, which may not be on the PATH."""
    beside = shutil.which("hf", path=str(Path(sys.executable).parent))  # hf.exe on Windows
    return shell_line([beside]) if shutil.which("hf") is None and beside else "hf"


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
