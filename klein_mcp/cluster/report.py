"""A cluster's machines and engines."""

from dataclasses import asdict
from typing import Any

from engine.contract import NodeStatus
from klein_mcp.cluster.application import RESOURCE
from klein_mcp.cluster.extra import import_ray, last_line, ray_folder
from klein_mcp.cluster.replica import ANSWER, APPLICATION, DEPLOYMENT
from klein_mcp.errors import RequestError


def cluster_report() -> dict[str, Any]:
    """Return machines and engines as JSON values.

    The process must be connected to the cluster. Raises RequestError.
    """
    try:
        return _report()
    except Exception as exc:  # Ray's own kinds, such as while the first machine goes
        raise RequestError(
            f"The cluster does not tell its state: {last_line(exc)}", hint=f"Ray's logs are in {ray_folder()}."
        ) from None


def _report() -> dict[str, Any]:
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
        "message": _message(application) if application else "",
        "machines": machines,
        "engines": [
            asdict(each) if isinstance(each, NodeStatus) else asdict(NodeStatus("?", error=str(each)))
            for each in engines
        ],
    }


def _message(application: Any) -> str:
    """Return a line about the state, best of the engines."""
    engines = application.deployments.get(DEPLOYMENT)
    text = (engines.message if engines else "") or application.message
    return last_line(text) if text else ""
