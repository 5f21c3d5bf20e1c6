"""ModelSearch: the places searched for models, without torch.

A front end lists the installed models with it before any engine runs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from engine import diagnose
from engine.checkpoints.files import SUFFIXES, read_header
from engine.contract import BadWeights, EngineConfig
from engine.families.klein import foreign, identify, signatures
from engine.families.klein.answers import Answers
from engine.families.klein.folder import INDEX, is_complete, read_json, weights_files
from engine.families.klein.variants import EMBEDDED, VARIANTS, Variant

_DEPTH = 3
"""Folders below a given one that are searched: ComfyUI's models/diffusion_models/flux/x.safetensors."""
_MOST_FOLDERS = 2000
"""Folders that are searched below a given one; a ComfyUI with every extension has some 300 that deep."""
_PSEUDO = ("/proc", "/sys", "/dev")
"""Folders of the system that hold nobody's files; below /proc lies every other folder once more."""
_HUB_WORDS = ("klein", "flux", "qwen3")
"""In the names of the hub's repositories that can hold a klein or its companions."""


@dataclass(frozen=True, slots=True)
class ModelSearch:
    """The places that are searched for models.

    paths: folders that are models or hold models (ComfyUI's `models` among them), and single files.
    hub: the hub's cache folder. variant: the klein that single files hold where they cannot tell.
    answers: what was found out before.
    """

    paths: tuple[Path, ...] = ()
    hub: Path | None = None
    variant: str | None = None
    answers: Answers = field(default_factory=Answers)

    @classmethod
    def of(cls, config: EngineConfig) -> "ModelSearch":
        """Return the search of an engine with this configuration."""
        return cls(config.models, config.hub, config.variant, Answers(config.answers))

    def models(self) -> Iterator[tuple[Path, Variant]]:
        """Yield each folder and file that has a variant's name."""
        for path in self.places():
            row = self.known_variant(path)
            if row is not None and (path.is_file() or is_complete(path)):
                yield path, row

    def names(self) -> tuple[str, ...]:
        """Return the installed variants, the embedded one first."""
        found = {EMBEDDED, *(row.name for _, row in self.models())}
        return tuple(name for name in VARIANTS if name in found)

    def known_variant(self, path: Path) -> Variant | None:
        """Return the variant of a folder or of a readable transformer."""
        if path.is_dir():
            return identify.by_path(path) if not foreign_folder(path) else None
        if signatures.TRANSFORMER not in signatures.components_of(path) or path.suffix.lower() not in SUFFIXES:
            return None
        header = read_header(path)
        width = identify.width(header)
        row = identify.by_path(path) or identify.by_known_hash(path, self.answers) or self._named_by_user(path, width)
        if row is None or foreign.format_of(header):
            return None
        try:
            identify.check_width(path, width, row)
        except BadWeights:
            return None
        return row

    def _named_by_user(self, file: Path, width: int) -> Variant | None:
        """Return what the user says a file is: now, or else earlier."""
        now = VARIANTS.get(self.variant or "")
        if now is not None and identify.has_width(now, width):
            return now
        return identify.by_answer(file, self.answers) or now

    def places(self) -> Iterator[Path]:
        """Yield folders with an index, and single files."""
        for path in self.paths:
            yield from walk(path, _DEPTH)
        if self.hub is not None:
            yield from _snapshots(self.hub)


def foreign_folder(folder: Path) -> BadWeights | None:
    """Return the error for a folder whose transformer another program quantised."""
    try:
        if (config := folder / "transformer" / "config.json").is_file():
            foreign.refuse_config(read_json(config), folder)
    except BadWeights as error:
        return error
    return None


def walk(path: Path, depth: int, seen: set[tuple[int, int]] | None = None) -> Iterator[Path]:
    """Yield folders with an index, and weights files, down to `depth`.

    seen: folders that were searched, by device and number: a link to a folder above leads back into it.
    """
    seen = set() if seen is None else seen
    try:
        if path.suffix.lower() in (*SUFFIXES, *diagnose.UNREAD_SUFFIXES) and path.is_file():
            yield path
        elif (path / INDEX).is_file():
            yield path
            yield from weights_files(path)
        elif depth >= 0 and str(path) not in _PSEUDO and path.is_dir():
            status = path.stat()
            folder = (status.st_dev, status.st_ino)
            if folder in seen or len(seen) >= _MOST_FOLDERS:
                return
            seen.add(folder)
            for child in sorted(path.iterdir()):
                if not child.name.startswith("."):
                    yield from walk(child, depth - 1, seen)
    except OSError:
        # One of many folders that this user may not read, or that is none: the rest is enough.
        return


def _snapshots(hub: Path) -> Iterator[Path]:
    """Yield klein's folders and files in the hub's cache."""
    try:
        repos = sorted(hub.glob("models--*"))
    except OSError:
        return
    for repo in repos:
        if any(word in repo.name.lower() for word in _HUB_WORDS):
            for snapshot in sorted((repo / "snapshots").glob("*")):
                yield from walk(snapshot, _DEPTH)
