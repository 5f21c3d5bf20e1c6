"""Reads the body of an images call, JSON or form, within limits."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import anyio.to_thread
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.types import Message, Receive

from klein_mcp.foreign import well_formed
from klein_mcp.http.openai.errors import ApiError
from klein_mcp.limits import MAX_FILE_BYTES

MAX_IMAGES = 16
"""Images of one call, OpenAI's own limit; the model's is lower, and its error says so."""

MAX_FORM = 256 * 2**20
"""Bytes: four images of the largest size a library takes. Files beyond 1 MB lie on disk while the form arrives; then
all are in memory until the library has them."""

MAX_JSON = 96 * 2**20
"""Bytes: one image of the largest size as base64, which has to be parsed in memory."""

MAX_FIELDS = 100

MAX_FIELD_BYTES = MAX_JSON
"""Of one field of a form: clients of vLLM and SGLang send an image as the text of a data URL. Text waits in memory."""

IMAGE_FIELDS = ("image", "image[]", "images", "images[]", "url", "url[]")
"""OpenAI's SDKs send image or image[]; vLLM and SGLang also take url; JSON bodies use image or images."""


@dataclass(frozen=True, slots=True)
class Body:
    """The body of an edit.

    fields: everything but the images. images, mask: a file's bytes, or a reference as text.
    """

    fields: Mapping[str, Any]
    images: tuple[bytes | str, ...] = ()
    mask: bytes | str | None = None


async def read_json(request: Request) -> dict[str, Any]:
    """Return the body, whatever its content type. Raises ApiError."""
    return await _json_object(await _limited(request, MAX_JSON).body())


async def _json_object(data: bytes) -> dict[str, Any]:
    try:
        value = await anyio.to_thread.run_sync(_parsed, data)
    except (ValueError, RecursionError):
        raise ApiError(400, "The body is not valid JSON.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "The body must be a JSON object.", code="invalid_json")
    return value


def _parsed(data: bytes) -> Any:
    """Parse JSON as its standard defines it. Raises ValueError or RecursionError.

    Python's parser also takes NaN and infinities, which no response could repeat.
    """
    return well_formed(json.loads(data, parse_constant=_finite, parse_float=_finite))


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is not a finite number")
    return value


async def read_edit(request: Request) -> Body:
    """Return the body of an edit. Raises ApiError."""
    kind = request.headers.get("content-type", "").lower()
    if kind.startswith("multipart/form-data"):
        return await _read_form(_limited(request, MAX_FORM))
    text = _limited(request, MAX_JSON)
    data = await text.body()
    # curl -d declares whatever it sends as such a form.
    if kind.startswith("application/x-www-form-urlencoded") and not re.match(rb"\s*\{", data):
        return await _read_form(text)
    return body_from_json(await _json_object(data))


def body_from_json(data: Mapping[str, Any]) -> Body:
    """Raises ApiError."""
    images = [_reference(item, name) for name in IMAGE_FIELDS for item in _listed(data.get(name))]
    mask = data.get("mask")
    fields = {name: value for name, value in data.items() if name not in (*IMAGE_FIELDS, "mask")}
    return _checked(Body(fields, tuple(images), None if mask in (None, "") else _reference(mask, "mask")))


def _listed(value: Any) -> list[Any]:
    return [] if value in (None, "") else value if isinstance(value, list) else [value]


def _reference(value: Any, name: str) -> str:
    """Accept text, {"url": …}, {"image_url": …} and {"b64_json": …}."""
    if isinstance(value, Mapping):
        if isinstance(encoded := value.get("b64_json"), str):
            return f"data:;base64,{encoded}"
        value = value.get("url") or value.get("image_url")
        value = value.get("url") if isinstance(value, Mapping) else value
    if not isinstance(value, str) or not value:
        raise ApiError(400, f'{name} must be a URL: a string, or {{"image_url": …}}.', name, "invalid_value")
    return value


async def _read_form(request: Request) -> Body:
    fields: dict[str, Any] = {}
    images: list[bytes | str] = []
    mask: bytes | str | None = None
    try:
        async with request.form(max_files=MAX_IMAGES + 2, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES) as form:
            for name, value in form.multi_items():
                if _is_blank(value):
                    continue
                if name == "mask":
                    mask = await _file(value, name)
                elif re.sub(r"\[\d*\]$", "[]", name) in IMAGE_FIELDS:
                    images.append(await _file(value, name))
                elif isinstance(value, UploadFile):
                    raise ApiError(400, f"{name} is not a field for a file.", name)
                else:
                    fields[name] = value
    except (HTTPException, MultiPartException) as exc:
        detail = getattr(exc, "detail", None) or getattr(exc, "message", "")
        raise ApiError(400, f"The form cannot be read: {detail}", code="invalid_form") from None
    return _checked(Body(fields, tuple(images), mask))


def _is_blank(value: UploadFile | str) -> bool:
    """Return whether a part stands for a field that was left empty.

    A browser sends a file without a name. An empty file that has one is an error, not an omission.
    """
    return not (value.filename or value.size) if isinstance(value, UploadFile) else not value


async def _file(value: UploadFile | str, name: str) -> bytes | str:
    if isinstance(value, str):
        return value
    data = await value.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ApiError(413, f"{name} has more than {MAX_FILE_BYTES // 2**20} MiB; send a smaller copy.", name)
    return data


def _checked(body: Body) -> Body:
    if not body.images:
        raise ApiError(400, "image is missing: the image to edit.", "image", "missing_required_parameter")
    if len(body.images) > MAX_IMAGES:
        raise ApiError(400, f"{len(body.images)} images; at most {MAX_IMAGES}.", "image")
    return body


def _limited(request: Request, most: int) -> Request:
    """Return the request with a body of at most `most` bytes.

    Reading further raises ApiError.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > most:
        raise _too_large(most)
    return Request(request.scope, _limited_receive(request.receive, most))


def _limited_receive(receive: Receive, most: int) -> Receive:
    received = 0

    async def limited() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > most:
            raise _too_large(most)
        return message

    return limited


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"The body has more than {most // 2**20} MiB; send smaller images.", code="body_too_large")
