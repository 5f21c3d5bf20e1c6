"""The MCP server behind every transport."""

import json
import logging
import os
import secrets
import sqlite3
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from mcp.server.extension import Extension
from mcp.server.lowlevel.helper_types import ReadResourceContents
from mcp.server.lowlevel.server import NotificationOptions
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ResourceNotFoundError
from mcp.server.models import InitializationOptions
from mcp.shared.exceptions import MCPError
from mcp_types import (
    INVALID_PARAMS,
    CallToolResult,
    EmptyResult,
    Icon,
    Resource,
    ResourceTemplate,
    SetLevelRequestParams,
    SubscribeRequestParams,
    TextContent,
    UnsubscribeRequestParams,
)
from mcp_types import Tool as Listed

from engine.contract import Busy, EngineError
from engine.families.klein.variants import EMBEDDED
from klein_mcp import __version__
from klein_mcp.errors import RequestError, did_you_mean, explain, one_line, quote
from klein_mcp.images.paths import folder_of
from klein_mcp.jobs.context import CallContext
from klein_mcp.jobs.installed import InstalledModels, find, models_of
from klein_mcp.jobs.service import Service
from klein_mcp.mcp_server import icon, prompts, resources, results, sender, studio_app, studio_resources
from klein_mcp.mcp_server.tools import TOOLS
from klein_mcp.mcp_server.tools.leniency import ignored_warning, split_client_arguments
from klein_mcp.mcp_server.tools.tool import Tool
from klein_mcp.settings import Settings
from klein_mcp.studio import picks
from klein_mcp.studio.feed import Feed

log = logging.getLogger(__name__)

# Clients show stderr as errors. Until they have another way to name the project's folder, we ask for their roots.
warnings.filterwarnings("ignore", message="The roots capability is deprecated")

INSTRUCTIONS = (
    "Images by FLUX.2 [klein], on this machine. generate_image makes an image from words, edit_image changes one, "
    "compose_references joins several. Each result names a handle: use it as the image of the next call. "
    "Handles stay valid, so go back to an earlier image rather than repair a bad one. Same seed and prompt, same "
    "image; count makes drafts to choose from. save_image writes the full image into the user's project; otherwise "
    "tell the user the path. If a result holds a job, call wait_for_job. Prompts: plain sentences, subject first, "
    "then light; describe what is there, not what is absent."
)


ROOTS_WAIT = 3.0
"""Seconds for a client to name its folders; some declare that they can and never answer."""

SEARCH_WAIT = 1.0
"""Seconds to search for models before a client is answered; folders of hundreds of files on a slow disk take longer."""

STOP_WAIT = 2.0
"""Seconds for the engine to hear that a job is cancelled."""

CONNECTING = ("initialize", "server/discover")
"""The first request of a client, in the legacy era and since."""

Link = Callable[[Any], Callable[[str], str] | None]
"""Maps an HTTP request to a maker of download addresses for its sender, None for a sender that shares our disk."""


async def _set_level(context: Any, params: SetLevelRequestParams) -> EmptyResult:
    """Accept any level and ignore it: the log goes to stderr."""
    return EmptyResult()


