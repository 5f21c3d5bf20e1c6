"""What generate, edit, compose and wait_for_job have in common: a picture, or a promise, as a result."""

from collections.abc import Sequence
from dataclasses import replace

import anyio.to_thread
from mcp_types import CallToolResult

from klein_mcp import results
from klein_mcp.call import Call
from klein_mcp.clients import how_to_show
from klein_mcp.order import Order
from klein_mcp.outcome import HandedOver, Outcome
from klein_mcp.service import Service


async def paint(
    service: Service, call: Call, order: Order, show: str | None, warnings: Sequence[str] = ()
) -> CallToolResult:
    """warnings: what the tool itself had to change about the wish."""
    outcome = await service.paint_within(service.settings.wait_budget, order, call)
    outcome = replace(outcome, warnings=(*warnings, *outcome.warnings))
    return await told(service, call, outcome, show)


async def told(service: Service, call: Call, outcome: Outcome | HandedOver, show: str | None) -> CallToolResult:
    if isinstance(outcome, HandedOver):
        return CallToolResult(content=[results.promise(outcome)])
    how = show or service.settings.show or how_to_show(call.name)
    return await anyio.to_thread.run_sync(lambda: results.painted(outcome, service.store, how, call))
