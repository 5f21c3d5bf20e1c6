"""Engines on other machines as one executor: routing, retries, health."""

import logging
import secrets
import ssl
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from engine.contract import (
    BadWeights,
    Busy,
    CacheStats,
    EngineError,
    EngineFailed,
    EngineStatus,
    Event,
    Job,
    ModelNotFound,
    NodeStatus,
    OutOfMemory,
    Rgb8,
)
from klein_mcp.daemon import wire
from klein_mcp.daemon.endpoint import BuildInfo, proof
from klein_mcp.daemon.engine_server import BUILD, INCLUDED, MISSING
from klein_mcp.daemon.executors.answers import get_json, read_events, read_fields, read_json
from klein_mcp.daemon.executors.node import MOST_ENGINES, Node, NodeFailed, checked_url, combined, reason, sentence
from klein_mcp.daemon.executors.ring import HashRing
from klein_mcp.jobs.executor import nobody_watches
from klein_mcp.private import read_token
from klein_mcp.settings import Settings

if TYPE_CHECKING:
    import httpx2

log = logging.getLogger(__name__)

SILENCE = 60.0
"""Seconds without a byte after which a node is taken for dead; it sends the latest event every second."""

CONNECT = 5.0
REST = 5.0
"""Seconds for which a node that failed is asked last."""

ASKED = 2.0
"""Seconds for each of the two answers that make a node's status."""

MOST_ASKED = 32
"""Nodes that are asked for their status at once."""

NO_ANSWER = (ValueError, KeyError, TypeError, AttributeError, OverflowError)
"""Raised by what no engine answers: no JSON, other names, other types, numbers without end."""

PAUSES = (0.0, 1.0, 3.0)
"""Seconds before each round of all nodes. Meanwhile a supervisor starts an engine, or a cluster misses a machine."""

REFUSALS = (ModelNotFound, BadWeights, OutOfMemory)
"""Errors of one machine: another may have the model, whole files or more memory."""

FULL = 503
"""Status code of a proxy that queues no more; an engine of ours is busy in words of its own."""

RETRY = 5.0
"""Seconds to wait for a proxy that does not say how many."""


