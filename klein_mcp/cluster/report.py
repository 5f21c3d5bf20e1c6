"""A cluster's machines and engines, for people."""

from dataclasses import asdict
from typing import Any

from engine.contract import NodeStatus
from klein_mcp.cluster.application import RESOURCE
from klein_mcp.cluster.extra import import_ray
from klein_mcp.cluster.replica import ANSWER, APPLICATION, DEPLOYMENT


def cluster_report() -> dict[str, Any]:
    """Return machines and engines as JSON values.

    For a process that is connected to the cluster.
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
        "engines": [asdict(each) if isinstance(each, NodeStatus) else {"error": str(each)} for each in engines],
    }


def format_report(report: dict[str, Any]) -> str:
    """Format the report, one line per fact."""
    lines = [f"cluster: {report['state'].lower()}{': ' if report['message'] else ''}{report['message']}"]
    lines += [f"machine {each['host']}, {each['address']}: {each['places']} places" for each in report["machines"]]
    lines += [_format_engine(each) for each in report["engines"]]
    return "\n".join(lines)


def _format_engine(each: dict[str, Any]) -> str:
    if each["error"]:
        return f"engine: {each['error']}"
    return (
        f"engine {each['url']}: {each['device'] or 'idle'}, {each['loaded'] or 'no model loaded'}, "
        f"{each['free_bytes'] / 1e9:.1f} GB free, {each['running']} running, {each['waiting']} waiting, "
        f"{each['hits']} cache hits"
    )
