"""Write the generated reference pages: `python -m examples.reference`.

They are docs/settings.md, docs/cli.md and docs/errors.md; tests/test_distribution.py compares them with this output.
"""

import argparse
import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from klein_mcp import settings
from klein_mcp.cli import main as cli
from klein_mcp.cli import terminal
from klein_mcp.mcp_server import results

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"

ERRORS = {
    "RequestError": "The call can be mended",
    "Refused": "This server's settings do not allow it",
    "UnknownImage": "The reference leads to no image",
    "ServerFault": "The server is set up wrongly",
    "NotEnoughMemory": "Memory does not suffice at the moment",
    "LibraryUnwritable": "The library cannot be written",
    "LibraryBusy": "Another program holds the library",
    "LibraryDamaged": "The library is damaged",
    "BadImage": "The file is no image that can be used",
    "InvalidJob": "No model could do this",
    "ModelNotFound": "The model is not installed",
    "BadWeights": "The model's files cannot be used",
    "OutOfMemory": "Memory does not suffice",
    "Busy": "The queue is full",
    "EngineFailed": "The engine broke off",
    "DeviceLost": "The GPU is lost",
    "SettingsError": "A setting has a wrong value",
}
"""Error classes by their meaning for a reader, in the order of the page."""


def settings_page() -> str:
    """Return docs/settings.md: every setting with its default and meaning."""
    rows = [
        f'| <a id="{name.lower()}"></a>`{name}` | {f"`{default}`" if default else "unset"} | {_cell(meaning)} |'
        for name, default, meaning in settings.table()
    ]
    return "\n".join(
        (
            "# Settings",
            "",
            "Set them as environment variables, in a client's configuration:",
            "",
            "```json",
            '"env": {"KLEIN_MODEL": "klein-4b"}',
            "```",
            "",
            'or in `config.toml` in the data folder, in lower case and without `KLEIN_`: `model = "klein-4b"`. The',
            "environment wins. Settings of the engine (models, device, number formats, memory) come from whichever",
            "client starts it: after `klein-mcp stop` the next call starts it with its own.",
            r"In `config.toml` a path with backslashes stands in single quotes: `models = 'C:\ComfyUI\models'`.",
            "",
            "| Setting | Default | Meaning |",
            "| --- | --- | --- |",
            *rows,
            "",
        )
    )


def cli_page() -> str:
    """Return docs/cli.md: every command with its usage, arguments and options."""
    parts = [
        "# Command line",
        "",
        "Without a command, `klein-mcp` is the MCP server over stdio, which a client starts.",
        "",
        "Exit codes: 0 done, 1 failed with one line on stderr, 2 wrong usage, 130 interrupted, 141 nobody",
        "read its output, as behind `head`, 143 a server ended by SIGTERM. `--json` prints machine-readable output.",
        "Progress is shown on a terminal only. `doctor` and `models` print what they find on stdout, also with exit",
        "code 1: something keeps images from being made, or no engine of `KLEIN_ENGINE` answers.",
        "",
        "```sh",
        'klein-mcp paint "an apple on a yellow background" --seed 7 -o apple.png',
        'klein-mcp paint "make the background green" --ref apple.png --seed 7 -o green.png',
        "```",
        "",
        "`paint` writes its image where you say, and not into the library. A file that is there is replaced,",
        "and the printed line says so. One reference is edited as the tool `edit_image` does it: at its own size,",
        "untouched pixels kept, with the same warnings, and the demo model refuses a photograph. Several are composed",
        "into a new image, whose size is that at which the model sees the first one.",
        "",
    ]
    parts += _commands(cli.build_parser(), "## klein-mcp")
    return "\n".join(parts).rstrip() + "\n"


def _commands(parser: argparse.ArgumentParser, title: str) -> Iterator[str]:
    """Yield the lines of each command of `parser`, and of their own commands below them."""
    for commands in (action for action in parser._actions if isinstance(action, argparse._SubParsersAction)):
        about = {action.dest: action.help or "" for action in commands._choices_actions}
        for name, command in commands.choices.items():
            yield from (f"{title} {name}", "", _sentence(about.get(name, "")), "", *_arguments(command), "")
            yield from _commands(command, f"#{title} {name}")


def _arguments(command: argparse.ArgumentParser) -> Iterator[str]:
    yield from ("```", re.sub(r"\s+", " ", command.format_usage().removeprefix("usage: ")).strip(), "```")
    rows = []
    for action in command._actions:
        if isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
            continue
        value = action.metavar or (action.dest.upper() if action.nargs != 0 and action.option_strings else "")
        value = " ".join(value) if isinstance(value, tuple) else value
        names = ", ".join(action.option_strings) or str(action.metavar or action.dest)
        label = f"{names} {value}".strip() if action.option_strings else names
        rows.append(f"| `{label}` | {_cell(action.help or '')} |")
    if rows:
        yield from ("", "| Argument | Meaning |", "| --- | --- |", *rows)


def errors_page() -> str:
    """Return docs/errors.md: every message in the source with its next step."""
    found = messages()
    parts = [
        "# Errors",
        "",
        "Every error is one line: what happened, the limit, and the next step. Words in braces are filled in. After an",
        "error nothing is lost, and the next call works.",
        "",
    ]
    for name, meaning in ERRORS.items():
        if rows := sorted(found.get(name, ())):
            parts += [f"## {meaning}", "", "| Message | Next step |", "| --- | --- |"]
            parts += [f"| {_cell(message)} | {_cell(hint)} |" for message, hint in rows] + [""]
    return "\n".join(parts).rstrip() + "\n"


