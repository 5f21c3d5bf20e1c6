"""Simulate many engines behind one front end.

`python -m tests.bench.scale` prints the tables of docs/scale.md. A discrete-event model. Sessions arrive at random,
generate or open a first image, then edit it several times with a pause for thought between. Each node is one GPU with a
first-come queue and a cache of reference latents. What differs is who gets a request: the node that owns its lineage
(consistent hashing), any node, or the node with the least to do.
"""

import argparse
import heapq
import math
import random
import statistics
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from klein_mcp.daemon.executors.ring import HashRing

# Seconds on one H200, klein 4B, 1024²: the medians of 26 November 2026 in engine/SPEED.md.
GENERATE = 0.289
EDIT = 0.577
"""One 1-MP reference whose latents are cached ("edit again, known reference, new prompt")."""
ENCODE = 0.615 - EDIT
"""What a reference costs that this node does not hold ("edit, one new reference")."""
BOUND = 1.25
"""Load above the mean that a node may have before its keys spill to the next one of the ring."""
DAEMONS = 10
"""Daemons that share the nodes, where a policy knows only the jobs of one of them."""
IMAGE_MB = 3.1
"""RGB8 at 1024², the frame of a result and of each reference that must be sent."""


@dataclass(frozen=True, slots=True)
class World:
    """Parameters of one run.

    load: work offered, as a share of what all GPUs could do. edits: mean length of a chain, geometric.
    shared: share of sessions that begin with one of `assets` common images, drawn by Zipf's law (exponent 1.1).
    thought: mean seconds between a result and the next edit. cache: images whose latents one node holds.
    """

    nodes: int
    load: float = 0.7
    images: int = 20_000
    edits: float = 6.0
    shared: float = 0.3
    assets: int = 200
    thought: float = 8.0
    cache: int = 64
    seed: int = 1


@dataclass(slots=True)
class Session:
    root: str
    left: int
    known: str | None
    """The image that the next edit refers to; None before the first is generated."""
    daemon: int
    """Where it asks, one of DAEMONS."""
    holder: str = ""
    """The node that generated it."""


@dataclass(slots=True)
class Node:
    name: str
    queue: deque[tuple[float, Session]] = field(default_factory=deque)
    busy_until: float = 0.0
    busy: bool = False
    jobs_of: Counter[int] = field(default_factory=Counter)
    """Jobs here by their daemon."""
    cache: "OrderedDict[str, None]" = field(default_factory=OrderedDict)

    def holds(self, image: str, size: int) -> bool:
        """Tell whether `image` is cached, and make it the most recent."""
        hit = image in self.cache
        self.cache[image] = None
        self.cache.move_to_end(image)
        while len(self.cache) > size:
            self.cache.popitem(last=False)
        return hit


Policy = Callable[["Simulation", Session], Node]


