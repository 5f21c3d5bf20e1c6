"""`klein-mcp cluster`: engines of many machines behind one address, with Ray."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.contract import NodeStatus
from klein_mcp.cli import arguments as types
from klein_mcp.cli.engine import listening_address
from klein_mcp.cli.status import format_node
from klein_mcp.errors import RequestError
from klein_mcp.settings import Settings

if TYPE_CHECKING:
    from klein_mcp.cluster.machine import Member


def configure(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="part", metavar="up|join|status|down", required=True)
    up = commands.add_parser("up", help="make this machine the first of a cluster, and serve its address")
    up.add_argument(
        "--listen",
        default="127.0.0.1:8000",
        metavar="HOST:PORT",
        help="what KLEIN_ENGINE will name; default: 127.0.0.1:8000",
    )
    up.add_argument("--certificate", type=types.local_path, metavar="F", help="TLS certificate with its chain")
    up.add_argument("--key", type=types.local_path, metavar="F", help="TLS private key")
    up.add_argument(
        "--port", type=types.port, default=6379, help="Ray's port, which other machines join; default: 6379"
    )
    up.add_argument(
        "--least", type=types.count, default=1, metavar="N", help="engines while there is nothing to do; default: 1"
    )
    up.add_argument(
        "--most", type=types.count, default=64, metavar="N", help="engines while all is to be done; default: 64"
    )
    join = commands.add_parser("join", help="add this machine to a cluster")
    join.add_argument("address", metavar="HOST:PORT", help="the first machine and Ray's port there")
    for command in (up, join):
        command.add_argument(
            "--token-file", type=types.local_path, required=True, metavar="F", help="file with the daemons' token"
        )
        command.add_argument("--host", default="", help="this machine's address for the others; default: Ray's choice")
        command.add_argument(
            "--gpus",
            type=types.gpus,
            metavar="N",
            help="GPUs per engine, such as 1 or 0.5, the same everywhere; default: 1, or 0 on a machine without",
        )
        command.add_argument(
            "--engines", type=types.count, metavar="N", help="engines here; default: what its GPUs have room for, or 1"
        )
    status = commands.add_parser("status", help="machines of the cluster and what their engines do")
    down = commands.add_parser("down", help="take this machine out of its cluster; the first machine ends it")
    for command in (status, down):
        command.add_argument("--json", action="store_true", help="print JSON for a script")


def run(settings: Settings, arguments: argparse.Namespace) -> int:
    """Raises RequestError."""
    if os.name == "nt":
        raise RequestError("Ray joins machines of Linux or macOS.", hint="A list in KLEIN_ENGINE needs no Ray.")
    return _COMMANDS[arguments.part](settings, arguments)


def _up(settings: Settings, arguments: argparse.Namespace) -> int:
    from klein_mcp.cluster import machine
    from klein_mcp.cluster.application import Deployment, deploy

    listen = listening_address("cluster up", arguments)
    if listen is None:
        return 2
    gpus, room = machine.gpus_per_engine(arguments), machine.places(arguments)
    # Whole paths: Ray's proxies read the files, and they run in folders of their own.
    certificate, key = (file and file.absolute() for file in (arguments.certificate, arguments.key))
    wanted = Deployment(*listen, certificate, key, gpus, arguments.least, arguments.most, settings.queue_size)
    ray_arguments = machine.head_arguments(arguments.port, arguments.host)
    address = f"{arguments.host or '127.0.0.1'}:{arguments.port}"
    ports = (("--listen", *listen), ("--port", "", arguments.port))
    with machine.member_of(settings.home, arguments, address, ray_arguments, ports):
        # With more engines than have room here, some of them wait for machines that join.
        deploy(wanted, wait=wanted.least <= room)
    scheme = "https" if wanted.certificate else "http"
    print(f"serving {scheme}://{listen[0]}:{listen[1]}; other machines join port {arguments.port} of this one")
    if not gpus and arguments.gpus is None:
        print("no NVIDIA GPU here, so engines take none, also on machines that join; --gpus 1 gives each of them one")
    elif wanted.least > room:
        print(f"there is room for {room} of {wanted.least} engines here; the others start on machines that join")
    return 0


def _join(settings: Settings, arguments: argparse.Namespace) -> int:
    from klein_mcp.cluster import machine

    with machine.member_of(
        settings.home, arguments, arguments.address, machine.worker_arguments(arguments.address, arguments.host)
    ):
        pass
    print(f"joined {arguments.address}")
    return 0


def _status(settings: Settings, arguments: argparse.Namespace) -> int:
    from klein_mcp.cluster import machine
    from klein_mcp.cluster.report import cluster_report

    member = _membership(settings)
    if member is None:
        return 1
    with machine.connected(member.address, machine.environment_of(Path(member.token_file))):
        report = cluster_report()
    print(json.dumps(report) if arguments.json else format_report(report))
    return 0


def _down(settings: Settings, arguments: argparse.Namespace) -> int:
    from klein_mcp.cluster import machine

    left = machine.leave(settings.home)
    print(json.dumps({"left": left}) if arguments.json else "left" if left else "this machine is in no cluster")
    return 0


def _membership(settings: Settings) -> "Member | None":
    from klein_mcp.cluster import machine

    member = machine.read_member(settings.home)
    if member is None:
        print(
            "klein-mcp: this machine is in no cluster; klein-mcp cluster up or join puts it into one", file=sys.stderr
        )
    return member


def format_report(report: dict[str, Any]) -> str:
    """Format a cluster's report, one line per fact."""
    lines = [f"cluster: {report['state'].lower()}{': ' if report['message'] else ''}{report['message']}"]
    lines += [f"machine {each['host']}, {each['address']}: {each['places']} places" for each in report["machines"]]
    return "\n".join([*lines, *(format_node(NodeStatus(**each)) for each in report["engines"])])


_COMMANDS = {"up": _up, "join": _join, "status": _status, "down": _down}
