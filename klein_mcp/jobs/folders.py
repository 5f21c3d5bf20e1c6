"""Folders in which a client's relative paths are looked for, and written."""

from pathlib import Path

from klein_mcp.errors import Refused
from klein_mcp.jobs.context import CallContext
from klein_mcp.settings import Settings, user_home


async def writable(settings: Settings, call: CallContext) -> tuple[Path, ...]:
    """Return the folders open for writing.

    Those of the settings, else the client's roots, else the folder this server was started in.

    Raises Refused if that last one is not below the user's home: nobody chose it for images.
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
    if home is None or here == home.resolve() or not here.is_relative_to(home.resolve()):
        raise Refused(
            f"No folder is open for writing: {here}, in which this server was started, "
            "is not a folder below your home, or is the home itself.",
            hint=ALLOW,
        )
    return (here,)


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
