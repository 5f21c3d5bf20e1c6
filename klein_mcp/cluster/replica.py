"""One engine of a cluster, as Ray Serve runs it.

It speaks the wire of `klein-mcp engine`. Each machine reads its own settings and its own token file.
"""

import asyncio
import platform
import time
from typing import Any

from starlette.applications import Starlette

from engine.contract import NodeStatus
from klein_mcp.cluster.extra import import_ray
from klein_mcp.daemon.endpoint import BuildInfo
from klein_mcp.daemon.engine_server import EngineServer
from klein_mcp.daemon.executors.local import make_local
from klein_mcp.jobs.queue import Queue
from klein_mcp.private import read_token
from klein_mcp.settings import Settings

APPLICATION = "klein"
DEPLOYMENT = "engine"
"""Names by which Ray Serve knows us."""

FRESH = 2.0
"""Seconds for which a count of replicas is used again; otherwise each hello would ask the controller."""

ANSWER = 1.5
"""Seconds that replicas have to describe themselves; a daemon waits 2 for all of them."""


class EngineReplica:
    """Runs jobs on the engine of its own process."""

    def __init__(self, build: str, queue_size: int) -> None:
        """build: fingerprint of the code that deployed it. Raises RuntimeError for another."""
        ours = BuildInfo.read()
        if ours.fingerprint != build:
            raise RuntimeError(f"This machine has another build of klein-mcp, {ours.name}, than the cluster ({build}).")
        settings = Settings.load()
        if settings.engine_token_file is None:
            raise RuntimeError("KLEIN_ENGINE_TOKEN_FILE is not set on this machine.")
        token = read_token(settings.engine_token_file)
        self._queue = Queue(lambda: make_local(settings), size=queue_size, keep_alive=settings.keep_alive)
        self._server = EngineServer(self._queue, token, ours, peers=ServePeers(self))

    def __serve_build_asgi_app__(self) -> Starlette:
        return self._server.app()

    def check_health(self) -> None:
        """Raise RuntimeError once the engine is broken.

        Serve then starts the replica anew: a process whose CUDA context is gone fails every job.
        """
        if self._queue.is_broken:
            raise RuntimeError("The engine is broken: its GPU is lost, or its last jobs all broke off.")

    def describe(self) -> NodeStatus:
        """Describe this replica."""
        serve = import_ray().serve
        replica = serve.get_replica_context().replica_id.unique_id
        return self._server.describe(f"{replica} on {platform.node()}")


class ServePeers:
    """Asks Ray Serve about the other replicas of a replica's application."""

    def __init__(self, replica: EngineReplica) -> None:
        self._replica = replica
        self._count = 1
        self._counted_at = float("-inf")
        self._handle: Any = None

    async def count(self) -> int:
        """Return how many replicas run."""
        if time.monotonic() > self._counted_at + FRESH:
            self._counted_at = time.monotonic()
            self._count = max(1, await asyncio.to_thread(running_replicas))
        return self._count

    async def describe(self) -> list[NodeStatus]:
        """Describe every replica, or this one alone where another keeps silent."""
        serve = import_ray().serve
        self._handle = self._handle or serve.get_deployment_handle(DEPLOYMENT, APPLICATION)
        try:
            found = await self._handle.broadcast("describe").results_async(timeout_s=ANSWER, return_exceptions=True)
        except TimeoutError:
            silent = NodeStatus("others", error=f"some of them do not answer within {ANSWER:g} seconds")
            return [self._replica.describe(), silent]
        return [each if isinstance(each, NodeStatus) else NodeStatus("one", error=str(each)) for each in found]


def running_replicas() -> int:
    """Return how many replicas of the application run, as the controller knows."""
    application = import_ray().serve.status().applications.get(APPLICATION)
    return application.deployments[DEPLOYMENT].replica_states.get("RUNNING", 0) if application else 0
