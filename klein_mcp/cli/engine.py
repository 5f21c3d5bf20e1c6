"""`klein-mcp engine`: serves this machine's engine to daemons elsewhere."""

import argparse
import socket
import ssl
import sys
from pathlib import Path

from klein_mcp.cli.arguments import local_path
from klein_mcp.loopback import is_loopback
from klein_mcp.settings import Settings

MAX_PORT = 65535


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--listen", default="127.0.0.1:8000", metavar="HOST:PORT", help="default: 127.0.0.1:8000")
    parser.add_argument(
        "--token-file", type=local_path, required=True, metavar="F", help="file with the token of daemons"
    )
    parser.add_argument("--certificate", type=local_path, metavar="F", help="TLS certificate, with its chain")
    parser.add_argument("--key", type=local_path, metavar="F", help="TLS private key")


def run(settings: Settings, arguments: argparse.Namespace) -> int:
    """Serve until a signal."""
    address = listening_address("engine", arguments)
    return 2 if address is None else serve(settings, *address, arguments)


def listening_address(command: str, arguments: argparse.Namespace) -> tuple[str, int] | None:
    """Return host and port of --listen.

    None, and a line on stderr, if they cannot be used.
    """
    host, _, port = arguments.listen.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdecimal() or int(port) > MAX_PORT:
        print(f"klein-mcp {command}: {arguments.listen!r} is not HOST:PORT", file=sys.stderr)
        return None
    if not is_loopback(host) and not (arguments.certificate and arguments.key):
        print(
            f"klein-mcp {command}: {host} is reached over a network: name --certificate and --key, or listen on "
            "127.0.0.1 behind a proxy that speaks TLS",
            file=sys.stderr,
        )
        return None
    if error := _tls_error(arguments.certificate, arguments.key):
        print(f"klein-mcp {command}: {error}", file=sys.stderr)
        return None
    return host, int(port)


def _tls_error(certificate: Path | None, key: Path | None) -> str:
    """Load certificate and key, and name the file that is wrong."""
    if certificate is None:
        return "--key needs --certificate" if key else ""
    for option, path in (("--certificate", certificate), ("--key", key)):
        try:
            if path is not None:
                path.open("rb").close()
        except OSError as error:
            return f"{option} {path}: {error.strerror}"
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except OSError as error:  # of ssl, where one of them is no PEM or they do not belong together
        return f"--certificate {certificate} and --key {key or certificate} cannot be used: {error}"
    return ""


def serve(settings: Settings, host: str, port: int, arguments: argparse.Namespace) -> int:
    """Serve this machine's engine until a signal, or until it is broken.

    Returns 1 then, so that whatever watches over it starts it again. Raises OSError.
    """
    from klein_mcp.daemon.endpoint import BuildInfo
    from klein_mcp.daemon.engine_server import EngineServer
    from klein_mcp.daemon.executors.local import make_local
    from klein_mcp.jobs.queue import Queue
    from klein_mcp.private import read_token
    from klein_mcp.web_server import WebServer

    try:
        token = read_token(arguments.token_file)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        print(f"klein-mcp engine: --token-file {arguments.token_file}: {reason}", file=sys.stderr)
        return 1

    def leave() -> None:
        queue.close()  # the daemons whose jobs wait ask another engine
        server.end()

    queue = Queue(
        lambda: make_local(settings), size=settings.queue_size, keep_alive=settings.keep_alive, on_broken=leave
    )
    app = EngineServer(queue, token, BuildInfo.read()).app()
    tls = {"ssl_certfile": arguments.certificate, "ssl_keyfile": arguments.key} if arguments.certificate else {}
    listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    where = f"[{host}]" if ":" in host else host
    print(f"klein-mcp engine listens on {where}:{listener.getsockname()[1]}", file=sys.stderr, flush=True)
    server = WebServer(app, log_level="warning", timeout_graceful_shutdown=2, **tls)
    server.run([listener])
    queue.close(5)
    if queue.is_broken:
        print("klein-mcp engine: the engine is broken, so this process ends; start it again", file=sys.stderr)
        return 1
    return 0
