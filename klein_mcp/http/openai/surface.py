"""/v1: the OpenAI images API over the jobs of every front end."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from klein_mcp.http.openai.errors import ApiError, refusal
from klein_mcp.http.openai.images import OpenAiImageRoute
from klein_mcp.http.openai.models import Models
from klein_mcp.http.surface import HttpContext, Surface

EVERY_METHOD = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


def surface(context: HttpContext) -> Surface:
    models = Models(context)
    routes = [
        Route("/v1/images/generations", OpenAiImageRoute(context, "image_generation"), methods=["POST"]),
        Route("/v1/images/edits", OpenAiImageRoute(context, "image_edit"), methods=["POST"]),
        Route("/v1/models", models.list, methods=["GET"]),
        Route("/v1/models/{name:path}", models.one, methods=["GET"]),
        Route("/v1/{path:path}", _unknown, methods=EVERY_METHOD),
    ]
    return Surface("openai", routes, "token", error=refusal, cross_origin=True)


async def _unknown(request: Request) -> Response:
    what = f"{request.method} {request.url.path}"
    return ApiError(404, f"{what} is not part of this API: it makes and edits images.", code="unknown_url").response()
