"""engine_status: reports models, memory and queue without starting the engine."""

from mcp_types import CallToolResult

from klein_mcp import __version__
from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.installed import models_of
from klein_mcp.jobs.service import Service
from klein_mcp.jobs.status import to_json
from klein_mcp.mcp_server import results
from klein_mcp.mcp_server.tools import fields
from klein_mcp.mcp_server.tools.tool import Tool


class EngineStatusArguments(fields.Arguments):
    pass


async def run(service: Service, call: CallContext, arguments: EngineStatusArguments) -> CallToolResult:
    status, models = await service.jobs.status(), await models_of(service)
    known = status.engine.models if status.engine else ()
    model = (status.engine and status.engine.loaded) or models.default
    elsewhere = service.settings.engine
    return CallToolResult(
        content=[
            results.text(
                {
                    "version": __version__,
                    "model_setting": service.settings.model,
                    # Empty lists would say that nothing is installed; engines elsewhere tell with the first image.
                    **({"models": models.to_json(known)} if models.names else {}),
                    **({"engines": list(elsewhere)} if elsewhere else {}),
                    "model_in_use": status.engine and status.engine.loaded,
                    "seconds_per_image": status.seconds_per_image(model),
                    **to_json(status),
                }
            )
        ]
    )


TOOL = Tool(
    name="engine_status",
    title="Engine status",
    description="Installed models, the one auto takes, licences, memory, the queue, and seconds per image.",
    arguments=EngineStatusArguments,
    run=run,
    read_only=True,
    idempotent=True,
)