def messages() -> dict[str, set[tuple[str, str]]]:
    """Return all error messages with their next steps, by class.

    These are the errors that are constructed in `engine` and `klein_mcp`.
    """
    paths = [
        path for path in (*ROOT.glob("engine/**/*.py"), *ROOT.glob("klein_mcp/**/*.py")) if "training" not in path.parts
    ]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in paths]
    functions = {node.name: node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    returned = {name: [_text(text) for text in _returned(node)] for name, node in functions.items()}
    constants = _assigned(node for tree in trees for node in tree.body)  # a module may import another's
    found: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for path, tree in zip(paths, trees, strict=True):
        sentences: Mapping[Any, str] = terminal.SENTENCES if "cli" in path.parts else results.SENTENCES
        for scope, call in _calls(tree, constants):
            if not (call.args and isinstance(call.func, ast.Name) and call.func.id in ERRORS):
                continue
            keywords = {keyword.arg: keyword.value for keyword in call.keywords}
            hint = "" if "hint" in keywords else _fix(keywords.get("fix"))
            if "hint" in keywords:
                hint = " Or: ".join(dict.fromkeys(filter(None, _texts(keywords["hint"], scope, returned))))
            if "action" in keywords:
                (action,) = filter(None, _texts(keywords["action"], {}, {}))
                shows = _text(keywords["shows"]) if "shows" in keywords else "all"
                hint = f"{hint} {sentences[action].format(shows=shows)}"
            found[call.func.id] |= {(message, hint) for message in _texts(call.args[0], {}, {}) if message}
    return found


Scope = dict[str, list[ast.expr]]
"""The values that names are given in a module and in one of its functions."""


def _calls(tree: ast.Module, constants: Scope) -> Iterator[tuple[Scope, ast.Call]]:
    """Yield each call once, with the names known there."""
    of_module = constants | _assigned(tree.body)
    scopes: dict[ast.Call, Scope] = {}
    for node in ast.walk(tree):  # outer functions come before those in them, whose names win
        if isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef):
            own = {} if isinstance(node, ast.Module) else _assigned(ast.walk(node))
            scopes |= {each: of_module | own for each in ast.walk(node) if isinstance(each, ast.Call)}
    for call, scope in scopes.items():
        yield scope, call


def _assigned(nodes: Iterable[ast.AST]) -> Scope:
    values: Scope = defaultdict(list)
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            values[node.targets[0].id].append(node.value)
    return dict(values)


def _returned(function: ast.FunctionDef) -> Iterator[ast.expr]:
    for node in ast.walk(function):
        if isinstance(node, ast.Return) and node.value is not None:
            yield node.value


def _texts(node: ast.expr, scope: Scope, returned: dict[str, list[str]]) -> list[str]:
    """Return the texts that an expression may have, as far as they are literals here or a step away."""
    if isinstance(node, ast.IfExp):
        return [*_texts(node.body, scope, returned), *_texts(node.orelse, scope, returned)]
    if isinstance(node, ast.Name):
        return [text for value in scope.get(node.id, ()) for text in _texts(value, {}, returned)]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return returned.get(node.func.id, [])
    return [_text(node)]


def _text(node: ast.expr) -> str:
    """Return a string literal as a reader sees it, "" without one.

    Placeholders are named by the expressions that fill them.
    """
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) if isinstance(part, ast.Constant) else _placeholder(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return ""


def _placeholder(node: ast.expr) -> str:
    # The sides of an array, and a product of sides, have names that no expression shows.
    expression = ast.unparse(node.value if isinstance(node, ast.FormattedValue) else node)
    for form, name in _SHAPES.items():
        if re.search(form, expression):
            return "{" + name + "}"
    names = [word for word in re.findall(r"[A-Za-z_]\w*", expression) if word not in _NOISE]
    return "{" + (names[-1].strip("_").replace("_", " ").lower() if names else "value") + "}"


_SHAPES = {
    r"^mask\.shape\[1\]$": "mask width",
    r"^mask\.shape\[0\]$": "mask height",
    r"^\w+\.shape\[1\]$": "width",
    r"^\w+\.shape\[0\]$": "height",
    r"^width \* height / ": "megapixels",
}
_NOISE = {"f", "s", "if", "else", "str", "len", "join", "map", "self", "round", "sorted", "quote", "format_size"}


def _fix(node: ast.expr | None) -> str:
    """Return a literal `Fix(…)` in words, like the front ends.

    Returns "" if it is computed.
    """
    if not (isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)):
        return ""
    words = [_text(argument) for argument in node.args if _text(argument)]
    match words:
        case ["set", setting, *_]:
            return f"Set KLEIN_{setting.upper()}."
        case ["pull", *_]:
            return "Run: klein-mcp pull {model}"
        case ["list", *_]:
            return "Run klein-mcp models to see what is there."
    return ""


def _cell(text: str) -> str:
    text = re.sub(r"\s+", " ", text).strip()
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("[", "\\[") or " "


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}." if text else ""


PAGES = {"settings.md": settings_page, "cli.md": cli_page, "errors.md": errors_page}


def main() -> None:
    """Write every page."""
    for name, make in PAGES.items():
        (DOCS / name).write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    main()
