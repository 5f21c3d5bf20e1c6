"""Response bodies and server-sent events of the OpenAI images API."""

import json
import math
import time
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from engine.contract import GRID
from klein_mcp.http.openai.fields import ImageCall

Operation = Literal["image_generation", "image_edit"]

DONE = b"data: [DONE]\n\n"

KEEP_ALIVE = b": waiting\n\n"
"""A comment, which clients skip: proxies close a connection that is silent for a minute."""


def usage(prompt: str, references: Iterable[tuple[int, int]], images: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Count tokens, one per 16 × 16 pixels or four bytes.

    The text's share is an estimate: front ends have no tokenizer. references, images: sizes in pixels.
    """
    text = max(1, math.ceil(len(prompt.encode()) / 4))
    seen, made = (sum(map(_tokens, sizes)) for sizes in (references, images))
    return {
        "input_tokens": text + seen,
        "input_tokens_details": {"text_tokens": text, "image_tokens": seen},
        "output_tokens": made,
        "output_tokens_details": {"text_tokens": 0, "image_tokens": made},
        "total_tokens": text + seen + made,
    }


def _tokens(size: tuple[int, int]) -> int:
    return math.ceil(size[0] / GRID) * math.ceil(size[1] / GRID)


def images_response(
    call: ImageCall, data: Sequence[dict[str, Any]], size: tuple[int, int], usage: dict[str, Any]
) -> dict[str, Any]:
    """Return the body of a call that does not stream."""
    return {"created": int(time.time()), "data": list(data), **_shared(call, size), "usage": usage}


def partial_event(
    operation: Operation, call: ImageCall, b64_json: str, index: int, size: tuple[int, int]
) -> dict[str, Any]:
    return {
        "type": f"{operation}.partial_image",
        "b64_json": b64_json,
        "partial_image_index": index,
        "created_at": int(time.time()),
        **_shared(call, size),
    }


def completed_event(
    operation: Operation, call: ImageCall, item: dict[str, Any], size: tuple[int, int], usage: dict[str, Any]
) -> dict[str, Any]:
    """Return the event of a finished image.

    item: as in `data` of a response that does not stream.
    """
    return {
        "type": f"{operation}.completed",
        **item,
        "created_at": int(time.time()),
        **_shared(call, size),
        "usage": usage,
    }


def server_sent(payload: dict[str, Any]) -> bytes:
    """Encode one event. An error is named so, as the SDKs expect."""
    name = payload.get("type", "error")
    return f"event: {name}\ndata: {json.dumps(payload, separators=(',', ':'))}\n\n".encode()


def _shared(call: ImageCall, size: tuple[int, int]) -> dict[str, Any]:
    return {
        "size": f"{size[0]}x{size[1]}",
        "quality": call.quality,
        "background": "transparent" if call.transparent else "opaque",
        "output_format": call.output_format,
    }
