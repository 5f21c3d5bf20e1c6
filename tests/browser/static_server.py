"""Serves a few files from memory on a port of its own, each with its headers."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

SPEC_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; media-src 'self' data:; connect-src 'none'; object-src 'none'"
)
"""The policy of a host where an app declares none. Source: ext-apps specification 2026-01-26."""

CLAUDE_POLICY = (
    "default-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob: https:; font-src 'self' data:; "
    "connect-src 'self'; worker-src 'self' blob:; frame-src 'none'; object-src 'none'; base-uri 'self'"
)
"""Near to what claude.ai sends. Source: agentfront/frontmcp issue 455, ext-apps issue 387."""

POLICIES = {"spec": SPEC_POLICY, "claude": CLAUDE_POLICY}


@contextmanager
def serve_files(files: Mapping[str, str], host: str) -> Iterator[str]:
    """Serve `files`, path to text, and yield the origin.

    A query policy=NAME adds that Content-Security-Policy.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            text = files.get(url.path)
            body = (text or "").encode()
            self.send_response(404 if text is None else 200)
            kind = "text/javascript" if url.path.endswith(".js") else "text/html; charset=utf-8"
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            if url.query.startswith("policy="):
                self.send_header("Content-Security-Policy", POLICIES[url.query.removeprefix("policy=")])
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://{host}:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
