"""/healthz: tells a probe that the process answers, and nothing else."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from klein_mcp import __version__
from klein_mcp.http.surface import HttpContext, Surface


def surface(context: HttpContext) -> Surface:
    # A probe knows neither our name nor the token.
    return Surface("health", [Route("/healthz", _healthz, methods=["GET"])], "none", any_host=True)


async def _healthz(request: Request) -> Response:
    return JSONResponse({"status": "ok", "version": __version__})
