"""The command line. Without a command it is the MCP server over stdio."""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from klein_mcp import __version__
from klein_mcp.settings import Settings, SettingsError

Command = Callable[[Settings, argparse.Namespace], int]

INTRODUCTION = """\
klein-mcp {version} is an MCP server: a program (Claude, VS Code, Cursor, an agent of yours) starts it and talks to it
over stdin and stdout. Nothing is to be typed here; add it to such a program:

  claude mcp add klein -- {command}
  codex mcp add klein -- {command}
  {configuration}

Or try it: `klein-mcp demo`, `klein-mcp paint "a red apple"`, `klein-mcp --help`. Ctrl-D ends it.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """0 done, 1 failed with one line on stderr, 2 wrong usage, 130 interrupted, 143 ended by SIGTERM."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        # A client that starts us waits for the first answer: no parser for the common case.
        arguments = _parsed(words) if words else argparse.Namespace(command=_stdio)
        return arguments.command(Settings.load(), arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 1
    except (SettingsError, OSError) as problem:
        return _failed(problem)
    except Exception as problem:
        if _is_for_people(problem):
            return _failed(problem)
        raise


def _parsed(words: Sequence[str]) -> argparse.Namespace:
    """An option that nobody knows ends with the usage of its own command, not with that of all."""
    arguments, unknown = _parser().parse_known_args(words)
    if unknown:
        arguments.usage.error(f"unrecognized arguments: {' '.join(unknown)}")
    return arguments


def _is_for_people(problem: Exception) -> bool:
    from engine.contract import EngineError
    from klein_mcp.errors import RequestError

    return isinstance(problem, EngineError | RequestError)


def _failed(problem: Exception) -> int:
    from engine.contract import EngineError
    from klein_mcp.cli.terminal import harmless
    from klein_mcp.errors import explain

    said = explain(problem) if isinstance(problem, EngineError) else str(problem)
    print("klein-mcp:", " ".join(harmless(said).split()), file=sys.stderr)
    return 1


def _stdio(settings: Settings, arguments: argparse.Namespace) -> int:
    if sys.stdin.isatty():
        print(_introduction(), file=sys.stderr)
    from klein_mcp.mcp_server import stdio

    return stdio.run(settings)


def _introduction() -> str:
    from klein_mcp.cli.terminal import lasting

    command = lasting()
    launch = {"command": command[0], "args": command[1:]}
    configuration = json.dumps({"mcpServers": {"klein": launch}})
    return INTRODUCTION.format(version=__version__, command=shlex.join(command), configuration=configuration)


def _serve(settings: Settings, arguments: argparse.Namespace) -> int:
    from klein_mcp.http import app

    try:
        options = app.HttpOptions.from_arguments(arguments)
    except ValueError as problem:
        print("klein-mcp serve:", problem, file=sys.stderr)
        return 2
    return app.run(settings, options)


def _demo(settings: Settings, arguments: argparse.Namespace) -> int:
    from klein_mcp.cli import demo

    return demo.run(arguments.out, as_json=arguments.json)


def _paint(settings: Settings, arguments: argparse.Namespace) -> int:
    from klein_mcp.cli import paint

    order = paint.PaintOptions(
        prompt=arguments.prompt,
        references=tuple(arguments.ref),
        model=arguments.model or settings.model,
        seed=arguments.seed,
        size=arguments.size,
        steps=arguments.steps,
        guidance=arguments.guidance,
        out=arguments.out,
    )
    changes: dict[str, Any] = {name: getattr(arguments, name) for name in ("device", "dtype", "quant", "variant")}
    changes["loras"] = tuple(arguments.lora)
    settings = replace(settings, **{name: value for name, value in changes.items() if value})
    return paint.run(settings, order, as_json=arguments.json)


def _status(settings: Settings, arguments: argparse.Namespace) -> int:
    from klein_mcp.cli.status import in_words

    state = _ask_daemon(settings, "status")
    print(json.dumps(state) if arguments.json else in_words(state))
    return 0


def _stop(settings: Settings, arguments: argparse.Namespace) -> int:
    stopped = _ask_daemon(settings, "stop")
    print(json.dumps({"stopped": stopped}) if arguments.json else "stopped" if stopped else "no engine was running")
    return 0


def _pull(settings: Settings, arguments: argparse.Namespace) -> int:
    from klein_mcp.cli import pull

    return pull.run(settings, arguments)


def _models(settings: Settings, arguments: argparse.Namespace) -> int:
    from klein_mcp.cli import models

    return models.run(settings, arguments)


def _doctor(settings: Settings, arguments: argparse.Namespace) -> int:
    from klein_mcp.cli import doctor

    return doctor.run(settings, arguments)


def _list(settings: Settings, arguments: argparse.Namespace) -> int:
    from klein_mcp.cli import library

    return library.show(settings, search=arguments.search, limit=arguments.limit, as_json=arguments.json)


def _info(settings: Settings, arguments: argparse.Namespace) -> int:
    from klein_mcp.cli import library

    return library.info(settings, arguments.what, as_json=arguments.json)


def _replay(settings: Settings, arguments: argparse.Namespace) -> int:
    from klein_mcp.cli import library

    return library.replay(settings, arguments.handle, onto=arguments.onto, seed=arguments.seed, as_json=arguments.json)


def _prune(settings: Settings, arguments: argparse.Namespace) -> int:
    from klein_mcp.cli import library

    if arguments.older_than is None and arguments.max_size is None:
        print("klein-mcp prune: say --older-than 30d, or --max-size 5GB, or both.", file=sys.stderr)
        return 2
    return library.prune(
        settings,
        older_than=arguments.older_than,
        max_size=arguments.max_size,
        yes=arguments.yes,
        as_json=arguments.json,
    )


def _ask_daemon(settings: Settings, question: str) -> Any:
    import anyio

    from klein_mcp.daemon.client import DaemonBackend

    async def ask() -> Any:
        backend = DaemonBackend(settings)
        try:
            return await getattr(backend, question)()
        finally:
            await backend.aclose()

    return anyio.run(ask)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="klein-mcp",
        description="An MCP server for FLUX.2 [klein]. Without a command it serves MCP over stdin and stdout.",
    )
    parser.add_argument("--version", action="version", version=f"klein-mcp {__version__}")
    parser.set_defaults(command=_stdio, usage=parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def add(name: str, run: Command, help: str, *, json: bool = True) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(command=run, usage=command)
        if json:
            command.add_argument("--json", action="store_true", help="print JSON for a script")
        return command

    serve = add("serve", _serve, "the MCP server over HTTP: /mcp, and /sse for older clients", json=False)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on; any but loopback needs a token")
    serve.add_argument("--port", type=_port, default=8765)
    serve.add_argument("--token-file", type=Path, metavar="F", help="file with the token that clients must send")
    serve.add_argument("--allowed-host", action="append", default=[], metavar="H", help="name clients reach it by")

    demo = add("demo", _demo, "drive the real server through generate, edit and compose, and keep the pictures")
    demo.add_argument("--out", type=Path, default=Path("klein-demo"), metavar="DIR", help="default: ./klein-demo")

    paint = add("paint", _paint, "one picture in this process, without the daemon")
    paint.add_argument("prompt")
    paint.add_argument("--ref", type=Path, action="append", default=[], metavar="IMG", help="a reference; repeatable")
    paint.add_argument("--model", metavar="M", help="a variant, a folder or a file; default: auto")
    paint.add_argument("--seed", type=int, metavar="N", help="default: a random one, which is printed")
    paint.add_argument("--size", type=_size, metavar="WxH", help="default: the first reference's, else the model's own")
    paint.add_argument("--steps", type=int, metavar="N")
    paint.add_argument("--guidance", type=float, metavar="G")
    paint.add_argument("--device", metavar="D", help="cpu, cuda or mps")
    paint.add_argument("--dtype", choices=("float32", "bfloat16"))
    paint.add_argument("--quant", choices=("fp8", "nvfp4"), help="format of the weights in memory")
    paint.add_argument("--variant", metavar="V", help="which klein a single file is, where it cannot tell")
    paint.add_argument("--lora", action="append", default=[], metavar="L[:scale]", help="repeatable")
    paint.add_argument(
        "-o", dest="out", type=_picture, metavar="PATH", help="default: ./klein-<seed>.png; not in the library"
    )

    listing = add("list", _list, "the pictures of the library, newest first")
    listing.add_argument("--search", default="", metavar="WORDS", help="in the prompt, or part of a path")
    listing.add_argument("--limit", type=_count, default=20, metavar="N", help="default: 20")

    info = add("info", _info, "how a picture was made, and from what")
    info.add_argument("what", metavar="FILE or HANDLE")

    replay = add("replay", _replay, "paint a picture again, with all that it came from")
    replay.add_argument("handle", metavar="HANDLE")
    replay.add_argument("--onto", metavar="IMG", help="another picture at the root of its history: a file or a handle")
    replay.add_argument("--seed", type=int, metavar="N", help="another seed; default: each picture's own")

    prune = add("prune", _prune, "delete old pictures, after asking")
    prune.add_argument("--older-than", type=_age, metavar="AGE", help="such as 12h, 30d, 2w, 6m (months) or 1y")
    prune.add_argument(
        "--max-size", type=_bytes, metavar="SIZE", help="what may stay, such as 5GB; the oldest go first"
    )
    prune.add_argument("--yes", action="store_true", help="do not ask")

    pull = add("pull", _pull, "fetch a model from the hub: only the files that are needed, resumable")
    pull.add_argument("name", metavar="NAME", help="klein-4b, klein-9b, klein-4b-fp8 …; a wrong one lists them all")
    pull.add_argument("--accept-licence", action="store_true", help="agree to a non-commercial licence without asking")
    add("models", _models, "what is installed, under which licence, and how it would live in this machine's memory")
    add("doctor", _doctor, "look at everything painting needs; each line says ok, or what to do")

    add("status", _status, "what the engine of this user holds and does")
    add("stop", _stop, "end the engine of this user, and wait until it is gone")
    return parser


def _size(text: str) -> tuple[int, int]:
    from klein_mcp.jobs.request import MAX_SIDE, MIN_SIDE

    width, _, height = text.lower().replace("×", "x").partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 1024x768")
    if not all(MIN_SIDE <= int(side) <= MAX_SIDE for side in (width, height)):
        raise argparse.ArgumentTypeError(f"{text!r} has a side that is not {MIN_SIDE} to {MAX_SIDE} pixels")
    return int(width), int(height)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not 1 or more")
    return int(text)


def _picture(text: str) -> Path:
    from klein_mcp.cli.paint import KINDS

    if Path(text).suffix.lower() not in KINDS:
        raise argparse.ArgumentTypeError(f"{text!r} does not end in {', '.join(KINDS)}")
    return Path(text)


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 to 65535")
    return int(text)


def _age(text: str) -> float:
    from klein_mcp.cli import library

    try:
        return library.age(text)
    except ValueError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from None


def _bytes(text: str) -> int:
    from klein_mcp.cli import library

    try:
        return library.size(text)
    except ValueError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from None
