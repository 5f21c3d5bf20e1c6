"""The Ray Serve application: as many engines as there is work for."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klein_mcp.cluster.extra import import_ray, last_line, ray_folder
from klein_mcp.cluster.replica import APPLICATION, DEPLOYMENT, EngineReplica
from klein_mcp.daemon.endpoint import BuildInfo
from klein_mcp.errors import RequestError

RESOURCE = "klein"
"""Ray's name for a place for one engine; a machine declares how many it has."""

OTHER_REQUESTS = 16
"""Greetings and status questions that a replica answers beside its jobs."""

LONGEST_JOB = 120.0
"""Seconds that a replica which should end may take for its last job: 50 steps of the 9B with references."""

_EVERY_INTERFACE = ("0.0.0.0", "::")


@dataclass(frozen=True, slots=True)
class Deployment:
    """Settings of a cluster's engines.

    host, port: of the proxies. gpus: that one engine takes, such as 1 or 0.5; 0 for engines on CPUs.
    least, most: engines while nothing and while everything is to do. queue_size: jobs that may wait at each.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    certificate: Path | None = None
    key: Path | None = None
    gpus: float = 0.0
    least: int = 1
    most: int = 8
    queue_size: int = 32
    upscale_delay: float = 5.0
    downscale_delay: float = 600.0


def deploy(wanted: Deployment, *, wait: bool = True) -> None:
    """Run the application and its proxies on the connected cluster.

    wait: until the least number of engines runs. Raises RequestError.
    """
    serve = import_ray().serve
    try:
        serve.start(proxy_location=_proxies(wanted.host), http_options=_http(wanted))
        target = serve.RunTarget(target=application(wanted), name=APPLICATION, route_prefix="/")
        serve.run_many([target], wait_for_applications_running=wait)
    except Exception as exc:  # Ray's own kinds, and what fails in its other processes
        reason = last_line(_fault_of_engines(serve) or exc)
        raise RequestError(
            f"The cluster's engines do not start: {reason}", hint=f"Ray's logs are in {ray_folder()}."
        ) from None


def _fault_of_engines(serve: Any) -> str:
    """Return why engines failed, which Ray's own error leaves out."""
    with contextlib.suppress(Exception):  # Ray's own kinds; its error of the start is reported instead
        return serve.status().applications[APPLICATION].deployments[DEPLOYMENT].message
    return ""


def application(wanted: Deployment) -> Any:
    """Build the application."""
    serve = import_ray().serve
    engine = serve.deployment(
        name=DEPLOYMENT,
        # Our own queue says busy, in words and with the seconds to wait; Serve's would answer 503.
        max_ongoing_requests=wanted.queue_size + 1 + OTHER_REQUESTS,
        max_queued_requests=-1,
        autoscaling_config=serve.config.AutoscalingConfig(
            min_replicas=wanted.least,
            max_replicas=max(wanted.least, wanted.most),
            # A job that waits behind another is work for one more engine.
            target_ongoing_requests=1,
            upscale_delay_s=wanted.upscale_delay,
            # Its caches go with an engine, so an idle one stays for a while.
            downscale_delay_s=wanted.downscale_delay,
        ),
        ray_actor_options={"num_cpus": 0, "num_gpus": wanted.gpus, "resources": {RESOURCE: 1}},
        request_router_config=serve.config.RequestRouterConfig(
            request_router_class="ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
        ),
        # With these a killed machine was missed after 2 seconds instead of 30.
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=LONGEST_JOB,
    )(serve.ingress()(EngineReplica))
    return engine.bind(BuildInfo.read().fingerprint, wanted.queue_size)


def _http(wanted: Deployment) -> dict[str, Any]:
    options: dict[str, Any] = {"host": wanted.host, "port": wanted.port}
    if wanted.certificate and wanted.key:
        options |= {"ssl_certfile": str(wanted.certificate), "ssl_keyfile": str(wanted.key)}
    return options


def _proxies(host: str) -> str:
    """Return where proxies run.

    That is every machine, unless the address belongs to one.
    """
    return "EveryNode" if host in _EVERY_INTERFACE else "HeadOnly"
