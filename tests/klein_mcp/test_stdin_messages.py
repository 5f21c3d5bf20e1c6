"""Lines of stdin that the SDK cannot parse: repaired, or answered with an error."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mcp_types import JSONRPCError

from klein_mcp.mcp_server.stdin_messages import read_message

CALL = {"jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": {"name": "x", "arguments": {"prompt": "a cat"}}}


def line(**more: Any) -> bytes:
    return json.dumps({**CALL, **more}).encode()


def argument(raw: bytes) -> bytes:
    """The call with a raw JSON value as its prompt."""
    return json.dumps(CALL).encode().replace(b'"a cat"', raw)


def prompt(message: Any) -> Any:
    assert isinstance(message, str), message
    return json.loads(message)["params"]["arguments"]["prompt"]


def error(message: Any) -> tuple[Any, int]:
    assert isinstance(message, JSONRPCError), message
    return message.id, message.error.code


def test_valid_line_passes_unchanged():
    assert read_message(json.dumps(CALL).encode() + b"\r\n") == json.dumps(CALL)


def test_half_an_emoji_becomes_a_replacement_character():
    assert prompt(read_message(argument(rb'"a cat \ud83d"'))) == "a cat \ufffd"
    assert prompt(read_message(argument(rb'"\udc31 a \ud83d\ude00 \ud83d"'))) == "\ufffd a \U0001f600 \ufffd"


def test_byte_order_mark_and_bytes_that_are_not_utf8_are_read():
    assert prompt(read_message(b"\xef\xbb\xbf" + json.dumps(CALL).encode())) == "a cat"
    assert prompt(read_message(argument(b'"a c\xe4t"'))) == "a c\ufffdt"


def test_number_of_thousands_of_digits_is_left_to_its_argument():
    assert prompt(read_message(argument(b"9" * 5000))) == "9" * 5000


@pytest.mark.parametrize(
    ("raw", "number", "code"),
    [
        (b"hello", None, -32700),
        (b"\xff\xfe\x00", None, -32700),
        (b'{"jsonrpc": "2.0", "id": 1', None, -32700),
        (b"[" * 100_000, None, -32700),
        (b'{"a":' * 100_000, None, -32700),
        (b"[" + json.dumps(CALL).encode() + b"]", None, -32600),
        (b"7", None, -32600),
        (b"{}", None, -32600),
        (line(id=1.5), None, -32600),
        (line(id=True), None, -32600),
        (line(id=[1]), None, -32600),
        (line(jsonrpc="1.0"), 7, -32600),
        (line(method=7), 7, -32600),
        (line(params=[1]), 7, -32600),
    ],
    ids=range(14),
)
def test_other_lines_are_answered_with_their_id_or_null(raw: bytes, number: Any, code: int):
    assert error(read_message(raw)) == (number, code)


@pytest.mark.parametrize("raw", [b"", b"\n", b"  \r\n", b'{"jsonrpc": "2.0", "method": 7}', b'{"result": {}}'])
def test_blank_lines_notifications_and_responses_are_never_answered(raw: bytes):
    assert read_message(raw) is None


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=400) | st.text(max_size=200).map(lambda text: argument(json.dumps(text).encode())))
def test_any_line_gives_a_message_an_error_or_nothing(raw: bytes):
    message = read_message(raw)
    if isinstance(message, JSONRPCError):
        assert message.model_dump_json()
    elif message is not None:
        assert "\n" not in message
        message.encode()
