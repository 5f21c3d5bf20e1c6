"""Ends the work for a request whose client has disconnected."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive


@asynccontextmanager
async def cancelled_on_disconnect(receive: Receive) -> AsyncIterator[None]:
    """Cancel the block once the client disconnects.

    The request's body must have been read. Exceptions leave the block in an ExceptionGroup: handle them inside it.
    """
    async with anyio.create_task_group() as tasks:

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            tasks.cancel_scope.cancel()

        tasks.start_soon(watch)
        yield
        tasks.cancel_scope.cancel()


async def end_quietly(request: Request, exc: Exception) -> Response:
    """Answer a client that left before its request was complete."""
    return Response(status_code=400)  # nobody reads it
