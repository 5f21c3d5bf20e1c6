"""GET /v1/models and /v1/models/{id}: the models that a menu may offer."""

from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from engine.families.klein.variants import EMBEDDED, VARIANTS
from klein_mcp.errors import quote
from klein_mcp.http.openai.errors import ApiError, to_api_error
from klein_mcp.http.surface import HttpContext
from klein_mcp.jobs.installed import installed_models
from klein_mcp.jobs.service import Service

CREATED = 1_767_225_600
"""2026-01-01. The field is required, and a model here has no date of its own."""


async def naming_installed(exc: Exception, service: Service) -> ApiError:
    """Translate an error, with the installed models for an unknown one."""
    error = to_api_error(exc)
    if error is not exc or error.code != "model_not_found":  # the engine's own message has them
        return error
    names = ", ".join(["auto", *await installed_models(service)])
    return replace(error, message=f"{error.message} Installed: {names}.")


async def model_list(context: HttpContext) -> list[dict[str, Any]]:
    """Return `auto` and every installed model."""
    names = ["auto", *await installed_models(context.service)]
    return [_entry(name) for name in names]


def _entry(name: str) -> dict[str, Any]:
    side = VARIANTS[EMBEDDED].native_size
    demo = {"description": f"Embedded demo model, {side} × {side} pixels"} if name == EMBEDDED else {}
    return {"id": name, "object": "model", "created": CREATED, "owned_by": "klein-mcp", **demo}


class Models:
    """The two routes."""

    def __init__(self, context: HttpContext) -> None:
        self._context = context

    async def list(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": await model_list(self._context)})

    async def one(self, request: Request) -> Response:
        name = request.path_params["name"]
        found = [entry for entry in await model_list(self._context) if entry["id"] == name]
        if not found:
            message = f"There is no model {quote(name)} here."
            return ApiError(404, message, "model", "model_not_found").response()
        return JSONResponse(found[0])
