"""Shortens the page's script.

What only readers need is left out, and names that nobody outside sees get a letter or two. Not for any script:
statements end with a semicolon, arrow functions have parentheses, and no name of ours is also used as one of the
browser's.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

_TOKEN = re.compile(
    r"""(?P<space>\s+|//[^\n]*|/\*.*?\*/)
    |(?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')
    |(?P<number>\d[\w.]*)
    |(?P<name>[A-Za-z_$][\w$]*)
    |(?P<sign>=>|\.\.\.|\?\.|(?:&&|\|\||\?\?|[=!]=|[-+*/%&|^<>=!])=|&&|\|\||\?\?|\+\+|--|[-+*/%&|^<>=!?~{}()\[\];,.:])""",
    re.VERBOSE | re.DOTALL,
)
_REGEX = re.compile(r"/(?:\\.|\[(?:\\.|[^\]\\])*\]|[^/\\\n])+/\w*")
_TEXT = re.compile(r"(?:\\.|\$(?!\{)|[^`\\$])*", re.DOTALL)

_OPENS_OBJECT = frozenset(["(", ",", "=", ":", "?", "[", "&&", "||", "??", "...", "return", "const", "let"])
_BEFORE_METHOD = frozenset(["{", "}", ";", ",", "async", "get", "set", "static"])
_WORDS = """async await break case catch class const continue default delete do else extends false finally for function
get if in instanceof let new null of return set static switch this throw true try typeof undefined void while"""
_KEYWORDS = frozenset(_WORDS.split())


@dataclass(slots=True)
class _Token:
    """One token.

    inside: the kind of bracket around it: ( [ block object class or ${, "" at the top.
    """

    kind: str
    text: str
    inside: str = ""
    before: str = ""
    after: str = ""


@dataclass(slots=True)
class _Reader:
    """Reads tokens, with templates and the expressions in them."""

    source: str
    at: int = 0
    brackets: list[str] = field(default_factory=list)
    tokens: list[_Token] = field(default_factory=list)

    def read(self) -> list[_Token]:
        while self.at < len(self.source):
            self._next()
        for token, following in zip(self.tokens, self.tokens[1:], strict=False):
            token.after, following.before = following.text, token.text
        return self.tokens

    def _next(self) -> None:
        before = self.tokens[-1] if self.tokens else _Token("sign", ";")
        if self.source[self.at] == "`":
            self.at += 1
            return self._template("`")
        if self.source[self.at] == "/" and (match := self._regex(before)):
            return self._add("string", match[0])
        match = _TOKEN.match(self.source, self.at)
        if match is None:
            raise ValueError(f"cannot read {self.source[self.at : self.at + 40]!r}")
        kind, text = match.lastgroup or "", match[0]
        if kind == "space":
            self.at = match.end()
        elif text == "}" and self.brackets and self.brackets[-1] == "${":
            self.brackets.pop()
            self.at += 1
            self._template("}")
        else:
            self._add(kind, text)

    def _regex(self, before: _Token) -> re.Match[str] | None:
        divides = before.kind in ("number", "string") or before.text in (")", "]", "}")
        divides = divides or (before.kind == "name" and before.text not in _KEYWORDS)
        comment = self.source.startswith(("//", "/*"), self.at)
        return None if divides or comment else _REGEX.match(self.source, self.at)

    def _template(self, opened: str) -> None:
        """Read a template's text, up to its end or an expression."""
        match = _TEXT.match(self.source, self.at)
        assert match
        end = "`" if self.source.startswith("`", match.end()) else "${"
        self.tokens.append(_Token("string", opened + match[0] + end, self._inside()))
        self.at = match.end() + len(end)
        if end == "${":
            self.brackets.append("${")

    def _add(self, kind: str, text: str) -> None:
        if text in ("}", ")", "]"):
            self.brackets.pop()
        self.tokens.append(_Token(kind, text, self._inside()))
        self.at += len(text)
        if text in ("(", "["):
            self.brackets.append(text)
        elif text == "{":
            self.brackets.append(self._brace())

    def _inside(self) -> str:
        return self.brackets[-1] if self.brackets else ""

    def _brace(self) -> str:
        *_, keyword, before = ["", "", *(token.text for token in self.tokens[-3:-1])]
        if before in _OPENS_OBJECT:
            return "object"
        return "class" if keyword == "class" else "block"


def shorten_script(source: str) -> str:
    """Return a script that does the same in fewer bytes."""
    tokens = _Reader(source).read()
    short = _short_names(tokens)
    return _join([_renamed(token, short) for token in tokens])


def _is_property(token: _Token) -> bool:
    """Return whether a name belongs to an object, not to a scope."""
    if token.before in (".", "?."):
        return True
    if token.inside == "class":
        return token.before in _BEFORE_METHOD
    key = token.after == ":" or token.after == "("
    return token.inside == "object" and token.before in _BEFORE_METHOD and key


def _is_shorthand(token: _Token) -> bool:
    """Return whether a name stands for both a property and a variable."""
    return token.inside == "object" and token.before in ("{", ",") and token.after in (",", "}", "=")


def _short_names(tokens: list[_Token]) -> dict[str, str]:
    """Map the script's own names to short ones, most frequent first."""
    ours = {name for token in _declared(tokens) if (name := token.text) not in _KEYWORDS}
    used = Counter(token.text for token in tokens if token.kind == "name" and not _is_property(token))
    taken = {name for name in used if name not in ours} | _KEYWORDS
    names = (name for name in _names() if name not in taken)
    return dict(zip(sorted(ours, key=lambda name: (-used[name], name)), names, strict=False))


def _declared(tokens: list[_Token]) -> Iterator[_Token]:
    for place, token in enumerate(tokens):
        if token.kind == "name" and token.before in ("const", "let", "class", "function"):
            yield token
        elif token.text in ("{", "[") and token.before in ("const", "let"):
            yield from _bound(_group(tokens, place))
        elif token.text == "=>" and token.before == ")":
            yield from _bound(_group_before(tokens, place - 1))


def _bound(group: list[_Token]) -> Iterator[_Token]:
    """Yield the names that a pattern or a list of parameters binds."""
    for token in group:
        fresh = token.before in ("(", "[", ",", "{", "...")
        if token.kind == "name" and fresh and token.after in (",", ")", "]", "}"):
            yield token


def _group(tokens: list[_Token], start: int) -> list[_Token]:
    depth = 0
    for place in range(start, len(tokens)):
        depth += (tokens[place].text in ("(", "[", "{")) - (tokens[place].text in (")", "]", "}"))
        if depth == 0:
            return tokens[start : place + 1]
    raise ValueError("a bracket is not closed")


def _group_before(tokens: list[_Token], end: int) -> list[_Token]:
    depth = 0
    for place in range(end, -1, -1):
        depth += (tokens[place].text in (")", "]", "}")) - (tokens[place].text in ("(", "[", "{"))
        if depth == 0:
            return tokens[place : end + 1]
    raise ValueError("a bracket is not opened")


def _names() -> Iterator[str]:
    """Yield a, b, … z, A, … Z, aa, ab, …"""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    for length in count(1):
        for number in range(len(letters) ** length):
            name = ""
            for _ in range(length):
                number, letter = divmod(number, len(letters))
                name = letters[letter] + name
            yield name


def _renamed(token: _Token, short: dict[str, str]) -> str:
    if token.kind != "name" or token.text not in short or _is_property(token):
        return token.text
    name = short[token.text]
    return f"{token.text}:{name}" if _is_shorthand(token) else name


def _join(parts: list[str]) -> str:
    """Write tokens side by side.

    A space stands only where two would become one.
    """
    out: list[str] = []
    last = ""
    for part in parts:
        if last and ((_is_word(last[-1]) and _is_word(part[0])) or (last[-1] in "+-" and part[0] == last[-1])):
            out.append(" ")
        elif last == ";" and part == "}":
            out.pop()
        out.append(part)
        last = part
    return "".join(out)


def _is_word(letter: str) -> bool:
    return letter.isalnum() or letter in "_$"
