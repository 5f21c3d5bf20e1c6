"""Imports ray, which the optional extra `klein-mcp[ray]` installs."""

from importlib import import_module
from typing import Any

from klein_mcp.errors import RequestError


def import_ray() -> Any:
    """Return ray with ray.serve. Raises RequestError where it is not installed."""
    try:
        import_module("ray.serve")
        return import_module("ray")
    except ImportError as exc:
        raise RequestError(f"Clusters need Ray ({exc}).", hint="Install it: pip install 'klein-mcp[ray]'.") from None
