"""`klein-mcp pull NAME`: the files of a model that are needed, into the hub's cache, and no others."""

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

from engine.families.klein.variants import APACHE, EMBEDDED, FULL, SMALL_DECODER, VARIANTS, Variant
from klein_mcp.cli.terminal import ProgressBar
from klein_mcp.errors import RequestError
from klein_mcp.settings import Settings

SPARE = 1 << 30
"""Bytes of disk that stay free: a full disk breaks more than a download."""

SMALL = "small-decoder"
TOKENIZER = "tokenizer"
"""The one part that neither a single file nor ComfyUI's folders have; the same for every klein."""
BESIDE = "companions"
"""Everything of a model but its transformer, for those who have that as a single file."""

COMPANIONS = (
    "model_index.json",
    "vae/config.json",
    "vae/*.safetensors",
    "text_encoder/config.json",
    "text_encoder/*.safetensors*",
    "tokenizer/*",
)
TRANSFORMER = ("transformer/config.json", "transformer/*.safetensors*")

LICENCES = {
    APACHE: "Apache-2.0: free to use, for money too.",
    "FLUX Non-Commercial": (
        "FLUX Non-Commercial License: not for commercial use of the model; outputs are yours, within its terms. "
        "Read it at {url}."
    ),
}


@dataclass(frozen=True, slots=True)
class FileSelection:
    """What is wanted of a repository: file names, or patterns."""

    repo: str
    patterns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file to fetch. sha256: of large files only. have: bytes that are there already."""

    repo: str
    commit: str
    name: str
    size: int
    sha256: str | None
    have: int


def names() -> list[str]:
    """Everything that can be pulled."""
    quantised = [f"{row.name}-{file.format}" for row in VARIANTS.values() for file in row.files if file.format != FULL]
    whole = [row.name for row in VARIANTS.values() if row.repo]
    return [*whole, *quantised, *(f"{name}-{BESIDE}" for name in whole), SMALL, TOKENIZER]


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="klein-4b, klein-9b, klein-4b-fp8 …; a wrong one lists them all")
    parser.add_argument(
        "--accept-licence", action="store_true", help="agree to a non-commercial licence without asking"
    )


def run(settings: Settings, arguments: argparse.Namespace) -> int:
    """Raises RequestError, OSError."""
    row, wishes = _wishes(arguments.name)
    _agree(row, arguments.name, arguments.accept_licence)
    _quiet()
    items: list[RemoteFile] = []
    for wish in wishes:
        with _in_words(row, arguments.name, wish.repo):
            items += _items(settings.hub, wish)
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


def _wishes(name: str) -> tuple[Variant | None, list[FileSelection]]:
    if name == SMALL:
        return None, [FileSelection(SMALL_DECODER.repo, (SMALL_DECODER.name,))]
    if name == TOKENIZER:
        return None, [FileSelection(VARIANTS["klein-4b"].repo, ("model_index.json", "tokenizer/*"))]
    if name == EMBEDDED:
        raise RequestError(f"{name} is in the package; there is nothing to pull.")
    for row in VARIANTS.values():
        if row.repo and name == row.name:
            return row, [FileSelection(row.repo, COMPANIONS + TRANSFORMER)]
        if row.repo and name == f"{row.name}-{BESIDE}":
            return row, [FileSelection(row.repo, COMPANIONS)]
        for file in row.files:
            if file.format != FULL and name == f"{row.name}-{file.format}":
                return row, [FileSelection(file.repo, (file.name,)), FileSelection(row.repo, COMPANIONS)]
    import difflib

    near = difflib.get_close_matches(name, names(), 1)
    meant = f" Did you mean {near[0]}?" if near else ""
    raise RequestError(f"There is no model {name!r} to pull.{meant}", hint=f"There are: {', '.join(names())}.")


def _agree(row: Variant | None, name: str, agreed: bool) -> None:
    """Show the licence; ask where it is not a free one. row: None for what comes with no model, all of it free."""
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
    print("Do you agree to it? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise RequestError(f"{row.name} was not pulled: its licence was not agreed to.")


def _quiet() -> None:
    """Bars where someone looks on; nowhere the library's own advice, which is about its own commands."""
    import logging

    from huggingface_hub.utils import disable_progress_bars

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        disable_progress_bars()


def _items(hub: Path, wish: FileSelection) -> list[RemoteFile]:
    """The files of the repository that are wanted, with sizes, and what of them is there."""
    from fnmatch import fnmatch

    from huggingface_hub import HfApi

    info = HfApi().model_info(wish.repo, files_metadata=True)
    there = {file.rfilename: file for file in info.siblings or []}
    needed = _shards(hub, wish, str(info.sha), there)
    chosen = [name for name in there if any(fnmatch(name, pattern) for pattern in wish.patterns) and needed(name)]
    if missing := [pattern for pattern in wish.patterns if "*" not in pattern and pattern not in there]:
        raise RequestError(f"{wish.repo} has no {missing[0]}.", hint="Has the repository changed? Look at its page.")
    items = []
    for name in chosen:
        size, lfs = int(there[name].size or 0), there[name].lfs
        item = RemoteFile(wish.repo, str(info.sha), name, size, lfs.sha256 if lfs else None, 0)
        items.append(RemoteFile(item.repo, item.commit, name, size, item.sha256, min(size, _have(hub, item))))
    return items


def _shards(hub: Path, wish: FileSelection, commit: str, there: dict[str, Any]) -> Callable[[str], bool]:
    """Whether a file is needed: of the text encoder only the shards with layers that are read."""
    index = "text_encoder/model.safetensors.index.json"
    if index not in there or not any(pattern.startswith("text_encoder") for pattern in wish.patterns):
        return lambda name: True
    from huggingface_hub import hf_hub_download

    weight_map = json.loads(Path(hf_hub_download(wish.repo, index, revision=commit, cache_dir=hub)).read_text())
    last = max(next(row for row in VARIANTS.values() if row.repo == wish.repo).text_layers)
    files = {f"text_encoder/{file}" for name, file in weight_map["weight_map"].items() if _is_read(name, last)}
    return lambda name: not re.fullmatch(r"text_encoder/.*\.safetensors", name) or name in files


def _is_read(tensor: str, layers: int) -> bool:
    """Of Qwen3, the table and the first layers; never the final norm or the language model's head."""
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
    return (_snapshot(hub, item) / item.name).exists() or blob.exists()


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
    """One file into the cache. What is large goes through a partial file, which outlives a broken connection."""
    from huggingface_hub import hf_hub_download

    if item.sha256 and not _is_there(hub, item):
        _fetch_large(hub, item)
    hf_hub_download(item.repo, item.name, revision=item.commit, cache_dir=hub)


def _fetch_large(hub: Path, item: RemoteFile) -> None:
    """The library keeps no partial file between two runs, and checks lengths, not hashes; gigabytes deserve both."""
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
    """Turns what the hub and the network answer into one line with the next step."""
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
    """known: the hub knows who asks, and still says no. A quantised file's repository has a gate of its own."""
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
    """The hub's own command; where this program has an environment of its own, it is not on the PATH."""
    beside = Path(sys.executable).with_name("hf")
    return str(beside) if shutil.which("hf") is None and beside.exists() else "hf"


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
