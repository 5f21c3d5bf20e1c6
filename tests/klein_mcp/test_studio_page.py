"""The studio's page as a file: current, small, self-contained, and without ways to turn text into HTML."""

import re

import pytest

from klein_mcp.studio import build

MOST_BYTES = 80_000
"""76 kB now. A client may load it with every call."""
SOURCES = sorted(path for path in build.PAGE.iterdir())


def test_built_page_is_small() -> None:
    """Whether it is current, `dev.py lint` checks."""
    assert build.BUILT.stat().st_size < MOST_BYTES


def test_page_holds_one_style_and_one_script_and_loads_nothing() -> None:
    built = build.BUILT.read_text(encoding="utf-8")
    assert len(re.findall(r"<script\b", built)) == 1
    assert len(re.findall(r"<style\b", built)) == 1
    assert not re.search(r"<script[^>]*\bsrc=|<link[^>]*stylesheet|@import|url\(|<iframe|<base\b", built)
    # The one address is the name of the SVG namespace, which nobody fetches.
    assert set(re.findall(r"https?://[^\"'\s)]*", built)) == {"http://www.w3.org/2000/svg"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_source_turns_text_into_html_or_code(path) -> None:
    text = path.read_text(encoding="utf-8")
    forbidden = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|DOMParser|\beval\b|Function\("
    )
    assert not re.search(forbidden, text)
    # Inline handlers and style attributes need a looser policy than ours.
    assert not re.search(r"\bon\w+=\"|style=\"|style: \"", text)


@pytest.mark.parametrize("path", [path for path in SOURCES if path.suffix == ".js"], ids=lambda path: path.name)
def test_every_import_names_something_its_module_exports(path) -> None:
    text = path.read_text(encoding="utf-8")
    for names, module in re.findall(r'^import \{ ?([^}]*?) ?\} from "\./(\w+)\.js";', text, re.MULTILINE):
        exported = set(build.exports((build.PAGE / f"{module}.js").read_text(encoding="utf-8")))
        for name in names.split(", "):
            assert name in exported, f"{module}.js does not export {name}"
            assert len(re.findall(rf"\b{name}\b", text)) > 1, f"{path.name} does not use {name}"
