"""The doctor's checks of disks, folders, and the key that signs."""

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from klein_mcp.errors import RequestError, install_extra
from klein_mcp.private import keeps_private
from klein_mcp.settings import Settings

LEAST_DISK = 5 * 10**9
"""Bytes of free disk below which images or a download may fail."""

DAEMON_FILES = ("daemon.log", "daemon.err", "daemon.json", "daemon.host")

_REPAIR = "Run: klein-mcp doctor --repair; it takes them in, or names those that are damaged."
_OTHER = "Change its owner, or set KLEIN_HOME and KLEIN_HUB."


@dataclass(frozen=True, slots=True)
class Check:
    """One finding.

    todo: what to do about it, "" if nothing. optional: generation works without it, so it is advice.
    """

    subject: str
    found: str
    todo: str = ""
    optional: bool = False


def check_disk(settings: Settings) -> Check:
    """Check that the data folders can be made and have room."""
    found = []
    for place in dict.fromkeys((settings.home, settings.hub)):
        existing, obstacle = _place_of(place)
        if obstacle:
            return Check("disk", obstacle, _OTHER)
        disk = shutil.disk_usage(existing)
        if not disk.total:  # /proc, for one, which root may write to
            return Check("disk", f"{place} would be on no disk", _OTHER)
        free = disk.free
        found.append(f"{free / 1e9:.0f} GB free for {place}")
        if free < LEAST_DISK:
            return Check("disk", found[-1], "Free some space: klein-mcp prune deletes old images.")
    return Check("disk", ", ".join(found))


def check_daemon_files(settings: Settings) -> Iterator[Check]:
    """Name what stands where the daemon writes its own files."""
    for name in DAEMON_FILES:
        path = settings.home / name
        if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
            yield Check("data folder", f"{path} is not a regular file, so no engine can start", "Remove it.")
    place, obstacle = _place_of(settings.home)
    with contextlib.suppress(OSError):  # a full disk has a finding of its own
        if not obstacle and not keeps_private(place):
            found = f"{place} is on a disk that sets owner and mode of its files itself, so no engine can start"
            yield Check("data folder", found, "Set KLEIN_HOME to a folder on another disk.")


def check_library(settings: Settings) -> Check:
    """Check the index, and that images and files belong together.

    This does not create a library.
    """
    from klein_mcp.images import recovery
    from klein_mcp.images.index import DATABASE
    from klein_mcp.images.library import Store

    # Before the index is read: a process that saves an image records it first.
    files = list(recovery.image_files(settings.library / "files"))
    if not os.path.exists(settings.library / DATABASE):
        _, obstacle = _place_of(settings.library)
        if obstacle:
            return Check("library", f"cannot be made: {obstacle}", _OTHER)
        if files:
            return Check("library", f"{len(files)} files in {settings.library}, no index", _REPAIR, optional=True)
        return Check("library", "empty")
    try:
        store = Store(settings.library)
    except (RequestError, OSError) as error:
        return Check("library", "cannot be opened", str(error))
    try:
        store.check(quick=True)
        records = store.everything()
        missing = [record.handle for record in records if not store.has_file(record)]
    except (RequestError, OSError) as error:
        return Check("library", "cannot be read", str(error))
    finally:
        store.close()
    found = f"{len(records)} images in {settings.library}"
    known = {record.file for record in records}
    if unknown := [path for path in files if path.stem not in known and path.exists()]:
        return Check("library", f"{found}, {len(unknown)} files that are not in its index", _REPAIR, optional=True)
    if missing:
        todo = (
            f"Restore the files of {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}, or generate them again."
        )
        return Check("library", f"{found}, {len(missing)} without a file", todo, optional=True)
    return Check("library", found)


def _place_of(place: Path) -> tuple[Path, str]:
    """Return the nearest existing folder, and why nothing can be made there."""
    existing = next((folder for folder in (place, *place.parents) if os.path.lexists(folder)), place)
    if not os.path.isdir(existing):
        return existing, f"{existing} is not a folder"
    # A folder that may not be entered hides what is in it, and is the nearest then.
    return existing, "" if os.access(existing, os.W_OK | os.X_OK) else f"{existing} cannot be written"


def check_roots(settings: Settings) -> Iterator[Check]:
    """Name folders opened by a setting that are none."""
    for name, roots in (("KLEIN_READ_ROOTS", settings.read_roots), ("KLEIN_WRITE_ROOTS", settings.write_roots)):
        for root in roots or ():
            if not os.path.isdir(root):
                found = "is not a folder" if os.path.lexists(root) else "does not exist"
                yield Check("settings", f"{root} in {name} {found}", "Make it, or correct the setting.", optional=True)
            elif name == "KLEIN_WRITE_ROOTS" and not os.access(root, os.W_OK | os.X_OK):
                yield Check("settings", f"{root} in {name} cannot be written", "Change its owner.", optional=True)


def check_signer(settings: Settings) -> Iterator[Check]:
    """Check that files can be signed where a setting asks for it.

    This does not make a key.
    """
    if settings.credentials == "off":
        return
    asked = f"KLEIN_CREDENTIALS is {settings.credentials}"
    if find_spec("c2pa") is None:
        todo = f"{install_extra('c2pa')} Or set KLEIN_CREDENTIALS=off."
        yield Check("credentials", f"{asked}, but c2pa is not installed: no file can be saved", todo)
        return
    from klein_mcp.images.credentials import CredentialSigner

    local = settings.credentials == "local"
    place = settings.home / "credentials" if local else Path(settings.credentials)
    try:
        if not local or (place / "key.pem").exists():
            CredentialSigner.read(place)
    except (RequestError, OSError) as error:
        yield Check("credentials", asked, str(error))
        return
    yield Check("credentials", asked)
