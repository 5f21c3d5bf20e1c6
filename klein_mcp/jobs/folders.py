"""Folders in which a client's relative paths are looked for, and written."""

import contextlib
from pathlib import Path

from klein_mcp.errors import Refused
from klein_mcp.jobs.context import CallContext
from klein_mcp.settings import Settings, user_home


async def writable(settings: Settings, call: CallContext) -> tuple[Path, ...]:
    """Return the folders open for writing.

    Those of the settings, else the client's roots, else the folder this server was started in if it is below the
    user's home: else nobody chose it for images. Then a folder of our own beside the user's pictures, because desktop
    clients start servers anywhere and name no roots. Raises Refused where there is no folder for pictures either.
    """
    if settings.write_roots is not None:
        return settings.write_roots
    if call.link is not None:
        return ()  # a remote client names folders of its own machine, not of ours
    if roots := await call.roots():
        return roots
    from klein_mcp.images.export import ALLOW

    try:
        here = Path.cwd().resolve()
    except FileNotFoundError:
        raise Refused("The folder in which this server was started is gone.", hint=ALLOW) from None
    home = user_home()
    if home and here != home.resolve() and here.is_relative_to(home.resolve()):
        return (here,)
    if home and (home / "Pictures").is_dir():
        ours = home / "Pictures" / "klein-mcp"
        with contextlib.suppress(OSError):
            ours.mkdir(exist_ok=True)
            return (ours.resolve(),)
    raise Refused(f"No folder is open for writing: this server was started in {here}.", hint=ALLOW)


async def project_folders(settings: Settings, call: CallContext) -> tuple[Path, ...]:
    """Return the folders that relative paths of an input start from.

    A saved image is then found under the path it was saved to. A remote client has none here.
    """
    if call.link is not None:
        return ()
    try:
        return tuple(dict.fromkeys((*await writable(settings, call), *(await call.roots() or ()))))
    except Refused:
        return ()
