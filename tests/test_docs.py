"""The reference pages hold: their code runs, their names exist."""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from klein_mcp import settings
from klein_mcp.cli.main import build_parser

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def test_python_of_the_engine_page_runs_from_top_to_bottom(capsys: pytest.CaptureFixture[str]) -> None:
    page = (DOCS / "engine.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        exec(compile(block, "docs/engine.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "step 4 of 4" in printed
    assert "uint8 nano 7" in printed
    assert "steps" in printed.splitlines()[-1], "the error names what is wrong"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_setting_a_page_names_exists(page: Path) -> None:
    known = {name for name, _, _ in settings.table()}
    assert set(re.findall(r"\bKLEIN_[A-Z_]*[A-Z]\b", page.read_text(encoding="utf-8"))) <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_linked_page_exists(page: Path) -> None:
    for target in re.findall(r"\]\(([\w.-]+\.md)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8")):
        assert (DOCS / target).exists(), target


def options(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the options of a parser and of its commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from options(command)
        elif action.option_strings:
            yield action


def test_help_of_an_option_names_its_default() -> None:
    """docs/cli.md is made of it."""
    defaults = [
        each for each in options(build_parser()) if each.default not in (None, False, "", [], argparse.SUPPRESS)
    ]
    assert "6379" in [str(each.default) for each in defaults]
    assert not [each.option_strings for each in defaults if str(each.default) not in (each.help or "")]


def test_next_step_that_code_chooses_stands_on_the_errors_page() -> None:
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", (DOCS / "errors.md").read_text(encoding="utf-8"), re.MULTILINE))
    starts = {
        "No folder is open for writing": "The user can allow a folder",  # a constant of another module
        "Cannot listen on": "Choose another --port. Or: --host takes",  # a variable
        "The image library {path} cannot be written": "Free some space (klein-mcp prune), or make",  # a function
        "The mask is black everywhere.": "White in the mask",  # one of two messages
        "The mask is {mask width}×{mask height} but the image is {width}×{height}.": "Send a mask",
    }
    for message, step in starts.items():
        found = [own for key, own in rows.items() if key.startswith(message)]
        assert found, message
        assert all(own.startswith(step) for own in found), (message, found)