class Simulation:
    """Simulates one world under one policy.

    `death` and `arrival` are the times at which a node leaves or joins.
    """

    def __init__(self, world: World, policy: Policy, *, death: float = 0.0, arrival: float = 0.0) -> None:
        self.world, self.policy = world, policy
        self.random = random.Random(world.seed)
        self.nodes = {f"node-{i}": Node(f"node-{i}") for i in range(world.nodes)}
        self.ring = HashRing(self.nodes)
        self.latencies: list[float] = []
        self.times: list[float] = []
        self.hits = self.references = 0
        self.sent = 0.0
        self.outstanding = 0
        self.work = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0
        self._now = 0.0
        self._changes = [(death, self._die), (arrival, self._join)]

    def run(self) -> "Simulation":
        for at, change in self._changes:
            if at:
                self._at(at, change)
        self._arrive()
        while self._events and len(self.latencies) < self.world.images:
            self._now, _, action = heapq.heappop(self._events)
            action()
        return self

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.references)

    @property
    def per_gpu_second(self) -> float:
        """Return the images per second of GPU computation."""
        return len(self.latencies) / self.work

    def percentile(self, share: float, since: float = 0.0, until: float = float("inf")) -> float:
        """Return a latency percentile in seconds.

        `share` of the requests finished in the window stay under it.
        """
        window = [value for value, at in zip(self.latencies, self.times, strict=True) if since <= at < until]
        return statistics.quantiles(window, n=1000)[round(1000 * share) - 1]

    def _at(self, time: float, action: Callable[[], None]) -> None:
        self._serial += 1
        heapq.heappush(self._events, (time, self._serial, action))

    def _arrive(self) -> None:
        world = self.world
        length = 1 + int(self.random.expovariate(1 / world.edits))
        shared = self.random.random() < world.shared
        asset = f"asset-{_zipf(self.random, world.assets)}"
        root = asset if shared else f"root-{self._serial}"
        self._submit(Session(root, length, asset if shared else None, self.random.randrange(DAEMONS)))
        mean_work = (GENERATE + world.edits * EDIT) * (1 - world.shared) + world.shared * (1 + world.edits) * EDIT
        rate = world.load * world.nodes / mean_work
        self._at(self._now + self.random.expovariate(rate), self._arrive)

    def _submit(self, session: Session) -> None:
        node = self.policy(self, session)
        self.outstanding += 1
        node.jobs_of[session.daemon] += 1
        node.queue.append((self._now, session))
        if not node.busy:
            self._start(node)

    def _start(self, node: Node) -> None:
        asked, session = node.queue.popleft()
        node.busy = True
        seconds = GENERATE if session.known is None else EDIT
        self.sent += IMAGE_MB
        if session.known is not None:
            self.references += 1
            if node.holds(session.known, self.world.cache):
                self.hits += 1
            else:
                seconds += ENCODE
                self.sent += IMAGE_MB
        node.busy_until = self._now + seconds
        self._at(node.busy_until, lambda: self._finish(node, asked, session, seconds))

    def _finish(self, node: Node, asked: float, session: Session, seconds: float) -> None:
        self.outstanding -= 1
        node.jobs_of[session.daemon] -= 1
        if node.name not in self.nodes:  # it died meanwhile: the daemon submits the job to another
            self._submit(session)
            return
        self.work += seconds
        self.latencies.append(self._now - asked)
        self.times.append(self._now)
        # Idle time is used to encode the result, which the next edit most likely refers to.
        session.known, session.holder = f"image-{len(self.latencies)}", node.name
        node.holds(session.known, self.world.cache)
        session.left -= 1
        if session.left > 0:
            self._at(self._now + self.random.expovariate(1 / self.world.thought), lambda: self._submit(session))
        node.busy = False
        if node.queue:
            self._start(node)

    def _die(self) -> None:
        node = self.nodes.pop(next(iter(self.nodes)))
        self.ring = HashRing(self.nodes)
        waiting, node.queue = list(node.queue), deque()
        self.outstanding -= len(waiting)
        for _, session in waiting:
            self._submit(session)

    def _join(self) -> None:
        self.nodes["node-new"] = Node("node-new")
        self.ring = HashRing(self.nodes)


def by_lineage(simulation: Simulation, session: Session) -> Node:
    """Pick the owner of the lineage, regardless of its load."""
    return simulation.nodes[next(simulation.ring.preference(session.root))]


def bounded(simulation: Simulation, session: Session) -> Node:
    """Pick the ring's first node within BOUND times the mean load.

    Source: Mirrokni et al., 2016.
    """
    limit = math.ceil(BOUND * (simulation.outstanding + 1) / len(simulation.nodes))
    for name in simulation.ring.preference(session.root):
        node = simulation.nodes[name]
        if len(node.queue) + node.busy < limit:
            return node
    raise AssertionError("some node is at or under the mean")


