"""State of an engine elsewhere, as a daemon knows it."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from engine.contract import EngineFailed

LOOPBACK = ("127.0.0.1", "::1", "localhost")

MOST_ENGINES = 10_000
"""Engines that a cluster may claim to have."""

MOST_KNOWN = 10_000
"""Hashes remembered per node."""


class NodeFailed(Exception):
    """This node cannot run the job.

    Another may.
    """


@dataclass(eq=False)
class Node:
    """One engine elsewhere, or the address of a cluster of them.

    engines: how many a cluster says it has, 0 for a single engine. known: hashes of references it was sent, the latest
    last. greeted: when it last proved its token and build; 0 where it has to again.
    """

    url: str
    error: str = ""
    rests_until: float = 0.0
    running: int = 0
    greeted: float = 0.0
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
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise EngineFailed(f"KLEIN_ENGINE names {url}, which is no address.", hint="Such as https://host:8000.")
    if parts.scheme == "http" and parts.hostname not in LOOPBACK:
        raise EngineFailed(
            f"{url} would send prompts, images and the token in the clear.",
            hint="Use https:// (klein-mcp engine --certificate), or a tunnel to this machine.",
        )
    return url.rstrip("/")
