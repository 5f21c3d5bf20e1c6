"""Reads JSON-RPC messages from stdin, repairs some and rejects the others.

The SDK drops a line that it cannot parse, and the client then waits for an answer until its own timeout.
"""

import json
from typing import Any

from mcp_types import (
    INVALID_REQUEST,
    PARSE_ERROR,
    ErrorData,
    JSONRPCError,
    JSONRPCNotification,
    jsonrpc_message_adapter,
)

LONGEST_NUMBER = 308
"""Digits; a longer one stays text, for the argument's own error. Python refuses to parse 4,300."""


def read_message(line: bytes) -> str | JSONRPCError | None:
    """Return a parsable line, an error to send, or None."""
    # Windows programs write a byte order mark; bytes that are not UTF-8 become U+FFFD.
    text = line.decode("utf-8-sig", "replace").strip()
    if not text:
        return None
    if _is_valid(text):
        return text
    try:
        value = json.loads(text, parse_int=_integer)
        repaired = _without_surrogates(json.dumps(value, ensure_ascii=False))
    except (ValueError, RecursionError) as exc:
        return _error(None, PARSE_ERROR, f"This line is not JSON: {str(exc)[:200]}")
    if _is_valid(repaired):
        return repaired
    if isinstance(value, list):
        return _error(None, INVALID_REQUEST, "Batches are not part of the protocol; send one message a line.")
    if isinstance(value, dict) and "id" not in value and ("method" in value or "result" in value):
        return None  # a notification must not be answered, nor a response
    number = value.get("id") if isinstance(value, dict) else None
    usable = isinstance(number, int | str) and not isinstance(number, bool)
    return _error(number if usable else None, INVALID_REQUEST, "This is not a JSON-RPC 2.0 request.")


def _is_valid(text: str) -> bool:
    try:
        message = jsonrpc_message_adapter.validate_json(text, by_name=False)
    except (ValueError, RecursionError):
        return False
    # To the SDK a request whose id is a fraction is a notification, which is not answered.
    return not isinstance(message, JSONRPCNotification) or '"id"' not in text or "id" not in json.loads(text)


def _integer(digits: str) -> int | str:
    return int(digits) if len(digits) <= LONGEST_NUMBER else digits


def _without_surrogates(text: str) -> str:
    """Replace half an emoji, as JSON.stringify writes a cut one, by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _error(number: Any, code: int, message: str) -> JSONRPCError:
    return JSONRPCError(jsonrpc="2.0", id=number, error=ErrorData(code=code, message=message))
