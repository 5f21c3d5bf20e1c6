"""The command line: one module per command, the stdio server without one."""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from klein_mcp import __version__
from klein_mcp.settings import Settings, SettingsError

COMMANDS = {
    "serve": "the MCP server over HTTP: /mcp, and /sse for older clients",
    "studio": "the studio in your browser: see images, watch them grow, draw masks, compare",
    "demo": "drive the real server through generate, edit and compose, and save the images",
    "paint": "generate or edit one image in this process, without the daemon",
    "list": "the images of the library, newest first",
    "info": "how an image was made, and from what",
    "replay": "generate an image again, with all its ancestors",
    "prune": "delete old images, after asking",
    "pull": "download a model from the hub: only the files that are needed, resumable",
    "models": "installed models, their licences, and how each fits into this machine's memory",
    "doctor": "check everything that image generation needs; each line says ok, or what to do",
    "status": "what this user's engine holds and does",
    "engine": "serve this machine's engine to daemons on other machines",
    "cluster": "engines of many machines behind one address, with Ray: up, join, status, down",
    "stop": "end this user's engine, and wait until it is gone",
}
"""Each is a module of this package with `configure(parser)` and `run(settings, arguments) -> exit code`."""

OTHER_NAMES = {
    "generate": "paint",
    "edit": "paint",
    "create": "paint",
    "download": "pull",
    "install": "pull",
    "show": "info",
    "delete": "prune",
    "check": "doctor",
    "start": "serve",
}
"""Words that people try for a command, besides slips of the pen."""

READER_LEFT = 141
"""Exit code of a program that SIGPIPE ends, in a shell's terms."""

GONE = "The folder this was started in is gone."

WITHOUT_JSON = {"cluster", "engine", "serve", "studio"}

NEED_ONLY_HOME = {"stop"}
"""These work with a config.toml that cannot be read."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0 done, 1 failed with one line on stderr, 2 wrong usage, 130 interrupted, 141 its reader left, 143 after SIGTERM.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    open_missing_streams()
    print_anything()
    try:
        try:
            return _run(words)
        finally:  # argparse prints, too, and raises SystemExit
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
    except BrokenPipeError:  # as in `klein-mcp list | head -1`
        _discard_output()
        return READER_LEFT
    except OSError as error:  # stdout is a file on a full disk
        _discard_output()
        return _failed(error)


def _run(words: Sequence[str]) -> int:
    """Run a command, and report its error in one line."""
    try:
        if not words:  # a client waits for the first answer: no parser for the common case
            from klein_mcp.cli import stdio

            return stdio.run(Settings.load())
        arguments = _parsed(words)
        settings = Settings.load_home() if words[0] in NEED_ONLY_HOME else Settings.load()
        return arguments.run(settings, arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        raise
    except SettingsError as error:
        if words[:1] == ["doctor"] and "--json" not in words:
            print(f"todo  settings: {error}")
        return _failed(error)
    except OSError as error:
        return _failed(error)
    except ImportError as error:
        return _failed(ImportError(f"{error}. {_import_advice()}"))
    except Exception as error:
        if not _has_folder():  # Python 3.13: SystemError from the first compiled package that is imported
            print("klein-mcp:", GONE, file=sys.stderr)
            return 1
        if _is_for_people(error):
            return _failed(error)
        raise


def _discard_output() -> None:
    """Drop what a stream could not write.

    The interpreter would try once more as it ends, and complain.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def open_missing_streams() -> None:
    """Open the null device for each standard stream that is closed.

    Python has None for it, as with `2>&-` or pythonw: print() to it goes to stdout, and all else fails.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - open for life


def print_anything() -> None:
    """Print a ? for what a terminal's encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _has_folder() -> bool:
    try:
        return bool(os.getcwd())
    except OSError:
        return False


def _import_advice() -> str:
    if path := os.environ.get("PYTHONPATH"):
        return f"PYTHONPATH is {path}: a package there may not fit this Python. Unset it."
    return "Install klein-mcp again."


def build_parser(words: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """Build the parser, importing only commands that `words` names (None: all)."""
    parser = argparse.ArgumentParser(
        prog="klein-mcp",
        description="An MCP server for FLUX.2 [klein]. Without a command it serves MCP over stdin and stdout.",
    )
    parser.add_argument("--version", action="version", version=f"klein-mcp {__version__}")
    parser.set_defaults(usage=parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if words is None or name in words:
            module = import_module(f"klein_mcp.cli.{name}")
            module.configure(command)
            if name not in WITHOUT_JSON:
                command.add_argument("--json", action="store_true", help="print JSON for a script")
            command.set_defaults(run=module.run, usage=command)
    return parser


def _parsed(words: Sequence[str]) -> argparse.Namespace:
    """Parse `words`, reporting unknown options with their own command's usage."""
    parser = build_parser(words)
    if words[0] not in COMMANDS and not words[0].startswith("-"):
        parser.error(f"{_unknown_command(words[0])} The commands are {', '.join(COMMANDS)}.")
    arguments, unknown = parser.parse_known_args(words)
    if unknown:
        arguments.usage.error(f"unrecognized arguments: {' '.join(unknown)}")
    return arguments


def _unknown_command(word: str) -> str:
    from klein_mcp.errors import did_you_mean, quote

    meant = OTHER_NAMES.get(word.lower())
    suggestion = f"Did you mean {meant}?" if meant else did_you_mean(word, COMMANDS)
    return f"There is no command {quote(word)}. {suggestion}".strip()


def _is_for_people(error: Exception) -> bool:
    from engine.contract import EngineError
    from klein_mcp.errors import RequestError

    return isinstance(error, EngineError | RequestError)


def _failed(error: Exception) -> int:
    from klein_mcp.cli.terminal import error_line, strip_control_chars

    message = error_line(error)
    if not _has_folder():
        message += f" {GONE}"
    print("klein-mcp:", " ".join(strip_control_chars(message).split()), file=sys.stderr)
    return 1
