"""Installed models, as a front end knows them."""

from engine.families.klein.variants import EMBEDDED
from klein_mcp.jobs.service import Service


async def installed_models(service: Service) -> list[str]:
    """Return the names of installed models.

    The engine looks for them; before it has run, only the embedded one is known. Never starts it.
    """
    status = await service.jobs.status()
    if status.engine is None:
        return [EMBEDDED]
    return [model.name for model in status.engine.models if model.path is not None]
