"""State of an engine elsewhere, as a daemon knows it."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from engine.contract import CacheStats, EngineFailed, EngineStatus, NodeStatus
from klein_mcp.loopback import is_loopback

MOST_ENGINES = 10_000
"""Engines that a cluster may claim to have."""

MOST_KNOWN = 10_000
"""Hashes remembered per node."""


class NodeFailed(Exception):
    """This node cannot run the job.

    Another may. away: nobody answered at all, so it may be back in a moment.
    """

    def __init__(self, message: str, *, away: bool = False) -> None:
        super().__init__(message)
        self.away = away


@dataclass(eq=False)
class Node:
    """One engine elsewhere, or the address of a cluster of them.

    engines: how many a cluster says it has, 0 for a single engine. known: hashes of references it was sent, the latest
    last.
    """

    url: str
    error: str = ""
    rests_until: float = 0.0
    running: int = 0
    engines: int = 0
    known: "OrderedDict[str, None]" = field(default_factory=OrderedDict)

    @property
    def slots(self) -> int:
        """Jobs to send at once.

        One more than a cluster has engines: a job that waits there is what makes it start another.
        """
        return self.engines + 1 if self.engines else 1

    def learn(self, names: Sequence[str]) -> None:
        for name in filter(None, names):
            self.known[name] = None
            self.known.move_to_end(name)
        while len(self.known) > MOST_KNOWN:
            self.known.popitem(last=False)


def checked_url(url: str) -> str:
    """Return the address of an engine without a slash at its end.

    Raises EngineFailed for one that cannot be used, and for one that would send images unencrypted.
    """
    if not _is_address(url):
        shown = url.rpartition("@")[2]  # what stands before may be a password
        raise EngineFailed(f"KLEIN_ENGINE names {shown}, which is no address.", hint="Such as https://host:8000.")
    parts = urlsplit(url)
    if "@" in parts.netloc:
        # Not shown: it is a secret.
        raise EngineFailed(
            f"KLEIN_ENGINE has a name and password for {parts.hostname}.",
            hint="Leave them out: KLEIN_ENGINE_TOKEN_FILE lets daemons in.",
        )
    if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        raise EngineFailed(
            f"{url} would send prompts, images and the token in the clear.",
            hint="Use https:// (klein-mcp engine --certificate), or a tunnel to this machine.",
        )
    return url.rstrip("/")


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port beyond 65535, a bracket alone
        return False


def reason(exc: Exception) -> str:
    """Say why an engine cannot be used, and what most likely helps."""
    text = str(exc)
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return f"{text}. Set KLEIN_ENGINE_CERTIFICATE_FILE to its certificate, see docs/scale.md"
    if "WRONG_VERSION_NUMBER" in text:
        return "it does not speak TLS: was klein-mcp engine started with --certificate and --key?"
    if "Connection refused" in text:
        return "connection refused: is klein-mcp engine running there?"
    if "timed out" in text:
        return "it does not answer: is klein-mcp engine running there, and does a firewall let it through?"
    if isinstance(exc, KeyError | TypeError | ValueError | AttributeError | OverflowError):
        return f"it does not answer as klein-mcp engine does ({type(exc).__name__}: {text})"
    return f"{type(exc).__name__}: {text}" if text else type(exc).__name__


def sentence(reasons: str) -> str:
    """End `reasons` with a full stop, unless it is a question."""
    return reasons if reasons.endswith(("?", ".")) else f"{reasons}."


def combined(nodes: tuple[NodeStatus, ...], engines: Sequence[EngineStatus]) -> EngineStatus:
    """Describe several engines as one.

    Memory and caches are summed, models are those that any of them has.

    engines: those that tell about themselves; a cluster's address answers for one of its engines.
    """
    models = {model.name: model for engine in engines for model in engine.models}
    models |= {model.name: model for engine in engines for model in engine.models if model.path is not None}
    caches = [engine.cache for engine in engines]
    return EngineStatus(
        device=f"{len(nodes)} engine{'s' if len(nodes) != 1 else ''} elsewhere",
        dtype="",
        threads=0,
        free_bytes=sum(node.free_bytes for node in nodes),
        loaded=next((node.loaded for node in nodes if node.loaded), None),
        placement=f"{sum(not node.error for node in nodes)} of {len(nodes)} engines answer",
        cache=CacheStats(
            entries=sum(cache.entries for cache in caches),
            bytes=sum(cache.bytes for cache in caches),
            spilled_bytes=sum(cache.spilled_bytes for cache in caches),
            hits=sum(node.hits for node in nodes),
            misses=sum(cache.misses for cache in caches),
        ),
        models=tuple(models.values()),
        nodes=nodes,
    )
