"""Engines on other machines as one executor: routing, retries, health."""

import json
import logging
import secrets
import ssl
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from math import ceil
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from engine.contract import Busy, EngineError, EngineFailed, EngineStatus, Event, Job, NodeStatus, Result, Rgb8
from klein_mcp.daemon import wire
from klein_mcp.daemon.endpoint import BuildInfo, proof
from klein_mcp.daemon.engine_server import INCLUDED, MISSING, read_token
from klein_mcp.daemon.executors.ring import HashRing
from klein_mcp.jobs.executor import nobody_watches
from klein_mcp.limits import MAX_AREA
from klein_mcp.settings import Settings

if TYPE_CHECKING:
    import httpx2

log = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "::1", "localhost")

SILENCE = 60.0
"""Seconds without a byte after which a node is taken for dead; it sends the latest event every second."""

CONNECT = 5.0
REST = 5.0
"""Seconds for which a node that failed is asked last."""

BOUND = 1.25
"""A node takes at most this multiple of the mean of running jobs; the next one on the ring helps. See docs/scale.md."""

MOST_EVENTS = 100_000
"""Events of one job: one a second for a day. A node that sends more is broken."""

MOST_KNOWN = 10_000
"""Hashes remembered per node."""

EVENT_BYTES = 4_000_000
"""Bytes of an event besides the pixels of a result: a header, a preview, a partial image's share is added."""


class NodeFailed(Exception):
    """This node cannot run the job.

    Another may.
    """


@dataclass(eq=False)
class Node:
    """One engine elsewhere.

    Known: hashes of references it was sent, the latest last.
    """

    url: str
    error: str = ""
    rests_until: float = 0.0
    running: int = 0
    greeted: bool = False
    known: "OrderedDict[str, None]" = field(default_factory=OrderedDict)

    def learn(self, names: Sequence[str]) -> None:
        for name in filter(None, names):
            self.known[name] = None
            self.known.move_to_end(name)
        while len(self.known) > MOST_KNOWN:
            self.known.popitem(last=False)


