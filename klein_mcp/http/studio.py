"""/studio: the page in a browser, and everything it asks the server.

A one-time link opens a session. Requests that change something need the session's CSRF token.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

import anyio.to_thread
from mcp.server.lowlevel.helper_types import ReadResourceContents
from mcp_types import CallToolResult, TextContent
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from engine.contract import EngineError
from klein_mcp.errors import RequestError, UnknownImage
from klein_mcp.foreign import well_formed
from klein_mcp.http.downloads import download_handler
from klein_mcp.http.page_calls import PageCalls, StoppedCall, UnknownCall
from klein_mcp.http.surface import HttpContext, Surface, SurfaceFactory, error_line, status_of
from klein_mcp.jobs.context import CallContext
from klein_mcp.limits import MAX_FILE_BYTES
from klein_mcp.mcp_server import studio_app
from klein_mcp.mcp_server.results import uri
from klein_mcp.mcp_server.tools import TOOLS
from klein_mcp.studio.picks import STUDIO

Handler = Callable[[Request], Awaitable[Response]]

ENTRY = "/studio/enter/"
SOON = 1.0
"""Seconds for which a call holds its connection: most saves, picks and small images are done by then."""

MAX_CALL = 8 * 2**20
"""Bytes of a call: a prompt, handles, and a mask of 2048² as a PNG, which is under 1 MiB."""

HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
CACHED = {**HEADERS, "Cache-Control": "private, max-age=86400"}
"""For images: a handle never means other pixels."""


def _plain_page(body: str, head: str = "") -> str:
    """Return a page for browsers without a session."""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,"><title>klein studio</title>'
        "<style>body{font:16px/1.5 system-ui,sans-serif;max-width:36rem;margin:3rem auto;padding:0 1rem}</style>"
        f"{head}{body}</html>"
    )


def _refused_page(message: str) -> str:
    """Return a page that explains a refusal."""
    return _plain_page(f"<h1>Refused</h1><p>{html.escape(message)}</p>")  # it may repeat a header of the request


# A redirect would be a request from wherever the link was clicked, and a Strict cookie does not come along with that.
_TO_STUDIO = _plain_page("", '<meta http-equiv="refresh" content="0;url=/studio">')
_NO_SESSION = _plain_page(
    "<h1>Not signed in</h1>"
    "<p>Run <code>klein-mcp studio</code>, or open the link that <code>klein-mcp serve</code> prints.</p>"
)
_REFUSED = _plain_page(
    "<h1>This link is not valid</h1><p>It works once and for ten minutes. Run <code>klein-mcp studio</code> for a new "
    "one, also while <code>klein-mcp serve</code> runs.</p>"
)


def link(context: HttpContext, base: str) -> str:
    """Return a link that lets one browser in, once."""
    return f"{base}{ENTRY}{context.sessions.invite()}"


@lru_cache(maxsize=1)
def policy(page: str) -> str:
    """Return the Content-Security-Policy: the page's own script and style, by hash."""

    def hashed(tag: str) -> str:
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; script-src {hashed('script')}; style-src {hashed('style')}; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def surfaces() -> tuple[SurfaceFactory, ...]:
    """Return the three surfaces: the entry, the page and its requests."""
    return entry_surface, page_surface, surface


def page_surface(context: HttpContext) -> Surface:
    """The page, with an explanation for people without a session."""

    async def page(request: Request) -> Response:
        text = studio_app.page()  # each time: an update may replace the file while the server runs
        return HTMLResponse(text, headers={**HEADERS, "Content-Security-Policy": policy(text)})

    def refusal(status: int, message: str) -> Response:
        return HTMLResponse(_NO_SESSION if status == 401 else _refused_page(message), status, HEADERS)

    return Surface("studio page", [Route("/studio", page, methods=["GET"])], "session", error=refusal)


def entry_surface(context: HttpContext) -> Surface:
    """The routes without a session.

    One makes it, the other leads from the bare address to the page.
    """

    async def home(request: Request) -> Response:
        return HTMLResponse(_TO_STUDIO, headers=HEADERS)

    async def enter(request: Request) -> Response:
        if request.method != "GET":  # a HEAD, as link checkers send, must not use the link up
            return _refusal(405, "Open this link in a browser.")
        session = context.sessions.redeem(request.path_params["code"])
        if session is None:
            return HTMLResponse(_REFUSED, 403, HEADERS)
        response = HTMLResponse(_TO_STUDIO, headers=HEADERS)
        context.sessions.set_cookie(response, session, secure=request.url.scheme == "https")
        return response

    def refusal(status: int, message: str) -> Response:
        return HTMLResponse(_refused_page(message), status, HEADERS)

    routes = [Route("/", home, methods=["GET"]), Route(ENTRY + "{code}", enter, methods=["GET"])]
    return Surface("studio entry", routes, "none", error=refusal)


