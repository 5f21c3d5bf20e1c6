"""Builds the studio's one HTML file from its readable sources.

python -m klein_mcp.studio.build            write studio.html
python -m klein_mcp.studio.build --check    fail if studio.html is not current
"""

import re
import sys
from pathlib import Path

PAGE = Path(__file__).parent / "page"
BUILT = Path(__file__).parent / "studio.html"

_IMPORT = re.compile(r'^import \{([^}]*)\} from "\./(\w+)\.js";$', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:async )?(?:function|const|class) (\w+))", re.MULTILINE)


def build() -> str:
    """Return the page with its style and script inside."""
    html = (PAGE / "index.html").read_text(encoding="utf-8")
    style = (PAGE / "style.css").read_text(encoding="utf-8")
    html = html.replace("/* style.css */", _minify("text/css", style))
    return html.replace("/* script.js */", _minify("application/javascript", script()))


def script() -> str:
    """Return all modules as one script, in the order of imports."""
    parts: dict[str, str] = {}

    def add(name: str) -> None:
        if name in parts:
            return
        source = (PAGE / f"{name}.js").read_text(encoding="utf-8")
        for _, needed in _IMPORT.findall(source):
            add(needed)
        parts[name] = _module(name, source)

    add("main")
    return "\n".join(['"use strict";', *parts.values()])


def exports(source: str) -> list[str]:
    """Return the names a module exports."""
    return _EXPORT.findall(source)


def _module(name: str, source: str) -> str:
    body = _IMPORT.sub(r"const {\1} = $\2;", source)
    body = _EXPORT.sub("", body)
    return f"const ${name} = (() => {{\n{body}\nreturn {{ {', '.join(exports(source))} }};\n}})();"


def _minify(kind: str, source: str) -> str:
    try:
        import minify
    except ImportError:
        raise SystemExit("tdewolff-minify is not installed. Run: pip install -e '.[lint]'") from None
    return minify.string(kind, source)


def main(argv: list[str]) -> int:
    """Write or check the built page."""
    built = build()
    if "--check" in argv:
        current = BUILT.exists() and BUILT.read_text(encoding="utf-8") == built
        print("studio.html is current" if current else "studio.html is old: python -m klein_mcp.studio.build")
        return 0 if current else 1
    BUILT.write_text(built, encoding="utf-8")
    print(f"{BUILT.name}: {len(built.encode()):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