class KleinServer(MCPServer):
    """MCPServer with tools of our own.

    The SDK's tools ignore unknown arguments, and word errors for programmers instead of models.
    """

    def __init__(self, service: Service, link: Link | None, extensions: Sequence[Extension]) -> None:
        self.service = service
        self._link = link
        self._client = f"front-end-{os.getpid()}-{secrets.token_hex(4)}"
        super().__init__(
            "klein-mcp",
            title="klein-mcp",
            instructions=INSTRUCTIONS,
            version=__version__,
            icons=[Icon(src=icon.DATA_URI, mime_type=icon.MEDIA_TYPE, sizes=["any"])],
            extensions=extensions,
            log_level=service.settings.log_level.upper(),  # type: ignore[arg-type] - settings allow its words only
        )
        self.subscriptions = resources.ResourceSubscriptions(self._subscriptions)
        self.middleware.append(self.subscriptions.remember)
        self.middleware.append(studio_app.note_support)
        self.middleware.append(sender.note_sharing)
        self.middleware.append(self._name_models)
        self.feed = Feed(service)
        # MCPServer has no public way to add these three methods of the legacy era, nor to declare that its list of
        # resources changes.
        low = self._lowlevel_server
        low.add_request_handler("resources/subscribe", SubscribeRequestParams, self.subscriptions.subscribe)
        low.add_request_handler("resources/unsubscribe", UnsubscribeRequestParams, self.subscriptions.unsubscribe)
        low.add_request_handler("logging/setLevel", SetLevelRequestParams, _set_level)
        self._make_options = low.create_initialization_options
        low.create_initialization_options = self._options  # type: ignore[method-assign]

    def _options(self, *_: Any) -> InitializationOptions:
        return self._make_options(NotificationOptions(resources_changed=True))

    async def _name_models(self, ctx: Any, call_next: Any) -> Any:
        """Middleware: add the models installed now to the instructions, in both eras."""
        result = await call_next(ctx)
        if ctx.method not in CONNECTING or result is None:  # a notification of that name has no answer
            return result
        return {**result, "instructions": f"{INSTRUCTIONS} {await _models_in_time(self.service.settings)}"}

    async def list_tools(self) -> list[Listed]:
        models = await models_of(self.service)
        tools = [_for_models(tool.listed(), models) for tool in TOOLS.values()]
        if studio_app.supported():
            tools = [*map(studio_app.with_page, tools), studio_app.PICK.listed()]
        if sender.is_shared():
            tools = [*map(sender.without_last, tools)]
        return tools + await super().list_tools()

    async def call_tool(self, name: str, arguments: dict[str, Any], context: Context[Any, Any] | None = None) -> Any:
        if self._tool_manager.get_tool(name) is not None:
            return await super().call_tool(name, arguments, context)
        page = {studio_app.PICK.name: studio_app.PICK} if studio_app.supported() else {}
        meta: Mapping[str, Any] = (context.request_context.meta if context else None) or {}
        call, from_view = self._call_context(context), studio_app.FROM_VIEW in meta
        if not from_view:
            await self._claim_pick(name, call.client)
        try:
            result = await self.run_tool(name, arguments, call, {**TOOLS, **page})
        except anyio.get_cancelled_exc_class():
            if name == "wait_for_job" and meta.get(studio_app.FROM_VIEW) is True:
                await self._stop(str(arguments.get("job")))
            raise
        return result if from_view else await self._with_pick(name, result, call.client)

    async def _stop(self, job: str) -> None:
        """Cancel a detached job, which the person waits for no longer."""
        with anyio.move_on_after(STOP_WAIT, shield=True), suppress(LookupError, EngineError):
            await self.service.jobs.cancel(job)

    async def run_tool(
        self, name: str, arguments: dict[str, Any], call: CallContext, tools: Mapping[str, Tool] = TOOLS
    ) -> CallToolResult:
        """Run a tool for any front end, with errors as results."""
        try:
            tool = tools.get(name)
            if tool is None:
                known = [*tools, *(tool.name for tool in self._tool_manager.list_tools())]
                raise RequestError(
                    f"There is no tool {quote(name)}. {did_you_mean(name, known)} There are {', '.join(known)}."
                )
            arguments, added = split_client_arguments(arguments, tool.arguments.model_fields)
            result = await tool.run(self.service, call, tool.parse(arguments))
            return results.with_warning(result, ignored_warning(added)) if added else result
        except Busy as exc:
            return _error_result(f"{explain(exc)} Try again in {exc.retry_after:.0f} s.")
        except (EngineError, RequestError) as exc:
            return _error_result(results.error_line(exc))
        except (OSError, sqlite3.Error) as exc:
            # The message says it all, and clients show stderr as errors.
            log.error("%s failed: %s: %s", name, type(exc).__name__, exc, exc_info=log.isEnabledFor(logging.DEBUG))
            home = self.service.settings.home
            return _error_result(f"{name} met a disk error: {exc}. Check free space and permissions of {home}.")
        except Exception as exc:
            log.exception("%s failed", name)
            kind = type(exc).__name__
            return _error_result(
                f"{name} failed with an internal error ({kind}); the log on stderr has details. Other calls work."
            )

    async def _claim_pick(self, name: str, client: str) -> None:
        """Take over a pick that no connected agent waits for."""
        if name in studio_app.NAME_IMAGES:
            with suppress(RequestError, OSError, sqlite3.Error):  # the tool itself says what is wrong with the library
                await anyio.to_thread.run_sync(lambda: picks.claim(self.service.store, client))

    async def _with_pick(self, name: str, result: CallToolResult, client: str) -> CallToolResult:
        """Add, once, what the person picked since the agent's last call."""
        first = result.content[0] if result.content else None
        if name not in studio_app.SHOWN_BY or result.is_error or not isinstance(first, TextContent):
            return result
        pick = None
        with suppress(RequestError, OSError, sqlite3.Error):  # it stays unreported, and the result is worth more
            pick = await anyio.to_thread.run_sync(lambda: self.service.store.picks.report(client))
        if pick is None:
            return result
        line = results.text(picks.reported(json.loads(first.text), pick))
        return result.model_copy(update={"content": [line, *result.content[1:]]})

    async def get_prompt(
        self, name: str, arguments: dict[str, Any] | None = None, context: Context[Any, Any] | None = None
    ) -> Any:
        if self._prompt_manager.get_prompt(name) is None:
            known = [prompt.name for prompt in self._prompt_manager.list_prompts()]
            message = f"There is no prompt {quote(name)}. {did_you_mean(name, known)} There are {', '.join(known)}."
            raise MCPError(code=INVALID_PARAMS, message=one_line(message))
        return await super().get_prompt(name, arguments, context)

    async def list_resources(self) -> list[Resource]:
        page = [studio_app.listed()] if studio_app.supported() else []
        return page + await super().list_resources() + await anyio.to_thread.run_sync(resources.listed, self.service)

    async def list_resource_templates(self) -> list[ResourceTemplate]:
        return await super().list_resource_templates() + resources.templates()

    async def read_resource(self, uri: Any, context: Context[Any, Any] | None = None) -> Any:
        try:
            contents = await self.read(str(uri), self._call_context(context))
        except RequestError as exc:
            raise ResourceNotFoundError(results.error_line(exc)) from None
        return await super().read_resource(uri, context) if contents is None else contents

    async def read(self, uri: str, call: CallContext) -> list[ReadResourceContents] | None:
        """Return the contents of an address of ours, None for other addresses.

        Raises RequestError.
        """
        if uri == studio_app.URI:
            return await studio_app.read()
        if uri.partition("?")[0] in studio_resources.READERS:
            return await studio_resources.read(self.service, self.feed, uri, call)
        if uri == resources.ALL or uri.startswith(f"{resources.ALL}/"):
            return await resources.read(self.service, uri, call)
        return None

    async def serve(self, read: Any, write: Any) -> None:
        """Serve one client over a pair of streams."""
        await self._lowlevel_server.run(read, write, self._lowlevel_server.create_initialization_options())

    def _call_context(self, context: Context[Any, Any] | None) -> CallContext:
        if context is None:
            return CallContext(self._client)
        session, request = context.session, context.request_context.request
        params = session.client_params

        async def progress(done: float, total: float, message: str) -> None:
            with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
                await context.report_progress(done, total, message)

        return CallContext(
            client=self._client if request is None else sender.http_client(request),
            shared=request is not None and not sender.identifies_client(request),
            name=params.client_info.name if params else "",
            progress=progress,
            roots=lambda: _roots(session),
            on_new_image=self.subscriptions.image_added,
            link=self._link(request) if self._link and request is not None else None,
        )


