"""Text and JSON of foreign origin, cleaned at the border."""

import math
import re
from typing import Any

LONGEST_TEXT = 8_000
"""Characters of one text of a foreign recipe that may come into an agent's context. Of a longer prompt, as /v1 takes, a
file that is read again has the beginning."""
_MOST_ITEMS = 200
_DEEPEST = 6

_SURROGATES = re.compile("[\ud800-\udfff]+")


def well_formed(value: Any) -> Any:
    """Replace lone surrogates in a text or in JSON data.

    U+FFFD takes their place. A program that cuts text in the middle of an emoji sends half of it, which no encoder
    takes. Raises RecursionError.
    """
    match value:
        case str():
            return value if value.isascii() else _SURROGATES.sub("\ufffd", value)
        case list():
            return [well_formed(item) for item in value]
        case dict():
            return {well_formed(key): well_formed(item) for key, item in value.items()}
    return value


def clean_text(text: str, limit: int = LONGEST_TEXT) -> str:
    """Replace lone surrogates, which no encoder takes, and shorten to `limit`."""
    text = well_formed(text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def clean_json(value: Any, depth: int = _DEEPEST) -> Any:
    """Bound text, size and depth of JSON data.

    NaN, infinities and huge integers become None.
    """
    match value:
        case str():
            return clean_text(value)
        case bool() | None:
            return value
        case int():
            return value if abs(value) < 2**63 else None
        case float():
            return value if math.isfinite(value) else None
        case list() | tuple() if depth:
            return [clean_json(item, depth - 1) for item in value[:_MOST_ITEMS]]
        case dict() if depth:
            items = list(value.items())[:_MOST_ITEMS]
            return {clean_text(str(key), 100): clean_json(item, depth - 1) for key, item in items}
    return None
