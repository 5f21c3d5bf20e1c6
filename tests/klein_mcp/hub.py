"""A fake Hugging Face hub on loopback, with configurable faults.

It serves the listing, the headers and byte ranges.
"""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMMIT = "c0ffee" * 6 + "beef"


@dataclass
class Hub:
    """State of the fake hub: repositories, faults and request log.

    repos: repository -> file name -> content. log: (method, path, range) of every request.
    slow: seconds between two pieces of a large file. corrupt: file names whose content is served changed.
    closed: repositories whose files need a token. claimed: sizes that are claimed in the listing. etags,
    hashes: by file name.
    """

    repos: dict[str, dict[str, bytes]]
    log: list[tuple[str, str, str]] = field(default_factory=list)
    slow: float = 0.0
    corrupt: set[str] = field(default_factory=set)
    closed: set[str] = field(default_factory=set)
    claimed: dict[str, int] = field(default_factory=dict)
    etags: dict[str, str] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    token: str = ""
    url: str = ""

    def fetched(self) -> set[str]:
        """Return the names of the files whose content was requested."""
        return {path.split("/resolve/")[1].split("/", 1)[1] for method, path, _ in self.log
                if method == "GET" and "/resolve/" in path}  # fmt: skip

    @contextmanager
    def serving(self) -> Iterator["Hub"]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".gguf"))


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = urlsplit(self.path).path
        self.hub.log.append((self.command, path, self.headers.get("Range", "")))
        if path.startswith("/api/models/"):
            return self._list(path)
        repo, _, rest = path.strip("/").partition("/resolve/")
        _, _, name = rest.partition("/")
        if repo in self.hub.closed and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._say(401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
        content = self.hub.repos.get(repo, {}).get(name)
        if content is None:
            return self._say(404, b"", {"X-Error-Code": "EntryNotFound"})
        self._send(name, content, body)

    def _send(self, name: str, content: bytes, body: bool) -> None:
        digest = hashlib.sha256(content).hexdigest() if is_large(name) else hashlib.sha1(content).hexdigest()
        headers = {"ETag": self.hub.etags.get(name, f'"{digest}"'), "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if is_large(name):
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        if name in self.hub.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        status = 200
        if body and (wanted := self.headers.get("Range")):
            begin = int(wanted.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
            content, status = content[begin:], 206
        self._say(status, content, headers, body=body, slow=is_large(name))

    def _list(self, path: str) -> None:
        repo = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        files = self.hub.repos.get(repo)
        if files is None:
            return self._say(404, b"", {"X-Error-Code": "RepoNotFound"})
        siblings = []
        for name, content in files.items():
            size = self.hub.claimed.get(name, len(content))
            entry: dict[str, object] = {"rfilename": name, "size": size, "blobId": hashlib.sha1(content).hexdigest()}
            if is_large(name):
                digest = self.hub.hashes.get(name, hashlib.sha256(content).hexdigest())
                entry["lfs"] = {"sha256": digest, "size": size, "pointerSize": 134}
            siblings.append(entry)
        info = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "gated": "auto", "private": False}
        self._say(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _say(
        self, status: int, content: bytes, headers: dict[str, str], *, body: bool = True, slow: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if not body:
            return
        try:
            for at in range(0, len(content), 1 << 16):
                self.wfile.write(content[at : at + (1 << 16)])
                if slow and self.hub.slow:
                    time.sleep(self.hub.slow)
        except OSError:
            # The client has disconnected.
            self.close_connection = True