class RemoteExecutor:
    """Runs jobs on the engines at `urls`.

    Each lineage where its references are cached.
    """

    def __init__(self, urls: Sequence[str], token: str, build: BuildInfo) -> None:
        """Raises EngineFailed for an address that would send images unencrypted."""
        import httpx2

        self._nodes = {url: Node(url) for url in map(_checked, urls)}
        self._ring = HashRing(self._nodes)
        self._token = token
        self._build = build
        self._lock = threading.Lock()
        self._daemon = secrets.token_hex(8)
        timeout = httpx2.Timeout(SILENCE, connect=CONNECT)
        limits = httpx2.Limits(max_connections=None)
        verify = ssl.create_default_context()
        self._http = httpx2.Client(trust_env=False, timeout=timeout, limits=limits, verify=verify)

    @classmethod
    def from_settings(cls, settings: Settings) -> "RemoteExecutor":
        """Read the token and make the executor. Raises EngineFailed."""
        file = settings.engine_token_file
        if file is None:
            raise EngineFailed("KLEIN_ENGINE is set without KLEIN_ENGINE_TOKEN_FILE.", hint="Name the token's file.")
        try:
            token = read_token(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as exc:
            raise EngineFailed(f"The token file {file} cannot be used: {exc}.") from None
        return cls(settings.engine, token, BuildInfo.read())

    @property
    def slots(self) -> int:
        """One per node."""
        return len(self._nodes)

    def run(self, job: Job, watched: Callable[[], bool] = nobody_watches) -> Iterator[Event]:
        """Run `job` on the first node that can.

        A node that dies costs a retry. Raises EngineError.
        """
        busy: Busy | None = None
        failures: list[str] = []
        for node in self._order(job):
            with self._lock:
                node.running += 1
            try:
                yield from self._run_on(node, job)
                return
            except Busy as exc:
                busy = exc if busy is None or exc.retry_after < busy.retry_after else busy
            except NodeFailed as exc:
                log.warning("%s: %s", node.url, exc)
                node.error, node.rests_until, node.greeted = str(exc), time.monotonic() + REST, False
                failures.append(f"{node.url}: {exc}")
            finally:
                with self._lock:
                    node.running -= 1
        raise busy or EngineFailed(f"No engine could run it. {'; '.join(failures)}.", hint="See KLEIN_ENGINE.")

    def prefetch(self, image: Rgb8) -> bool:
        """Do nothing.

        Each engine prepares for an edit of its own latest result.
        """
        return False

    def release(self) -> None:
        """Do nothing: each engine releases its weights when it is idle."""

    def status(self) -> EngineStatus:
        """Describe all nodes.

        Those that do not answer within two seconds say why.
        """
        nodes = tuple(self._node_status(node) for node in self._nodes.values())
        return EngineStatus(
            device=f"{len(nodes)} remote",
            dtype="",
            threads=0,
            free_bytes=sum(node.free_bytes for node in nodes),
            loaded=next((node.loaded for node in nodes if node.loaded), None),
            placement=f"{sum(not node.error for node in nodes)} of {len(nodes)} engines answer",
            nodes=nodes,
        )

    def _order(self, job: Job) -> list[Node]:
        """Nodes to try.

        Where the lineage belongs first, overloaded ones later, failed ones last.
        """
        key = job.affinity or secrets.token_hex(8)  # without references, any node is as good
        preferred = [self._nodes[url] for url in self._ring.preference(key)]
        with self._lock:
            most = ceil(BOUND * (1 + sum(node.running for node in preferred)) / len(preferred))
            now = time.monotonic()
            # Stable: within a group, the ring decides.
            return sorted(preferred, key=lambda node: (node.rests_until > now, node.running >= most))

    def _run_on(self, node: Node, job: Job) -> Iterator[Event]:
        import httpx2

        try:
            self._greet(node)
            included = [i for i, name in enumerate(job.hashes) if not name or name not in node.known]
            with closing(self._stream(node, job, included if job.references else None)) as events:
                try:
                    yield from events
                except _Missing as missing:
                    for name in missing.names:
                        node.known.pop(name, None)
                    yield from self._stream(node, job, list(range(len(job.references))))
        except (httpx2.HTTPError, wire.BadFrame, ValueError, KeyError, TypeError) as exc:
            raise NodeFailed(f"{type(exc).__name__}: {exc}") from None

    def _stream(self, node: Node, job: Job, included: list[int] | None) -> Generator[Event]:
        headers = {"authorization": f"Bearer {self._token}", "x-klein-daemon": self._daemon}
        sent = job
        if included is not None and len(job.hashes) == len(job.references):
            headers[INCLUDED] = ",".join(map(str, included))
            sent = replace(job, references=tuple(job.references[i] for i in included))
        sent = replace(sent, affinity="")
        with self._http.stream("POST", f"{node.url}/run", content=wire.encode(sent), headers=headers) as response:
            if response.status_code == MISSING:
                raise _Missing(json.loads(response.read())["missing"])
            if response.status_code != 200:
                raise NodeFailed(f"it answers {response.status_code}: {response.read()[:200]!r}")
            node.learn(job.hashes)
            node.error = ""
            if (yield from self._events(job, response)):
                return
        raise NodeFailed("its answer ended without a result")

    def _events(self, job: Job, response: "httpx2.Response") -> Generator[Event, None, bool]:
        """Yield events and return whether the result came.

        Raises NodeFailed for what no honest engine sends.
        """
        frames, count = wire.Frames(_pixels(job) * 3 + EVENT_BYTES), 0
        for chunk in response.iter_raw():
            for frame in frames.feed(chunk):
                event = wire.decode(frame)
                count += 1
                if isinstance(event, EngineFailed):
                    raise NodeFailed(str(event))
                if isinstance(event, EngineError):
                    raise event
                if isinstance(event, Job) or count > MOST_EVENTS:
                    raise NodeFailed("it sends what is no event")
                if isinstance(event, Result):
                    _check(job, event)
                yield event
                if isinstance(event, Result):
                    return True
        return False

    def _greet(self, node: Node) -> None:
        """Let a node prove its token and build before it gets ours."""
        if node.greeted:
            return
        nonce = secrets.token_hex(16)
        answer = self._http.get(f"{node.url}/hello", params={"nonce": nonce}, timeout=CONNECT).json()
        if not secrets.compare_digest(str(answer["proof"]), proof(self._token, nonce)):
            raise NodeFailed("it holds another token")
        build = BuildInfo(**answer["build"])
        if build.fingerprint != self._build.fingerprint:
            raise NodeFailed(f"it runs another build ({build.version}) than this machine ({self._build.version})")
        node.greeted = True

    def _node_status(self, node: Node) -> NodeStatus:
        import httpx2

        about = NodeStatus(node.url, running=node.running)
        try:
            self._greet(node)
            headers = {"authorization": f"Bearer {self._token}"}
            state = self._http.get(f"{node.url}/status", headers=headers, timeout=2).json()
            about = replace(about, waiting=int(state["queue"]["waiting"]))
            if state["engine"]:
                engine = EngineStatus.from_json(state["engine"])
                about = replace(
                    about,
                    loaded=engine.loaded,
                    device=engine.device,
                    free_bytes=engine.free_bytes,
                    hits=engine.cache.hits,
                )
            return about
        except (httpx2.HTTPError, NodeFailed, ValueError, KeyError, TypeError) as exc:
            return replace(about, error=str(exc) or type(exc).__name__)


class _Missing(Exception):
    """The node has forgotten references that it was sent before."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(f"{len(names)} references")
        self.names = names


def _checked(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise EngineFailed(f"KLEIN_ENGINE names {url}, which is no address.", hint="Such as https://host:8000.")
    if parts.scheme == "http" and parts.hostname not in LOOPBACK:
        raise EngineFailed(
            f"{url} would send prompts, images and the token in the clear.",
            hint="Use https:// (klein-mcp engine --certificate), or a tunnel to this machine.",
        )
    return url.rstrip("/")


def _pixels(job: Job) -> int:
    """Return the most pixels that an honest result has."""
    if job.align and job.references:
        return job.references[0].shape[0] * job.references[0].shape[1]
    return job.width * job.height if job.width and job.height else MAX_AREA


def _check(job: Job, result: Result) -> None:
    """Raise NodeFailed for a result that does not answer the job."""
    height, width = result.image.shape[:2]
    asked = (job.width, job.height)
    if job.align and job.references:
        asked = (job.references[0].shape[1], job.references[0].shape[0])
    if (None not in asked and asked != (width, height)) or result.seed != job.seed:
        raise NodeFailed(f"its result is {width}×{height} with seed {result.seed}, which was not asked for")
