"""A cluster's machines and engines."""

from dataclasses import asdict
from typing import Any

from engine.contract import NodeStatus
from klein_mcp.cluster.application import RESOURCE
from klein_mcp.cluster.extra import import_ray
from klein_mcp.cluster.replica import ANSWER, APPLICATION, DEPLOYMENT


def cluster_report() -> dict[str, Any]:
    """Return machines and engines as JSON values.

    The process must be connected to the cluster.
    """
    ray = import_ray()
    serve = ray.serve
    machines = [
        {
            "host": node["NodeManagerHostname"],
            "address": node["NodeManagerAddress"],
            "places": int(node["Resources"].get(RESOURCE, 0)),
        }
        for node in ray.nodes()
        if node["Alive"]
    ]
    application = serve.status().applications.get(APPLICATION)
    engines: list[Any] = []
    if application and application.deployments[DEPLOYMENT].replica_states.get("RUNNING"):
        answers = serve.get_deployment_handle(DEPLOYMENT, APPLICATION).broadcast("describe")
        engines = list(answers.results(timeout_s=10 * ANSWER, return_exceptions=True))
    return {
        "state": application.status.value if application else "not deployed",
        "message": application.message if application else "",
        "machines": machines,
        "engines": [
            asdict(each) if isinstance(each, NodeStatus) else asdict(NodeStatus("?", error=str(each)))
            for each in engines
        ],
    }