def surface(context: HttpContext) -> Surface:
    studio = _Studio(context)
    gets: dict[str, Handler] = {
        "session": studio.session,
        "events": studio.events,
        "read": studio.read,
        "result": studio.result,
        "images/{handle}": studio.image,
        "images/{handle}/download": download_handler(context.service, "png"),
        "images/{handle}/{part}": studio.part,
    }
    posts: dict[str, Handler] = {
        "call": studio.call,
        "cancel": studio.cancel,
        "delete": studio.delete,
        "upload": studio.upload,
    }
    routes = [
        *(Route(f"/studio/{path}", _in_words(handler), methods=["GET"]) for path, handler in gets.items()),
        *(
            Route(f"/studio/{path}", _in_words(studio.from_page(change)), methods=["POST"])
            for path, change in posts.items()
        ),
    ]
    return Surface("studio", routes, "session", error=_refusal)


def _in_words(handler: Handler) -> Handler:
    """Answer errors of the library, which may be busy or damaged."""

    async def answered(request: Request) -> Response:
        try:
            return await handler(request)
        except RequestError as exc:
            return _refusal(status_of(exc), error_line(exc))

    return answered


def _not_found(error: RequestError) -> Response:
    """Answer where an address leads to nothing that can be read."""
    status = status_of(error)
    return _refusal(404 if status == 400 else status, error_line(error))


def _refusal(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status, HEADERS)


