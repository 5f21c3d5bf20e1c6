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
from math import ceil
from typing import TYPE_CHECKING

from engine.contract import Busy, CacheStats, EngineFailed, EngineStatus, Event, Job, NodeStatus, Rgb8
from klein_mcp.daemon import wire
from klein_mcp.daemon.endpoint import BuildInfo, proof
from klein_mcp.daemon.engine_server import INCLUDED, MISSING, read_token
from klein_mcp.daemon.executors.answers import get_json, read_events, read_json
from klein_mcp.daemon.executors.node import MOST_ENGINES, Node, NodeFailed, checked_url, combined, reason, sentence
from klein_mcp.daemon.executors.ring import HashRing
from klein_mcp.jobs.executor import nobody_watches
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

COUNTED = 5.0
"""Seconds after which a cluster is asked again how many engines it has."""

PAUSES = (0.0, 1.0, 3.0)
"""Seconds before each try at a cluster, which needs a moment to see that one of its machines is gone."""

BOUND = 1.25
"""A node takes at most this multiple of the mean of running jobs; the next one on the ring helps. See docs/scale.md."""

FULL = 503
"""Status code of a proxy that queues no more; an engine of ours is busy in words of its own."""

RETRY = 5.0
"""Seconds to wait for a proxy that does not say how many."""


class RemoteExecutor:
    """Runs jobs on the engines at `urls`.

    A lineage goes to the engine that caches its references.
    """

    def __init__(self, urls: Sequence[str], token: str, build: BuildInfo) -> None:
        """Raises EngineFailed for an address that would send images unencrypted."""
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
        # Not compressed: what a node sends is bounded by the bytes that arrive.
        plain = {"accept-encoding": "identity"}
        self._http = httpx2.Client(trust_env=False, timeout=timeout, limits=limits, verify=verify, headers=plain)

    @classmethod
    def from_settings(cls, settings: Settings) -> "RemoteExecutor":
        """Read the token and make the executor. Raises EngineFailed."""
        file = settings.engine_token_file
        if file is None:
            raise EngineFailed("KLEIN_ENGINE is set without KLEIN_ENGINE_TOKEN_FILE.", hint="Name the token's file.")
        try:
            token = read_token(file)
        except (OSError, ValueError) as exc:
            raise EngineFailed(
                f"The token file {file} cannot be used: {getattr(exc, 'strerror', None) or exc}."
            ) from None
        return cls(settings.engine, token, BuildInfo.read())

    @property
    def slots(self) -> int:
        """Jobs that all nodes take at once."""
        return sum(node.slots for node in self._nodes.values())

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
                node.error, node.rests_until, node.greeted = str(exc), time.monotonic() + REST, 0.0
                failures.append(f"{node.url}: {exc}")
            finally:
                with self._lock:
                    node.running -= 1
        reasons = sentence("; ".join(failures))
        raise busy or EngineFailed(f"No engine could run it. {reasons}", hint="klein-mcp doctor asks each of them.")

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

    def _order(self, job: Job) -> list[Node]:
        """Return the nodes in the order to try them.

        First the one that the lineage belongs to, later overloaded ones, last failed ones.
        """
        key = job.affinity or secrets.token_hex(8)  # without references, any node is as good
        preferred = [self._nodes[url] for url in self._ring.preference(key)]
        with self._lock:
            most = ceil(BOUND * (1 + sum(node.running for node in preferred)) / sum(node.slots for node in preferred))
            now = time.monotonic()
            # Stable: within a group, the ring decides.
            return sorted(preferred, key=lambda node: (node.rests_until > now, node.running >= most * node.slots))

    def _run_on(self, node: Node, job: Job) -> Iterator[Event]:
        """Run `job` on a node.

        A cluster is asked several times, until a machine that is alive answers.
        """
        for attempt, pause in enumerate(PAUSES, 1):
            try:
                time.sleep(pause)
                yield from self._try_on(node, job, attempt)
                return
            except NodeFailed as exc:
                if not node.engines or attempt == len(PAUSES):
                    raise
                log.warning("%s, try %d: %s", node.url, attempt, exc)
                node.greeted = 0.0

    def _try_on(self, node: Node, job: Job, attempt: int) -> Iterator[Event]:
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
            raise NodeFailed(reason(exc)) from None

    def _stream(self, node: Node, job: Job, included: list[int] | None, attempt: int) -> Generator[Event]:
        headers = {"authorization": f"Bearer {self._token}", "x-klein-daemon": self._daemon}
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
        """Let a node prove its token and build before it gets ours."""
        age = time.monotonic() - node.greeted
        if node.greeted and (not node.engines or age < COUNTED):
            return
        nonce = secrets.token_hex(16)
        answer = get_json(self._http, f"{node.url}/hello", seconds, params={"nonce": nonce})
        if not secrets.compare_digest(str(answer["proof"]), proof(self._token, nonce)):
            raise NodeFailed("it holds another token than KLEIN_ENGINE_TOKEN_FILE")
        build = BuildInfo(**answer["build"])
        if build.fingerprint != self._build.fingerprint:
            raise NodeFailed(f"it runs another build, {build.name}, than this machine, {self._build.name}")
        node.engines = min(int(answer.get("engines", 0)), MOST_ENGINES)
        node.greeted = time.monotonic()

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
            engine = EngineStatus.from_json(state["engine"]) if state["engine"] else None
            if "nodes" in state:
                members = [NodeStatus(**each) for each in state["nodes"]]
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