class RemoteExecutor:
    """Runs jobs on the engines at `urls`.

    A lineage goes to the engine that caches its references.
    """

    def __init__(self, urls: Sequence[str], token: str, build: BuildInfo, certificates: Path | None = None) -> None:
        """certificates: file of those that are trusted besides the authorities'.

        Raises EngineFailed for an address that would send images unencrypted, OSError for that file.
        """
        import httpx2

        self._nodes = {url: Node(url) for url in map(checked_url, urls)}
        self._ring = HashRing(self._nodes)
        self._token = token
        self._build = build
        self._lock = threading.Lock()
        self._daemon = secrets.token_hex(8)
        timeout = httpx2.Timeout(SILENCE, connect=CONNECT)
        limits = httpx2.Limits(max_connections=None)
        verify = ssl.create_default_context()
        if certificates:
            verify.load_verify_locations(certificates)
        # Not compressed: what a node sends is bounded by the bytes that arrive.
        plain = {"accept-encoding": "identity"}
        self._http = httpx2.Client(trust_env=False, timeout=timeout, limits=limits, verify=verify, headers=plain)

    @classmethod
    def from_settings(cls, settings: Settings) -> "RemoteExecutor":
        """Read token and certificates, and make the executor. Raises EngineFailed."""
        file = settings.engine_token_file
        if file is None:
            raise EngineFailed("KLEIN_ENGINE is set without KLEIN_ENGINE_TOKEN_FILE.", hint="Name the token's file.")
        try:
            token = read_token(file)
        except (OSError, ValueError) as exc:
            raise EngineFailed(
                f"The token file {file} cannot be used: {getattr(exc, 'strerror', None) or exc}."
            ) from None
        certificates = settings.engine_certificate_file
        try:
            return cls(settings.engine, token, BuildInfo.read(), certificates)
        except OSError as exc:
            raise EngineFailed(f"The certificate file {certificates} cannot be used: {exc.strerror or exc}.") from None

    @property
    def slots(self) -> int:
        """Jobs that all nodes take at once."""
        return sum(node.slots for node in self._nodes.values())

    def run(self, job: Job, watched: Callable[[], bool] = nobody_watches) -> Iterator[Event]:
        """Run `job` on the first node that can.

        A node that dies costs a retry. Where all are away, they are asked again a moment later. Raises EngineError.
        """
        for attempt, pause in enumerate(PAUSES, 1):
            time.sleep(pause)
            errors: list[EngineError | NodeFailed] = []
            away = 0
            nodes = self._preferred(job)
            while nodes:
                node = self._take(nodes)
                try:
                    yield from self._run_on(node, job, attempt)
                    return
                except (Busy, *REFUSALS) as exc:
                    errors.append(exc)
                except NodeFailed as exc:
                    log.warning("%s, try %d: %s", node.url, attempt, exc)
                    node.error, node.rests_until = str(exc), time.monotonic() + REST
                    errors.append(NodeFailed(f"{node.url}: {exc}"))
                    away += exc.away or node.engines > 0
                finally:
                    with self._lock:
                        node.running -= 1
            if away < len(self._nodes) or attempt == len(PAUSES):
                raise _job_error(errors)

    def prefetch(self, image: Rgb8) -> bool:
        """Do nothing.

        Each engine prepares for an edit of its own latest result.
        """
        return False

    def release(self) -> None:
        """Do nothing: each engine releases its weights when it is idle."""

    def status(self) -> EngineStatus:
        """Describe all nodes.

        All are asked at once; those that do not answer within two seconds say why.
        """
        with ThreadPoolExecutor(min(MOST_ASKED, len(self._nodes))) as threads:
            described, engines = zip(*threads.map(self._node_status, self._nodes.values()), strict=True)
        return combined(tuple(chain.from_iterable(described)), [engine for engine in engines if engine])

    def _preferred(self, job: Job) -> list[Node]:
        """Return the nodes as the ring prefers them, the lineage's own first."""
        key = job.affinity or secrets.token_hex(8)  # without references, any node is as good
        return [self._nodes[url] for url in self._ring.preference(key)]

    def _take(self, nodes: list[Node]) -> Node:
        """Remove the best of the nodes, and count a job there.

        One with a free slot comes before busy ones, and all of these before those that failed lately.
        """
        with self._lock:
            now = time.monotonic()
            # The first of equals: among nodes with a free slot, the ring decides.
            best = min(nodes, key=lambda node: (node.rests_until > now, node.running // node.slots))
            best.running += 1
        nodes.remove(best)
        return best

    def _run_on(self, node: Node, job: Job, attempt: int) -> Iterator[Event]:
        import httpx2

        try:
            self._greet(node, CONNECT)
            included = [i for i, name in enumerate(job.hashes) if not name or name not in node.known]
            with closing(self._stream(node, job, included if job.references else None, attempt)) as events:
                try:
                    yield from events
                except _Missing as missing:
                    for name in missing.names:
                        node.known.pop(name, None)
                    yield from self._stream(node, job, list(range(len(job.references))), attempt)
        except (httpx2.HTTPError, wire.BadFrame, *NO_ANSWER) as exc:
            raise NodeFailed(reason(exc), away=_is_away(exc)) from None

    def _stream(self, node: Node, job: Job, included: list[int] | None, attempt: int) -> Generator[Event]:
        headers = {"authorization": f"Bearer {self._token}", "x-klein-daemon": self._daemon}
        headers[BUILD] = self._build.fingerprint
        headers |= _session(job, attempt)
        sent = job
        if included is not None and len(job.hashes) == len(job.references):
            headers[INCLUDED] = ",".join(map(str, included))
            sent = replace(job, references=tuple(job.references[i] for i in included))
        sent = replace(sent, affinity="")
        with self._http.stream("POST", f"{node.url}/run", content=wire.encode(sent), headers=headers) as response:
            if response.status_code == MISSING:
                raise _Missing(read_json(response, CONNECT)["missing"])
            if response.status_code == FULL:
                raise Busy(
                    f"{node.url} takes no more jobs at the moment.",
                    hint="Try again in a moment.",
                    retry_after=_seconds(response),
                )
            if response.status_code != 200:
                words = next(response.iter_raw(), b"")[:200].decode("utf-8", "replace")
                raise NodeFailed(f"it answers {response.status_code}: {words!r}")
            node.learn(job.hashes)
            node.error = ""
            if (yield from read_events(job, response, SILENCE)):
                return
        raise NodeFailed("its answer ended without a result")

    def _greet(self, node: Node, seconds: float) -> None:
        """Let a node prove its token and build before it gets ours.

        Before every job, as another build or another server may have taken its address. On loopback it takes 0.8 ms.
        """
        nonce = secrets.token_hex(16)
        answer = get_json(self._http, f"{node.url}/hello", seconds, params={"nonce": nonce})
        if not secrets.compare_digest(str(answer["proof"]), proof(self._token, nonce)):
            raise NodeFailed("it holds another token than KLEIN_ENGINE_TOKEN_FILE")
        build = BuildInfo(**answer["build"])
        if build.fingerprint != self._build.fingerprint:
            raise NodeFailed(f"it runs another build, {build.name}, than this machine, {self._build.name}")
        node.engines = min(int(answer.get("engines", 0)), MOST_ENGINES)

    def _node_status(self, node: Node) -> tuple[list[NodeStatus], EngineStatus | None]:
        """Describe a node, or each engine of a cluster.

        With what the engine that answered says of itself.
        """
        import httpx2

        about = NodeStatus(node.url, running=node.running)
        try:
            self._greet(node, ASKED)
            headers = {"authorization": f"Bearer {self._token}"}
            state = get_json(self._http, f"{node.url}/status", ASKED, headers=headers)
            engine = read_fields(EngineStatus, state["engine"]) if state["engine"] else None
            if "nodes" in state:
                members = read_fields(list[NodeStatus], state["nodes"])
                # It counts the cache of one of them.
                engine = replace(engine, cache=CacheStats()) if engine else None
                return [replace(each, url=f"{node.url} {each.url}") for each in members], engine
            about = replace(about, waiting=int(state["queue"]["waiting"]))
            return [about.with_engine(engine) if engine else about], engine
        except (httpx2.HTTPError, NodeFailed, *NO_ANSWER) as exc:
            return [replace(about, error=str(exc) if isinstance(exc, NodeFailed) else reason(exc))], None


class _Missing(Exception):
    """The node has forgotten references that it was sent before."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(f"{len(names)} references")
        self.names = names


def _session(job: Job, attempt: int) -> dict[str, str]:
    """Return the header that keeps a lineage on one machine.

    Another try goes to another place of its ring, which is most likely another machine.
    """
    if not job.affinity and attempt == 1:
        return {}
    key = f"{job.affinity or secrets.token_hex(8)} {attempt}"
    return {"x-session-id": blake2b(key.encode(), digest_size=16).hexdigest()}


def _seconds(response: "httpx2.Response") -> float:
    """Return the seconds that a full node wants to be left alone."""
    text = response.headers.get("retry-after", "")
    return float(text) if text.isdecimal() else RETRY


def _is_away(exc: Exception) -> bool:
    """Tell whether nobody listens, or the connection broke.

    A moment later an engine may be back.
    """
    import httpx2

    return isinstance(exc, httpx2.NetworkError | httpx2.RemoteProtocolError) and "SSL" not in str(exc)


def _job_error(errors: Sequence[EngineError | NodeFailed]) -> EngineError:
    """Choose the error of a job that no node ran.

    A full node may run it later, a refusal names what is missing.
    """
    if busy := [error for error in errors if isinstance(error, Busy)]:
        return min(busy, key=lambda error: error.retry_after)
    if refusals := [error for error in errors if isinstance(error, EngineError)]:
        return refusals[0]
    reasons = sentence("; ".join(map(str, errors)))
    return EngineFailed(f"No engine could run it. {reasons}", hint="klein-mcp doctor asks each of them.")
