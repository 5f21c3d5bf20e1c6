"""Imports ray, which the optional extra `klein-mcp[ray]` installs.

It also finds the one line of its errors that is for people.
"""

import os
from importlib import import_module
from pathlib import Path
from typing import Any

from klein_mcp.errors import RequestError, install_extra


def import_ray() -> Any:
    """Return ray with ray.serve. Raises RequestError where it is not installed."""
    try:
        import_module("ray.serve")
        return import_module("ray")
    except ImportError as exc:
        raise RequestError(f"Clusters need Ray ({exc}).", hint=install_extra("ray")) from None


def ray_folder() -> Path:
    """Return the folder of this user for Ray's files."""
    return Path("/tmp") / f"klein-mcp-{os.getuid()}"  # sockets lie in it, whose paths have at most 107 bytes


def first_line(error: Exception) -> str:
    """Return the first line of an error, its kind without words."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def last_line(error: Exception | str) -> str:
    """Return the last line of an error.

    Errors of other processes are whole tracebacks, whose last line names the cause.
    """
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
