"""The MCP server of every door: our tools, in our own words when something is wrong."""

import hashlib
import logging
import os
import secrets
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import anyio
import anyio.to_thread
from mcp.server.lowlevel.server import NotificationOptions
from mcp.server.mcpserver import Context, MCPServer
from mcp.shared.exceptions import MCPError
from mcp_types import (
    INVALID_PARAMS,
    CallToolResult,
    EmptyResult,
    Resource,
    ResourceTemplate,
    SetLevelRequestParams,
    SubscribeRequestParams,
    TextContent,
    UnsubscribeRequestParams,
)
from mcp_types import Tool as Listed

from engine.contract import Busy, EngineError
from klein_mcp import __version__
from klein_mcp.errors import RequestError, did_you_mean, one_line, shown
from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.service import Service
from klein_mcp.mcp_server import prompts, resources
from klein_mcp.mcp_server.tools import TOOLS

log = logging.getLogger(__name__)

INSTRUCTIONS = (
    "Pictures by FLUX.2 [klein], on this machine. generate_image paints from words, edit_image changes a picture, "
    "compose_references joins several. Each result names a handle: use it (or last) as the image of the next call. "
    "Handles stay valid, so go back to an earlier picture rather than mend a bad one. Same seed and words, same "
    "picture; count paints drafts to choose from. save_image puts the full picture into the user's project; otherwise "
    "tell the user the path. If a result holds a job, call wait_for_job. Prompts: plain sentences, subject first, "
    "then light; say what is there, not what is not. Where the model is nano, a demo, keep to a few of its words: "
    "klein://guide."
)


ROOTS_WAIT = 3.0
"""Seconds for a client to name its folders; some say that they can and never answer."""

Link = Callable[[Any], Callable[[str], str] | None]
"""From an HTTP request to what makes download addresses for its sender; None for a sender that shares our disk."""


async def _set_level(context: Any, params: SetLevelRequestParams) -> EmptyResult:
    """Any level is fine: what a call has to say is in its result, and the rest goes to stderr."""
    return EmptyResult()