class _Studio:
    """The handlers. All answer as the one person at the browser."""

    def __init__(self, context: HttpContext) -> None:
        self._context = context
        self._service = context.service
        self._server = context.server
        self._calls = PageCalls()

    def from_page(self, change: Handler) -> Handler:
        """Refuse requests of other origins, other ports of this machine included."""

        async def checked(request: Request) -> Response:
            origin = urlsplit(request.headers.get("origin", "")).netloc
            # Without a session it is the bearer of the token, and no browser.
            if self._context.sessions.find(request) and origin != request.headers.get("host"):
                return _refusal(403, "This request comes from another page.")
            return await change(request)

        return checked

    async def session(self, request: Request) -> Response:
        """Return the CSRF token, which other origins can neither request nor read."""
        session = self._context.sessions.find(request)
        csrf = self._context.sessions.csrf_token(session) if session else ""
        return JSONResponse({"csrf": csrf}, headers=HEADERS)

    async def events(self, request: Request) -> Response:
        """Server-sent events: `now`, whenever something changes."""

        async def stream() -> AsyncIterator[str]:
            async for now in self._server.feed.stream(STUDIO):
                # A comment keeps the connection alive, and finds out that it is gone.
                if now is None:
                    yield ": \n\n"
                else:
                    yield f"event: now\ndata: {json.dumps(self._calls.with_calls(now), separators=(',', ':'))}\n\n"

        return StreamingResponse(stream(), media_type="text/event-stream", headers=HEADERS)

    async def read(self, request: Request) -> Response:
        address = request.query_params.get("uri", "")
        try:
            contents = await self._server.read(address, self._caller(request))
        except RequestError as exc:
            return _not_found(exc)
        if contents is None:
            return _refusal(404, "There is nothing at this address.")
        return JSONResponse({"contents": [_content(address, each) for each in contents]}, headers=HEADERS)

    async def image(self, request: Request) -> Response:
        """The exact image."""
        handle = request.path_params["handle"]

        def find() -> Path:
            store = self._service.store  # in this thread: opening the library may take seconds
            return store.path(store.get(handle))

        try:
            path = await anyio.to_thread.run_sync(find)
        except UnknownImage as exc:
            return _not_found(exc)
        return FileResponse(path, media_type="image/png", headers=CACHED)

    async def part(self, request: Request) -> Response:
        """A rendition: thumb, preview or changes."""
        handle, part = request.path_params["handle"], request.path_params["part"]
        try:
            contents = await self._server.read(f"{uri(handle)}/{part}", self._caller(request))
        except RequestError as exc:
            return _not_found(exc)
        image = contents[0] if contents else None
        if image is None or not isinstance(image.content, bytes):
            return _refusal(404, f"{part} is not an image.")
        return Response(image.content, media_type=image.mime_type, headers=CACHED)

    async def call(self, request: Request) -> Response:
        """Call a tool as an agent would.

        Answers with the result if it is there soon, else with 202. The call goes on when the page is closed:
        only /studio/cancel stops it.
        """
        asked = await _body(request)
        if isinstance(asked, Response):
            return asked
        tool, arguments, name = asked.get("tool"), asked.get("arguments"), asked.get("call")
        if not isinstance(tool, str) or not isinstance(arguments, dict) or not isinstance(name, str):
            return _refusal(400, "tool, arguments and call are needed.")
        tools = {**TOOLS, studio_app.PICK.name: studio_app.PICK}
        caller = replace(self._caller(request), on_job=lambda job: self._calls.note_job(job, name))
        self._calls.start(name, self._server.run_tool(tool, arguments, caller, tools))
        return await self._result(name, SOON)

    async def result(self, request: Request) -> Response:
        """Return the result of a call, or 202."""
        return await self._result(request.query_params.get("call", ""), 0)

    async def _result(self, name: str, seconds: float) -> Response:
        try:
            result = await self._calls.result(name, seconds)
        except UnknownCall:
            return _refusal(404, "The answer to this call is gone. Its images, if it made some, are in the library.")
        except StoppedCall:
            result = CallToolResult(content=[TextContent(type="text", text="Cancelled.")], is_error=True)
        if result is None:
            return JSONResponse({}, 202, headers=HEADERS)
        return JSONResponse(result.model_dump(mode="json", by_alias=True, exclude_none=True), headers=HEADERS)

    async def cancel(self, request: Request) -> Response:
        """Stop a call of the page, or any job of this user."""
        asked = await _body(request)
        if isinstance(asked, Response):
            return asked
        call, job = asked.get("call"), asked.get("job")
        if isinstance(call, str) and (job := self._calls.stop(call)) is None:
            return JSONResponse({}, headers=HEADERS)
        try:
            await self._service.jobs.cancel(str(job))
        except LookupError:
            return _refusal(404, "There is no such job.")
        except EngineError as exc:
            return _refusal(503, str(exc))
        return JSONResponse({}, headers=HEADERS)

    async def delete(self, request: Request) -> Response:
        """Delete images. The page asks the person first."""
        asked = await _body(request)
        if isinstance(asked, Response):
            return asked
        handles = asked.get("images")
        if not isinstance(handles, list) or not all(isinstance(handle, str) for handle in handles):
            return _refusal(400, "images is a list of handles.")
        await anyio.to_thread.run_sync(lambda: self._service.store.delete(handles))
        self._server.feed.library_changed()
        return JSONResponse({"deleted": handles}, headers=HEADERS)

    async def upload(self, request: Request) -> Response:
        """Give an uploaded file, the request's body, a handle."""
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_FILE_BYTES:
                return _refusal(413, f"More than {MAX_FILE_BYTES // 2**20} MiB; use a smaller copy.")
        try:
            kept = await anyio.to_thread.run_sync(lambda: self._service.sources.add(bytes(body), "The image", STUDIO))
        except RequestError as exc:
            return _refusal(status_of(exc), error_line(exc))
        if kept.new:
            await self._server.subscriptions.image_added(uri(kept.record.handle))
        return JSONResponse({"image": kept.record.handle}, headers=HEADERS)

    def _caller(self, request: Request) -> CallContext:
        link = self._context.urls.for_client(request)
        return CallContext(STUDIO, "klein studio", on_new_image=self._server.subscriptions.image_added, link=link)


def _content(address: str, each: ReadResourceContents) -> dict[str, str]:
    kind = {"uri": address, "mimeType": each.mime_type or "text/plain"}
    if isinstance(each.content, bytes):
        return {**kind, "blob": base64.b64encode(each.content).decode()}
    return {**kind, "text": each.content}


async def _body(request: Request) -> dict[str, object] | Response:
    """Return the JSON object of a request, or an error response."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_CALL:
            return _refusal(413, "The request is too large.")
    try:
        asked = well_formed(json.loads(body))
    except (ValueError, RecursionError):
        return _refusal(400, "The request is not JSON.")
    return asked if isinstance(asked, dict) else _refusal(400, "The request is not an object.")