async def _models_in_time(settings: Settings) -> str:
    """Describe the installed models, unless a slow disk keeps them secret."""
    with anyio.move_on_after(SEARCH_WAIT):
        return (await anyio.to_thread.run_sync(find, settings, abandon_on_cancel=True)).summary()
    return "engine_status lists the models."


def _for_models(tool: Listed, models: InstalledModels) -> Listed:
    """Offer only installed models, and as many references as they take."""
    properties = tool.input_schema["properties"]
    if models.names and "model" in properties:
        properties["model"]["enum"] = ["auto", *models.names]
    if "images" in properties:
        properties["images"]["maxItems"] = models.max_references
    return tool


async def _roots(session: Any) -> tuple[Path, ...] | None:
    """Return the client's folders, None if it names none in time."""
    offered = session.client_capabilities
    if not session.can_send_request or offered is None or offered.roots is None:
        return None
    # A root of another scheme fails the SDK's validation, a ValueError.
    with anyio.move_on_after(ROOTS_WAIT), suppress(MCPError, ValueError):
        roots = (await session.list_roots()).roots
        folders = [folder_of(str(root.uri)) for root in roots if str(root.uri).startswith("file:")]
        return tuple(filter(None, folders)) or None
    return None


def _error_result(message: str) -> CallToolResult:
    return CallToolResult(content=[TextContent(type="text", text=one_line(message))], is_error=True)


def create_server(service: Service, *, link: Link | None = None, extensions: Sequence[Extension] = ()) -> KleinServer:
    """Make the server of one front end, which opens nothing until called.

    extensions: what else it offers, such as MCP Apps; the SDK takes them at construction only.
    """
    server = KleinServer(service, link, (studio_app.StudioApp(), *extensions))
    prompts.register(
        server,
        recent=lambda typed: service.store.handles(typed, 20),
        small=lambda: find(service.settings).default == EMBEDDED,
    )
    return server