class KleinServer(MCPServer):
    """MCPServer with tools of our own: the SDK's ignore unknown arguments and word errors for people."""

    def __init__(self, service: Service, link: Link | None) -> None:
        self.service = service
        self._link = link
        self._door = f"door-{os.getpid()}-{secrets.token_hex(4)}"
        super().__init__(
            "klein-mcp",
            title="klein-mcp",
            instructions=INSTRUCTIONS,
            version=__version__,
            log_level=service.settings.log_level.upper(),  # type: ignore[arg-type]
        )
        self.listeners = resources.ResourceSubscriptions(self._subscriptions)
        self.middleware.append(self.listeners.remember)
        # MCPServer has no door for these three of the legacy era, nor for saying that its list of resources changes.
        low = self._lowlevel_server
        low.add_request_handler("resources/subscribe", SubscribeRequestParams, self.listeners.subscribe)
        low.add_request_handler("resources/unsubscribe", UnsubscribeRequestParams, self.listeners.unsubscribe)
        low.add_request_handler("logging/setLevel", SetLevelRequestParams, _set_level)
        low.create_initialization_options = partial(  # type: ignore[method-assign]
            low.create_initialization_options, NotificationOptions(resources_changed=True)
        )

    async def list_tools(self) -> list[Listed]:
        return [tool.listed() for tool in TOOLS.values()] + await super().list_tools()

    async def call_tool(self, name: str, arguments: dict[str, Any], context: Context[Any, Any] | None = None) -> Any:
        if self._tool_manager.get_tool(name) is not None:
            return await super().call_tool(name, arguments, context)
        try:
            tool = TOOLS.get(name)
            if tool is None:
                known = [*TOOLS, *(tool.name for tool in self._tool_manager.list_tools())]
                raise RequestError(
                    f"There is no tool {shown(name)}. {did_you_mean(name, known)} There are {', '.join(known)}."
                )
            return await tool.run(self.service, self._caller(context), tool.parse(arguments))
        except RequestError as problem:
            return _failed(str(problem))
        except Busy as problem:
            return _failed(f"{problem} Try again in {problem.retry_after:.0f} s.")
        except EngineError as problem:
            return _failed(str(problem))
        except (OSError, sqlite3.Error) as problem:
            log.exception("%s failed", name)
            home = self.service.settings.home
            return _failed(f"{name} met a problem with the disk: {problem}. Space and permissions of {home} matter.")
        except Exception as problem:
            log.exception("%s failed", name)
            kind = type(problem).__name__
            return _failed(f"{name} failed inside klein-mcp ({kind}); its log on stderr says where. Other calls work.")

    async def get_prompt(
        self, name: str, arguments: dict[str, Any] | None = None, context: Context[Any, Any] | None = None
    ) -> Any:
        if self._prompt_manager.get_prompt(name) is None:
            known = [prompt.name for prompt in self._prompt_manager.list_prompts()]
            said = f"There is no prompt {shown(name)}. {did_you_mean(name, known)} There are {', '.join(known)}."
            raise MCPError(code=INVALID_PARAMS, message=one_line(said))
        return await super().get_prompt(name, arguments, context)

    async def list_resources(self) -> list[Resource]:
        return await super().list_resources() + await anyio.to_thread.run_sync(resources.listed, self.service)

    async def list_resource_templates(self) -> list[ResourceTemplate]:
        return await super().list_resource_templates() + resources.templates()

    async def read_resource(self, uri: Any, context: Context[Any, Any] | None = None) -> Any:
        if str(uri) == resources.ALL or str(uri).startswith(f"{resources.ALL}/"):
            return await resources.read(self.service, str(uri), self._caller(context))
        return await super().read_resource(uri, context)

    async def serve(self, read: Any, write: Any) -> None:
        """One client over a pair of streams."""
        await self._lowlevel_server.run(read, write, self._lowlevel_server.create_initialization_options())

    def _caller(self, context: Context[Any, Any] | None) -> CallContext:
        if context is None:
            return CallContext(self._door)
        session, request = context.session, context.request_context.request
        params = session.client_params

        async def tell(done: float, total: float, message: str) -> None:
            with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
                await context.report_progress(done, total, message)

        return CallContext(
            client=self._door if request is None else http_client(request),
            name=params.client_info.name if params else "",
            tell=tell,
            roots=lambda: _roots(session),
            painted=self.listeners.painted,
            link=self._link(request) if self._link and request is not None else None,
        )


async def _roots(session: Any) -> tuple[Path, ...] | None:
    """The folders the client works in; None where it has none, says nothing, or takes too long."""
    offered = session.client_capabilities
    if not session.can_send_request or offered is None or offered.roots is None:
        return None
    with anyio.move_on_after(ROOTS_WAIT), suppress(MCPError):
        roots = (await session.list_roots()).roots
        paths = [
            Path(url2pathname(urlsplit(str(root.uri)).path)) for root in roots if str(root.uri).startswith("file:")
        ]
        return tuple(path for path in paths if path.is_absolute()) or None
    return None


def http_client(request: Any) -> str:
    """One legacy session, else one token: what `last` belongs to."""
    session = request.headers.get("mcp-session-id") or request.query_params.get("session_id")
    if session:
        return f"session-{session}"
    token = request.headers.get("authorization", "")
    return f"token-{hashlib.sha256(token.encode()).hexdigest()[:16]}"


def _failed(message: str) -> CallToolResult:
    return CallToolResult(content=[TextContent(type="text", text=one_line(message))], is_error=True)


def create_server(service: Service, *, link: Link | None = None) -> KleinServer:
    """One server per door; it opens nothing until the first call."""
    server = KleinServer(service, link)
    prompts.register(server, lambda typed: service.store.handles(typed, 20))
    return server