def lineage_if_free(simulation: Simulation, session: Session) -> Node:
    """Pick the ring's first free node, as one daemon with all engines does."""
    nodes = (simulation.nodes[name] for name in simulation.ring.preference(session.root))
    return next((node for node in nodes if not node.busy), None) or least_loaded(simulation, session)


def lineage_if_free_of_mine(simulation: Simulation, session: Session) -> Node:
    """Pick the ring's first node that is free as far as one of several daemons knows."""
    nodes = (simulation.nodes[name] for name in simulation.ring.preference(session.root))
    own = session.daemon
    free = next((node for node in nodes if not node.jobs_of[own]), None)
    return free or min(simulation.nodes.values(), key=lambda node: node.jobs_of[own])


def at_random(simulation: Simulation, session: Session) -> Node:
    """Pick any node."""
    return simulation.random.choice(list(simulation.nodes.values()))


def least_loaded(simulation: Simulation, session: Session) -> Node:
    """Pick the node with the fewest jobs.

    This needs the current load of all nodes.
    """
    return min(simulation.nodes.values(), key=lambda node: (len(node.queue) + node.busy, node.busy_until))


def holder(simulation: Simulation, session: Session) -> Node:
    """Pick the node that generated the image, else the least loaded.

    The first is used only if it is free. This needs a single dispatcher.
    """
    node = simulation.nodes.get(session.holder)
    return node if node and not node.busy else least_loaded(simulation, session)


POLICIES: dict[str, Policy] = {
    "lineage": by_lineage,
    "lineage, bounded": bounded,
    "lineage if free": lineage_if_free,
    f"the same, {DAEMONS} daemons": lineage_if_free_of_mine,
    "holder if free": holder,
    "least loaded": least_loaded,
    "random": at_random,
}


def _zipf(random: random.Random, count: int, exponent: float = 1.1) -> int:
    weights = _WEIGHTS.setdefault((count, exponent), [1 / rank**exponent for rank in range(1, count + 1)])
    return random.choices(range(count), weights)[0]


_WEIGHTS: dict[tuple[int, float], list[float]] = {}


def policies_table(nodes: int, loads: tuple[float, ...] = (0.5, 0.7, 0.85)) -> Iterator[str]:
    """Yield the Markdown rows that compare the policies."""
    yield "| nodes | load | policy | references cached | p50 | p99 | images a GPU-second | MB an image |"
    yield "|---|---|---|---|---|---|---|---|"
    for load in loads:
        for name, policy in POLICIES.items():
            run = Simulation(World(nodes, load), policy).run()
            yield (
                f"| {nodes} | {load:.0%} | {name} | {run.hit_rate:.0%} | {run.percentile(0.5):.2f} s "
                f"| {run.percentile(0.99):.2f} s | {run.per_gpu_second:.2f} | {run.sent / len(run.latencies):.1f} |"
            )


def changes_table(nodes: int) -> Iterator[str]:
    """Yield the Markdown rows with the cost of losing and adding nodes."""
    yield "| nodes | event | p99 in the 30 s before | p99 in the 30 s after | p99 from 60 s after |"
    yield "|---|---|---|---|---|"
    world = World(nodes, images=300 * nodes)
    for event, times in (("one dies", {"death": 60.0}), ("one joins", {"arrival": 60.0})):
        run = Simulation(world, lineage_if_free, **times).run()
        windows = ((30, 60), (60, 90), (120, float("inf")))
        values = (f"{run.percentile(0.99, *window):.2f} s" for window in windows)
        yield f"| {nodes} | {event} | {' | '.join(values)} |"


def main() -> None:
    """Print every table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[10, 100, 1000])
    arguments = parser.parse_args()
    for nodes in arguments.nodes:
        loads = (0.5, 0.7, 0.85) if nodes <= 100 else (0.7,)
        print("\n".join(policies_table(nodes, loads)), end="\n\n", flush=True)
    for nodes in arguments.nodes[:2]:
        print("\n".join(changes_table(nodes)), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
